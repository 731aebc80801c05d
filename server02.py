#!/usr/bin/env python3
"""TCP concurrent server, I/O multiplexing with select.

One process: each connection that is ready takes a step, and never waits in it.

Try:       python3 server02.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    one slow client does not delay the others; but select cannot watch a
           descriptor of 1024 or more, and gets the whole list at every call.
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
import struct
import sys
import time

READ, WRITE, NOTHING = 'read', 'write', 'nothing'
readers, writers = set(), set()
FD_SETSIZE = 1024         # what select can watch: descriptors below this
TICK = 0.1                # seconds; no wait is longer

clients = collections.OrderedDict()  # descriptor -> (generator, what it waits for, deadline)


def main():
    options = parse_options()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # So accept fails, by EMFILE, before there is a descriptor that select refuses.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FD_SETSIZE), hard))
    listener = listen(options.host, options.port)
    listener.setblocking(False)
    register(listener.fileno(), READ)
    full = next_try = 0  # clients when the descriptors ran out; when to try again in any case
    while True:
        now = time.monotonic()  # before the wait, or the wait would count as silence
        if len(clients) < full or now >= next_try:  # there may be descriptors again
            modify(listener.fileno(), READ)
            full, next_try = 0, now + TICK
        for descriptor in wait():
            if descriptor == listener.fileno():
                full = accept_clients(listener)
            else:
                resume(descriptor)
        close_silent(now)


def modify(descriptor, wanted=NOTHING):
    """From now on, wait until *descriptor* is ready to READ or to WRITE, or for NOTHING."""
    readers.discard(descriptor)
    writers.discard(descriptor)
    if wanted == READ:
        readers.add(descriptor)
    elif wanted == WRITE:
        writers.add(descriptor)


register = unregister = modify  # the names of the methods of poll and epoll


def wait():
    """Return the descriptors that are ready; after TICK seconds without any, an empty list."""
    readable, writable, _ = select.select(readers, writers, [], TICK)
    return readable + writable


def accept_clients(listener):
    """Accept every client in the queue; return how many we have if there can be no more, else 0."""
    try:
        for _ in range(BACKLOG):
            conn, address = listener.accept()
            conn.setblocking(False)
            service = handle(conn, address)
            register(conn.fileno(), READ)
            clients[conn.fileno()] = service, next(service), time.monotonic() + TIMEOUT
    except BlockingIOError:  # the queue is empty
        pass
    except OSError:  # out of descriptors: the others wait in the queue until a client leaves
        modify(listener.fileno(), NOTHING)
        return len(clients)
    return 0


def resume(descriptor):
    """Run one step of a client that is ready: up to the next yield of handle(), or to its end."""
    service, waited_for, _ = clients.pop(descriptor)
    wanted = next(service, None)
    if wanted is None:  # it has returned, and closed the connection
        unregister(descriptor)
        return
    if wanted != waited_for:
        modify(descriptor, wanted)
    clients[descriptor] = service, wanted, time.monotonic() + TIMEOUT  # goes to the end


def close_silent(now):
    """Close the clients whose time is up."""
    while clients:
        descriptor, (service, _, deadline) = next(iter(clients.items()))
        if deadline > now:
            return  # and those of the others are later
        del clients[descriptor]
        service.close()  # ends handle() at its yield
        unregister(descriptor)


# The service: the same in every server; read it once, in server01.py.

BLOCK = b'x' * 64 * 1024  # replies are sent from this block, however long they are
MAX_BYTES = 2 ** 30       # bytes that one request may ask for
MAX_LINE = 32             # bytes that one request may take up
RECV_SIZE = 1024          # bytes; more than a line, as closing with some unread would send RST
TIMEOUT = 10              # seconds that a client may be silent, or stop reading
BACKLOG = 1024            # clients not yet accepted; the 5 of old books stalls some of 15 for 1 s
MAX_UNSENT = 128 * 1024   # bytes the kernel takes ahead; more would hide that a client reads


def handle(conn, address):
    """Serve requests on *conn* until the client closes it; yield READ or WRITE rather than wait."""
    received = b''
    try:
        while True:
            while b'\n' not in received and len(received) < MAX_LINE:  # one recv is not one line
                yield READ
                with contextlib.suppress(BlockingIOError):  # not ready after all: select(2), BUGS
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
                with contextlib.suppress(BlockingIOError):  # there is no room just now
                    remaining -= conn.send(BLOCK[:remaining])
                if remaining or received:
                    yield WRITE  # even if there is room: first the others have their turn
    except (OSError, GeneratorExit):  # reset, or closed for its silence: this client only
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
