#!/usr/bin/env python3
"""TCP concurrent server, I/O multiplexing with select.

One process, no threads: select tells which of all the connections are ready,
and each of those may go on until it would have to wait.

Try:       python3 server02.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    one slow client delays nobody; but select cannot watch a descriptor
           of 1024 or more, and is told the whole list at every call.
See also:  server06.py (poll: no such limit), server07.py (epoll: no such list).
"""
import argparse
import collections
import contextlib
import os
import resource
import select
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
TICK = 0.5                # seconds; no wait is longer: signals and silence are noticed by then
FD_SETSIZE = 1024         # what select can watch: descriptors below this

clients = collections.OrderedDict()  # descriptor -> Client, the one quiet longest first


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
    """Serve one request after another on *conn*, until the client closes it.

    A generator: it yields READ or WRITE whenever it has to wait until it can.
    """
    try:
        host, port = conn.getpeername()[:2]
        received = b''
        while True:
            while b'\n' not in received and len(received) < MAX_LINE:  # one recv is not one line
                yield READ
                try:
                    data = conn.recv(RECV_SIZE)
                except BlockingIOError:  # it was not ready, after all: see select(2), BUGS
                    continue
                if not data:  # end of file: it ends a last line, too
                    break
                received += data
            if not received:
                return
            line, _, received = received.partition(b'\n')
            remaining = parse_request(line)
            say(f'Got request to send {remaining} bytes. Sending them all...')
            while remaining:  # one send does not send all
                with contextlib.suppress(BlockingIOError):  # there is no room just now
                    remaining -= conn.send(BLOCK[:remaining])
                if remaining:
                    yield WRITE  # even if there is room: the others have their turn first
    except ValueError as error:
        say(f'{host} port {port}: {error}', sys.stderr)
    except OSError:  # the client has reset the connection
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


class Client:
    """A connection, the generator that serves it, what that waits for, and until when."""

    def __init__(self, conn):
        self.conn = conn
        self.service = handle(conn)
        self.wanted = READ
        self.deadline = 0


READ, WRITE, NOTHING = 'read', 'write', 'nothing'
readers, writers = set(), set()


def modify(descriptor, wanted):
    """From now on, wait until *descriptor* is ready to READ or to WRITE, or for NOTHING."""
    readers.discard(descriptor)
    writers.discard(descriptor)
    if wanted == READ:
        readers.add(descriptor)
    elif wanted == WRITE:
        writers.add(descriptor)


register = modify


def unregister(descriptor):
    """Forget *descriptor*."""
    modify(descriptor, NOTHING)


def wait():
    """Return the descriptors that are ready; after TICK seconds without any, an empty list."""
    readable, writable, _ = select.select(readers, writers, [], TICK)
    return readable + writable


def accept_all(listener):
    """Accept every connection in the kernel's queue, as far as the descriptors go."""
    try:
        for _ in range(BACKLOG):
            conn = listener.accept()[0]
            conn.setblocking(False)
            register(conn.fileno(), READ)
            clients[conn.fileno()] = Client(conn)
            go_on(conn.fileno(), listener)
    except BlockingIOError:  # the queue is empty
        pass
    except OSError:  # out of descriptors or memory: leave the rest there until a client leaves
        modify(listener.fileno(), NOTHING)


def go_on(descriptor, listener):
    """Let the client that is ready go on until it has to wait again, or leaves."""
    client = clients[descriptor]
    wanted = next(client.service, None)
    if wanted is None:
        leave(descriptor, listener)
        return
    if wanted != client.wanted:
        modify(descriptor, wanted)
        client.wanted = wanted
    client.deadline = time.monotonic() + TIMEOUT
    clients.move_to_end(descriptor)


def leave(descriptor, listener):
    """Close a connection; its descriptor is free for the next one."""
    unregister(descriptor)
    clients.pop(descriptor).conn.close()
    modify(listener.fileno(), READ)


def stop(signum, frame):
    """Exit at once; the kernel closes every connection."""
    os._exit(0)


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, stop)  # even if ignored, as in a background job of sh
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # even if blocked
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # With these, accept fails, by EMFILE, before select meets a descriptor that it refuses.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FD_SETSIZE), hard))
    listener = listen(options.host, options.port)
    listener.setblocking(False)
    register(listener.fileno(), READ)
    look_again = 0
    while True:
        now = time.monotonic()  # before the wait: whoever has spoken since then is not silent
        if now >= look_again:  # it may be other processes that have made room
            modify(listener.fileno(), READ)
            look_again = now + TICK
        for descriptor in wait():
            if descriptor == listener.fileno():
                accept_all(listener)
            else:
                go_on(descriptor, listener)
        while clients:
            descriptor, client = next(iter(clients.items()))
            if client.deadline > now:
                break  # and the others are still later
            leave(descriptor, listener)


if __name__ == '__main__':
    main()
