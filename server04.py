#!/usr/bin/env python3
"""TCP preforked server, the parent passes each connection to a child.

The parent alone accepts. It hands the descriptor of each connection through a
Unix socket (SCM_RIGHTS, see unix(7)) to a child that it knows to be idle.

Try:       python3 server04.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    no child waits on the listener: no herd, but two messages per client.
See also:  server03.py (the children accept for themselves).
"""
import argparse
import contextlib
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

STOP = {signal.SIGINT, signal.SIGTERM}
TICK = 0.1                # seconds; the main loop checks for signals at least this often
children = {}             # process ID -> channel: our end of a pair of Unix sockets
idle = []                 # process IDs of those that wait for a connection, longest first
poller = select.poll()    # watches the channels, and the listener while a child is idle


def main():
    options = parse_options()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each child takes a descriptor
    with listen(options.host, options.port) as listener:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # from now on they stay pending
        listener.setblocking(False)
        next_try = 0
        while not signal.sigpending() & STOP:
            if time.monotonic() >= next_try:
                next_try = fill_pool(listener, options.child_num)
            poller.register(listener, select.POLLIN if idle else 0)  # if none: clients queue up
            ready = dict(poller.poll(TICK * 1000))  # milliseconds
            for pid in [pid for pid in children if children[pid].fileno() in ready]:
                read_channel(pid)
            if idle and listener.fileno() in ready:
                pass_connection(listener)
    stop_children()
    os._exit(0)  # and leave it to the kernel to close the channels


def fill_pool(listener, size):
    """Fork the children that are missing; return the time before which not to try again."""
    while len(children) < size and not signal.sigpending() & STOP:
        pair = ()
        try:
            pair = ours, theirs = socket.socketpair()  # closing theirs keeps one spare for accept
            pid = os.fork()
        except OSError as error:  # no process or no descriptors can be had
            for channel in pair:
                channel.close()
            log(f'cannot start a child: {error}', sys.stderr)
            return time.monotonic() + 1  # second
        if pid == 0:
            for inherited in [listener, ours, *children.values()]:
                inherited.close()  # end of file comes only when the last copy is closed
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
            log(f'Child started with PID: {os.getpid()}')
            serve(theirs)
            os._exit(0)  # a child must not return into its parent's loop
        theirs.close()  # so that end of file in ours means: this child is dead
        children[pid] = ours
        poller.register(ours, select.POLLIN)
    return 0


def serve(channel):
    """Serve one connection after another out of *channel*, until the parent has gone."""
    with contextlib.suppress(ConnectionError):  # send fails when it has gone
        while True:
            channel.send(b'.')  # idle
            message, descriptors, _, _ = socket.recv_fds(channel, 100, 1)  # bytes, descriptors
            for descriptor in descriptors:  # none, if this process is out of them
                handle(socket.socket(fileno=descriptor), message.decode().split())


def read_channel(pid):
    """Read what a child has sent: a byte means that it is idle, end of file that it is dead."""
    with contextlib.suppress(ConnectionError):  # dead, too: it has left a message unread
        if children[pid].recv(1):
            idle.append(pid)
            return
    if pid in idle:
        idle.remove(pid)
    poller.unregister(children[pid])
    children.pop(pid).close()
    os.waitpid(pid, 0)


def pass_connection(listener):
    """Accept a connection and pass it to the child that has been idle longest."""
    try:
        conn, address = listener.accept()
    except OSError:  # out of descriptors: the client waits in the kernel's queue
        time.sleep(TICK)
        return
    with conn:  # the child gets its own copy
        message = f'{address[0]} {address[1]}'.encode()  # no descriptor travels alone: unix(7)
        for pid in idle:
            with contextlib.suppress(OSError):  # it has just died: the next one, then
                socket.send_fds(children[pid], [message], [conn.fileno()])
                idle.remove(pid)
                return
    log(f'{address[0]} port {address[1]}: cannot be passed to a child', sys.stderr)


def stop_children():
    """Kill the children, which have nothing to save, and wait until they have ended."""
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # SIGTERM would not end one that is stopped
    for pid in children:
        os.waitpid(pid, 0)


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
