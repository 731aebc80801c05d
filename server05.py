#!/usr/bin/env python3
"""TCP concurrent server, one thread per client.

The main thread accepts. For every connection it starts a thread, which serves
that one client and ends.

Try:       python3 server05.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    a thread starts several times faster than a process, but all threads
           share one lock (the GIL), one table of descriptors and one fate.
See also:  server01.py (a process instead of a thread), server08.py (the threads
           are started before the clients come).
"""
import argparse
import os
import signal
import socket
import sys
import threading
import time

BACKLOG = 1024            # connections; a 5, as in old books, overflows under 15 clients, and
                          # each one dropped tries again only after a second
BLOCK = b'x' * 64 * 1024  # every reply is sent out of this one, whatever its size
MAX_BYTES = 2 ** 30       # bytes that one request may ask for
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes that recv takes at once; closing with some unread sends RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
RETRY = 0.1               # seconds until accept is tried again after an error
TICK = 0.5                # seconds; no wait of main() is longer: it hears signals by then
MAX_THREADS = 1000        # the clients beyond wait in the kernel's queue
STACK = 256 * 1024        # bytes for each thread: plenty here, and the default is 8 MiB

slots = threading.Semaphore(MAX_THREADS)


def say(line, stream=sys.stdout):
    """Write *line* by one system call, so that others cannot split it and no buffer holds it.

    A buffer would be copied by fork and dropped by os._exit.
    """
    try:
        os.write(stream.fileno(), f'{line}\n'.encode(errors='surrogateescape'))
    except (AttributeError, OSError):  # closed, full, or its reader has left: go on in silence
        pass


def parse_request(line):
    """Return the number of bytes that *line* asks for; raise ValueError if it is no request."""
    digits = line.removesuffix(b'\r')
    if len(line) >= MAX_LINE or not digits.isdigit() or not 1 <= int(digits) <= MAX_BYTES:
        raise ValueError(f'bad request {line[:MAX_LINE]!r}')
    return int(digits)


def handle(conn):
    """Serve one request after another on *conn*, until the client closes it."""
    try:
        host, port = conn.getpeername()[:2]
        conn.settimeout(TIMEOUT)
        received = b''
        while True:
            while b'\n' not in received and len(received) < MAX_LINE:  # one recv is not one line
                data = conn.recv(RECV_SIZE)
                if not data:  # end of file: it ends a last line, too
                    break
                received += data
            if not received:
                return
            line, _, received = received.partition(b'\n')
            remaining = parse_request(line)
            say(f'Got request to send {remaining} bytes. Sending them all...')
            while remaining:  # one send does not send all
                remaining -= conn.send(BLOCK[:remaining])
    except ValueError as error:
        say(f'{host} port {port}: {error}', sys.stderr)
    except OSError:  # the client has reset the connection or let the time run out
        pass


def port_number(text):
    """Return *text* as a number from 0 to 65535; argparse reports a ValueError."""
    if not 0 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


def parse_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost',
                        help='name or address to listen on (default: %(default)s)')
    parser.add_argument('-p', '--port', type=port_number, default=2000,
                        help='port to listen on, 0 for any free one (default: %(default)s)')
    return parser.parse_args()


def listen(host, port):
    """Return a listening socket; without one, say why and exit with status 2."""
    try:
        # The least is IPv4, if the name has both.
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name looks like this
        say(f'{sys.argv[0]}: error: cannot listen on {host!r} port {port}: {error}', sys.stderr)
        sys.exit(2)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    say(f'Listening on port {listener.getsockname()[1]} ...')
    return listener


def accept(listener):
    """Return the next connection. Out of descriptors, leave it in the kernel's queue a while."""
    while True:
        try:
            return listener.accept()[0]
        except socket.timeout:  # time to hear a signal that came just before the wait
            pass
        except OSError:
            time.sleep(RETRY)


def serve(conn):
    """Serve the one connection of this thread."""
    try:
        with conn:
            handle(conn)
    finally:
        slots.release()


def start_thread(conn):
    """Start a thread that serves *conn* and ends; raise an error if there can be none."""
    threading.Thread(target=serve, args=(conn,), daemon=True).start()


def stop(signum, frame):
    """Exit at once; the kernel closes every connection."""
    os._exit(0)


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, stop)  # even if ignored, as in a background job of sh
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # even if blocked
    threading.stack_size(STACK)
    listener = listen(options.host, options.port)
    listener.settimeout(TICK)
    while True:
        while not slots.acquire(timeout=TICK):
            pass
        conn = accept(listener)
        try:
            start_thread(conn)
        except (RuntimeError, MemoryError) as error:
            say(f'cannot start a thread: {error!r}', sys.stderr)
            conn.close()
            slots.release()


if __name__ == '__main__':
    main()
