#!/usr/bin/env python3
"""TCP concurrent server, one thread per client.

The main thread accepts. For every connection it starts a thread, which serves
that one client and ends.

Try:       python3 server05.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    a thread starts several times faster than a process, but all threads
           share one table of descriptors, one fate and, in the usual build of
           Python, one lock (the GIL).
See also:  server01.py (a process instead of a thread), server08.py (the threads
           are started before the clients come).
"""
import argparse
import contextlib
import os
import signal
import socket
import struct
import sys
import threading
import time

STOP = {signal.SIGINT, signal.SIGTERM}
TICK = 0.1                # seconds; the main loop checks for signals at least this often
MAX_THREADS = 1000        # further clients wait in the kernel's queue
STACK = 256 * 1024        # bytes for each thread: plenty here, and the default is 8 MiB


def main():
    options = parse_options()
    threading.stack_size(STACK)
    with listen(options.host, options.port) as listener:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # from now on they stay pending
        listener.settimeout(TICK)
        while not signal.sigpending() & STOP:
            if threading.active_count() > MAX_THREADS:  # this one included
                time.sleep(TICK)
                continue
            try:
                conn, address = listener.accept()
            except socket.timeout:  # no client for a TICK
                continue
            except OSError:  # out of descriptors: the client waits in the kernel's queue
                time.sleep(TICK)
                continue
            start_thread(conn, address)
        os._exit(0)  # this ends all threads, too, whatever they are doing


def start_thread(conn, address):
    """Start a thread that serves one client and ends."""
    try:
        threading.Thread(target=handle, args=(conn, address), daemon=True).start()
    except (RuntimeError, MemoryError) as error:  # no thread can be had: this client only
        log(f'cannot start a thread: {error!r}', sys.stderr)
        conn.close()


# The service: the same in every server; read it once, in server01.py.

BLOCK = b'x' * 64 * 1024  # replies are sent from this block, however long they are
MAX_BYTES = 2 ** 30       # bytes that one request may ask for
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes; more than a line, as closing with some unread would send RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
BACKLOG = 1024            # clients not yet accepted; the 5 of old books stalls some of 15 for 1 s
MAX_UNSENT = 128 * 1024   # bytes the kernel takes ahead; more would hide that a client reads


def handle(conn, address):
    """Serve one request after another on *conn* until the client closes it; close it, too."""
    conn.settimeout(TIMEOUT)
    received = b''
    try:
        while True:
            while b'\n' not in received and len(received) < MAX_LINE:  # one recv is not one line
                data = conn.recv(RECV_SIZE)
                if not data:  # end of file: it ends a last line, too
                    break
                received += data
            if not received:
                return
            line, _, received = received.partition(b'\n')
            digits = line.removesuffix(b'\r')
            if len(line) >= MAX_LINE or not digits.isdigit() or not 1 <= int(digits) <= MAX_BYTES:
                log(f'{address[0]} port {address[1]}: bad request {line[:MAX_LINE]!r}', sys.stderr)
                return
            remaining = int(digits)
            log(f'Got request to send {remaining} bytes. Sending them all...')
            while remaining:  # one send does not send all
                remaining -= conn.send(BLOCK[:remaining])
    except OSError:  # reset, or timed out: this client only
        with contextlib.suppress(OSError):  # the client has gone
            conn.shutdown(socket.SHUT_WR)  # end of file; then RST: the kernel drops what is unsent
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    finally:
        conn.close()


def log(line, stream=sys.stdout):
    """Write *line* by one system call: fork would copy the buffer of print, os._exit drop it."""
    with contextlib.suppress(AttributeError, OSError):  # closed, or its reader has left
        os.write(stream.fileno(), os.fsencode(f'{line}\n'))


def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost', help='name or address (localhost)')
    parser.add_argument('-p', '--port', type=int, default=2000, help='port, 0: any free one (2000)')
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f'port {options.port} is not from 0 to 65535')
    return options


def listen(host, port):
    """Return a listening socket, or say why not and exit. SIGINT and SIGTERM end the process."""
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGCHLD:
        signal.signal(signum, signal.SIG_DFL)  # may be ignored: sh does that to background jobs
    try:
        # getaddrinfo may offer IPv4 and IPv6; AF_INET sorts first, so min() prefers IPv4.
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        log(f'{sys.argv[0]}: error: cannot listen on {host!r} port {port}: {error}', sys.stderr)
        sys.exit(2)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; see tcpcork_demo.py
    if hasattr(socket, 'TCP_NOTSENT_LOWAT'):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT)
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda signum, frame: os._exit(0))  # the kernel closes the sockets
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a parent hands down what it blocks
    log(f'Listening on port {listener.getsockname()[1]} ...')
    return listener


if __name__ == '__main__':
    main()
