#!/usr/bin/env python3
"""TCP preforked server, children call accept, metered.

Like server03.py, but each child also counts the connections that it accepts, in
memory that parent and children share. Ctrl-C prints the table.

Try:       python3 server03a.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
           and then Ctrl-C in the first terminal
Notice:    the counts add up exactly. With --select, and one client at a time
           (client.py -c 1 -t 200), nearly every child is woken for every
           connection, which only one of them can have: the herd.
See also:  server03.py (without the meters), server04.py (no herd by design).
"""
import argparse
import contextlib
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

STOP = {signal.SIGINT, signal.SIGTERM}
SIGNALS = STOP | {signal.SIGCHLD, signal.SIGALRM}
RETRY = 0.1               # seconds until accept is tried again after an error
COUNT_EVERY = 0.2         # seconds that a select lasts at most; then it counts its wake-ups

children = {}             # process ID -> number of the child, which its successor inherits


def main():
    options = parse_options()
    accepted = shared_counters(options.child_num)
    woken = shared_counters(options.child_num) if options.select else []
    with listen(options.host, options.port) as listener:
        listener.setblocking(not options.select)  # between select and accept, another may win
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they stay pending until sigwait
        fill_pool(listener, accepted, woken)
        while signal.sigwait(SIGNALS) not in STOP:
            reap()
            fill_pool(listener, accepted, woken)
    if woken:
        time.sleep(2 * COUNT_EVERY)  # kill, unlike Ctrl-C, leaves the children: let them count
    stop_children()
    print_table(accepted, woken)


def shared_counters(size):
    """Return *size* zeros, 64 bits each, in memory that children share instead of copying it."""
    return memoryview(mmap.mmap(-1, 8 * size)).cast('Q')  # Q: unsigned, 64 bits


def fill_pool(listener, accepted, woken):
    """Fork the children that are missing."""
    for number in sorted({*range(len(accepted))} - {*children.values()}):
        if signal.sigpending() & STOP:
            return
        try:
            pid = os.fork()
        except OSError as error:  # no process can be had
            log(f'cannot start a child: {error}', sys.stderr)
            signal.alarm(1)  # second; then SIGALRM ends the sigwait in main()
            return
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            log(f'Child started with PID: {os.getpid()}')
            serve(listener, accepted, woken, number)  # never returns
        children[pid] = number


def serve(listener, accepted, woken, number):
    """Serve one connection after another, for ever, and count them."""
    while True:
        try:
            if woken:
                wait_in_select(listener, woken, number)
            conn, address = listener.accept()
        except BlockingIOError:  # between select and accept, another child was quicker
            pass
        except OSError:  # out of descriptors: the client waits in the kernel's queue
            time.sleep(RETRY)
        else:
            accepted[number] += 1  # only this child writes here, so no count is lost
            handle(conn, address)


def wait_in_select(listener, woken, number):
    """Wait for a connection; count in *woken* how often this child has been woken meanwhile."""
    readable = []
    while not readable:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw  # how often it has gone to sleep
        readable, _, _ = select.select([listener], [], [], COUNT_EVERY)
        # Most wake-ups do not end select: another child was quicker, and this one sleeps again. So
        # count the sleeps; but if nothing came, the clock ended the last one.
        slept = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
        woken[number] += max(1, slept) if readable else max(0, slept - 1)


def reap():
    """Collect the children that have ended; each would stay a zombie."""
    while children and (pid := os.waitpid(-1, os.WNOHANG)[0]):
        children.pop(pid, None)


def stop_children():
    """Kill the children, which have nothing to save, and wait until they have ended."""
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # SIGTERM would not end one that is stopped
    for pid in children:
        os.waitpid(pid, 0)


def print_table(accepted, woken):
    """Print what each child has counted."""
    width = len(str(max([*accepted, *woken])))
    for number, times in enumerate(accepted):
        line = f'child {number:<{len(str(len(accepted) - 1))}} : {times:{width}} times'
        if woken:
            line += f', woken {woken[number]:{width}} times'
        if sys.stdout and not select.select([], [sys.stdout], [], 1)[1]:
            return  # stdout is a pipe that has been full, and not been read, for a second
        log(line)


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
    parser.add_argument('--select', action='store_true',
                        help='wait in select before accept, and count the wake-ups')
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
