#!/usr/bin/env python3
"""TCP prethreaded server, threads call accept.

The main thread starts a pool of threads before any client comes. All of them
block in accept on one listening socket; the kernel gives each connection to one.

Try:       python3 server08.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    one process, many threads: ps -L -p $(pgrep -f 'python3 server08').
See also:  server03.py (a pool of processes), server05.py (a thread per client).
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
SIGNALS = STOP | {signal.SIGALRM}
RETRY = 0.1               # seconds until accept is tried again after an error


def main():
    options = parse_options()
    with listen(options.host, options.port) as listener:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they stay pending until sigwait
        fill_pool(listener, options.child_num)
        while signal.sigwait(SIGNALS) not in STOP:
            fill_pool(listener, options.child_num)
        os._exit(0)  # this ends all threads, too, whatever they are doing


def fill_pool(listener, size):
    """Start the threads that are missing."""
    while threading.active_count() - 1 < size and not signal.sigpending() & STOP:
        try:
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:  # no thread can be had
            log(f'cannot start a thread: {error!r}', sys.stderr)
            signal.alarm(1)  # second; then SIGALRM ends the sigwait in main()
            return


def serve(listener):
    """Serve one connection after another, for ever."""
    log(f'Thread started with TID: {threading.get_native_id()}')
    while True:
        try:
            handle(*listener.accept())
        except OSError:  # out of descriptors: the client waits in the kernel's queue
            time.sleep(RETRY)


# The service: the same in every server; read it once, in server01.py.

BLOCK = b'x' * 64 * 1024  # replies are sent from this block, however long they are
MAX_BYTES = 2 ** 30       # bytes that one request may ask for
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes; more than a line, as closing with some unread would send RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
MAX_POOL = 10_000         # more would bring most machines down
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
    parser.add_argument('-n', '--child-num', type=int, default=10, help='size of the pool (10)')
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f'port {options.port} is not from 0 to 65535')
    if not 1 <= options.child_num <= MAX_POOL:
        parser.error(f'a pool of {options.child_num} is not from 1 to {MAX_POOL}')
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
