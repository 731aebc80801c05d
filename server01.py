#!/usr/bin/env python3
"""TCP concurrent server, one child process per client.

The parent accepts. For every connection it forks a child, which serves that
one client and exits.

Try:       python3 server01.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    every connection pays for a fork; the child costs more than its work.
See also:  server05.py (a thread instead of a process), server03.py (the
           children are forked before the clients come).
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
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes that recv takes at once; closing with some unread sends RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
RETRY = 0.1               # seconds until accept is tried again after an error
TICK = 0.5                # seconds; no wait of the parent is longer: it hears signals by then
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}

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


def start_child(listener, conn):
    """Fork a child that serves *conn* and exits; raise OSError if there can be none."""
    pid = os.fork()
    if pid == 0:
        try:
            children.clear()  # they are the parent's: stop() must not kill them from here
            listener.close()  # or the port stays taken for as long as this child lives
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            handle(conn)
        except Exception:
            sys.excepthook(*sys.exc_info())  # os._exit would swallow the traceback
        finally:
            os._exit(0)  # whatever happens: no child may return into its parent's loop
    children.add(pid)


def reap(signum, frame):
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


def stop(signum, frame):
    """Leave no child behind and exit."""
    stop_children()
    os._exit(0)


def main():
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, stop)  # even if ignored, as in a background job of sh
    signal.signal(signal.SIGTERM, stop)
    listener = listen(options.host, options.port)
    listener.settimeout(TICK)
    while True:
        # Signals are let in only while we wait, and so never between a fork and its bookkeeping.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        conn = accept(listener)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with conn:  # the child has its own copy; with two, the client would not see the end
            try:
                start_child(listener, conn)
            except OSError as error:
                say(f'cannot start a child: {error}', sys.stderr)


if __name__ == '__main__':
    main()
