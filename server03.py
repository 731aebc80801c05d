#!/usr/bin/env python3
"""TCP preforked server, children call accept.

The parent forks a pool of children once, before any client comes. All of them
block in accept on the one listening socket; the kernel hands each connection
to one of them. The parent only watches over the pool.

Try:       python3 server03.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    kill -9 a child: another takes its place, and no other client sees it.
See also:  server03a.py (the same, counting), server04.py (the parent accepts
           and passes the connection on), server08.py (a pool of threads).
"""
import argparse
import contextlib
import os
import signal
import socket
import sys
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
SIGNALS = STOP | {signal.SIGCHLD, signal.SIGALRM}

children = set()          # process IDs


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


def start_child(listener):
    """Fork a child that serves until it is killed; raise OSError if there can be none."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            say(f'Child started with PID: {os.getpid()}')
            serve(listener)
        except Exception:
            sys.excepthook(*sys.exc_info())  # os._exit would swallow the traceback
        finally:
            os._exit(1)  # whatever happens: no child may return into its parent's loop
    children.add(pid)


def reap():
    """Collect the children that have ended; each would stay a zombie."""
    with contextlib.suppress(ChildProcessError):  # there are no more
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            children.discard(pid)


def stop_children():
    """Kill the children and wait until they are gone.

    They have nothing to save, and only SIGKILL ends one that somebody has stopped.
    """
    for pid in list(children):  # a copy: in server01.py a handler may change it
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main():
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until sigwait takes them: no race
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # SIGINT is ignored in a background job of sh
    with listen(options.host, options.port) as listener:
        signum = None
        while signum not in STOP:
            reap()
            try:
                while len(children) < options.child_num and not signal.sigpending() & STOP:
                    start_child(listener)
            except OSError as error:
                say(f'cannot start a child: {error}', sys.stderr)
                signal.alarm(1)  # second; then SIGALRM has us try again
            signum = signal.sigwait(SIGNALS)
    stop_children()


if __name__ == '__main__':
    main()
