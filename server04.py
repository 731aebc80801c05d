#!/usr/bin/env python3
"""TCP preforked server, the parent passes each connection to a child.

The parent alone accepts. It hands the descriptor of each connection through a
Unix socket (SCM_RIGHTS, see unix(7)) to a child that it knows to be idle.

Try:       python3 server04.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    no child ever waits on the listener, so no herd can form; the price is
           two messages for each connection.
See also:  server03.py (the children accept for themselves).
"""
import argparse
import contextlib
import os
import select
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
TICK = 0.5                # seconds; no wait of the parent is longer: it hears signals by then
SIGNALS = {signal.SIGINT, signal.SIGTERM}

children = {}             # process ID -> channel: our end of the socket pair that we share
idle = []                 # process IDs of the children without a connection, longest idle first
poller = select.poll()    # watches the channels, and the listener while a child is idle


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


def serve(channel):
    """Serve one connection after another out of *channel*, until the parent has gone."""
    with contextlib.suppress(ConnectionError):  # it has gone while we were busy
        while True:
            message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            if not message:
                return
            for descriptor in descriptors:  # there is none if we had no room for it
                with socket.socket(fileno=descriptor) as conn:
                    handle(conn)
            channel.send(b'.')  # idle again


def start_child(*unneeded):
    """Fork a child that serves until it is killed; raise OSError if there can be none.

    It closes the *unneeded* sockets, which are its parent's business.
    """
    with socket.socket():  # fail rather than take the last descriptor: a connection needs it
        ours, theirs = socket.socketpair()
    with theirs:  # closed in the parent, so that end of file in ours means: this child is dead
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            try:
                for inherited in [*unneeded, ours, *children.values()]:
                    inherited.close()  # as long as one copy is open, nobody sees the end
                children.clear()  # they are the parent's: stop() must not kill them from here
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                say(f'Child started with PID: {os.getpid()}')
                serve(theirs)
            except Exception:
                sys.excepthook(*sys.exc_info())  # os._exit would swallow the traceback
            finally:
                os._exit(1)  # whatever happens: no child may return into its parent's loop
    children[pid] = ours
    idle.append(pid)
    poller.register(ours, select.POLLIN)


def listen_to(pid):
    """Hear from a child: a byte says that it is idle again, end of file that it is dead."""
    channel = children[pid]
    try:
        message = channel.recv(1)
    except ConnectionError:  # it died before it took the connection that was on its way
        message = b''
    if message:
        idle.append(pid)
        return
    poller.unregister(channel)
    channel.close()
    del children[pid]
    if pid in idle:
        idle.remove(pid)
    with contextlib.suppress(ChildProcessError):  # whoever started us has SIGCHLD ignored
        os.waitpid(pid, 0)


def pass_connection(conn, listener):
    """Give *conn* to the child that has been idle longest; raise OSError if there can be none."""
    while True:
        if not idle:  # those that were have just died
            start_child(listener, conn)
        with contextlib.suppress(ConnectionError):
            # No descriptor travels alone: at least one byte goes with it, see unix(7).
            socket.send_fds(children[idle[0]], [b'.'], [conn.fileno()])
            idle.pop(0)
            return
        idle.pop(0)  # it has just died: the next one, then


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
    signal.signal(signal.SIGINT, stop)  # even if ignored, as in a background job of sh
    signal.signal(signal.SIGTERM, stop)
    listener = listen(options.host, options.port)
    try_again = 0  # not before this time, if the pool could not be filled
    while True:
        try:
            while (len(children) < options.child_num and time.monotonic() >= try_again
                   and not signal.sigpending() & SIGNALS):
                start_child(listener)
        except OSError as error:
            say(f'cannot start a child: {error}', sys.stderr)
            try_again = time.monotonic() + 1
        poller.register(listener, select.POLLIN if idle else 0)  # else leave them in its queue
        # Signals are let in only while we wait, and so never between a fork and its bookkeeping.
        # (sigwait, as in server03.py, would not do: connections and children are waited for, too.)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        ready = dict(poller.poll(TICK * 1000))  # milliseconds
        conn = accept(listener) if listener.fileno() in ready else None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for pid, channel in [*children.items()]:
            if channel.fileno() in ready:
                listen_to(pid)
        if conn:
            with conn:  # the child gets its own copy; with two, the client would not see the end
                try:
                    pass_connection(conn, listener)
                except OSError as error:
                    say(f'cannot pass a connection on: {error}', sys.stderr)


if __name__ == '__main__':
    main()
