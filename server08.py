#!/usr/bin/env python3
"""TCP prethreaded server, threads call accept.

The main thread starts a pool of threads once, before any client comes. All of
them block in accept on the one listening socket; the kernel hands each
connection to one of them. The main thread only waits for the end.

Try:       python3 server08.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    one process, many threads: ps -L -p $(pgrep -f 'python3 server08').
See also:  server03.py (a pool of processes), server05.py (a thread per client).
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
MAX_POOL = 10_000         # more would bring most machines down
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes that recv takes at once; closing with some unread sends RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
RETRY = 0.1               # seconds until accept is tried again after an error
STOP = {signal.SIGINT, signal.SIGTERM}
SIGNALS = STOP | {signal.SIGALRM}

threads = []


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


def pool_size(text):
    """Return *text* as a number from 1 to MAX_POOL; argparse reports a ValueError."""
    if not 1 <= int(text) <= MAX_POOL:
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
    parser.add_argument('-n', '--child-num', type=pool_size, default=10,
                        help='size of the pool (default: %(default)s)')
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
        except OSError:
            time.sleep(RETRY)


def serve(listener):
    """Serve one connection after another, for ever."""
    while True:
        with accept(listener) as conn:
            handle(conn)


def start_thread(listener):
    """Start a thread that serves for ever; raise an error if there can be none."""
    thread = threading.Thread(target=serve, args=(listener,), daemon=True)
    thread.start()
    threads.append(thread)
    say(f'Thread started with TID: {thread.native_id}')


def main():
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until sigwait takes them: no race
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # SIGINT is ignored in a background job of sh
    with listen(options.host, options.port) as listener:
        signum = None
        while signum not in STOP:
            try:
                while len(threads) < options.child_num and not signal.sigpending() & STOP:
                    start_thread(listener)
            except (RuntimeError, MemoryError) as error:
                say(f'cannot start a thread: {error!r}', sys.stderr)
                signal.alarm(1)  # second; then SIGALRM has us try again
            signum = signal.sigwait(SIGNALS)
        os._exit(0)  # and with the process all its threads, whatever they are doing


if __name__ == '__main__':
    main()
