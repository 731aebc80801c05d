#!/usr/bin/env python3
"""The load generator for every server of the collection.

Forks children; each makes one connection after another, asks for a number of
bytes, reads exactly as many and closes.

Try:       python3 server01.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    the last line; run it against the next server and compare.
See also:  server01.py to server08.py. The protocol is that of "UNIX Network
           Programming", chapter 30; this client works with its servers, too.
"""
import argparse
import contextlib
import mmap
import os
import signal
import socket
import sys
import time

STOP = {signal.SIGINT, signal.SIGTERM}
SIGNALS = STOP | {signal.SIGCHLD}
RECV_SIZE = 64 * 1024     # bytes, the most to take at once
MAX_POOL = 10_000         # more would bring most machines down
TIMEOUT = 30              # seconds to wait for a byte; the servers close silent clients after 10

children = {}             # process ID -> number of the child


def main():
    options = parse_options()
    served = memoryview(mmap.mmap(-1, 8 * options.child_num)).cast('Q')  # shared; one for each
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they stay pending until sigwait
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # may be ignored: sh does that to background jobs
    start = time.perf_counter()
    for number in range(options.child_num):
        start_child(number, options, served)
    while children and signal.sigwait(SIGNALS) not in STOP:
        reap()
    stop_children()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)  # if stdout is full, a second signal ends us
    seconds = time.perf_counter() - start
    done = sum(served)
    log(f'{done} connections, {done * options.bytes} bytes in {seconds:.2f} seconds:'
        f' {done / seconds:.0f} connections per second')
    sys.exit(0 if done == options.child_num * options.con_num else 1)


def start_child(number, options, served):
    """Fork a child that does its share of the work and exits."""
    if signal.sigpending() & STOP:
        return
    try:
        pid = os.fork()
    except OSError as error:  # no process can be had: this child only
        log(f'Child {number}: {error.strerror}', sys.stderr)
        return
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        run(number, options, served)
        os._exit(0)  # a child must not return into its parent's loop
    children[pid] = number


def run(number, options, served):
    """Make the connections of one child, and count in *served* those that succeed."""
    try:
        # getaddrinfo may offer IPv4 and IPv6; AF_INET sorts first, so min() prefers IPv4.
        family, *_, address = min(socket.getaddrinfo(options.host, options.port,
                                                     type=socket.SOCK_STREAM))
        for _ in range(options.con_num):
            fetch(family, address, options.bytes)
            served[number] += 1  # only this child writes here, so no count is lost
    except (OSError, EOFError, UnicodeError) as error:  # UnicodeError: not a possible host name
        log(f'Child {number}: {getattr(error, "strerror", None) or error}', sys.stderr)
    else:
        log(f'Child {number} is done')


def fetch(family, address, size):
    """Make one connection and read *size* bytes; raise EOFError if the server sends fewer."""
    with socket.socket(family) as conn:
        conn.settimeout(TIMEOUT)
        conn.connect(address)
        conn.sendall(b'%d\n' % size)
        remaining = size
        while remaining:  # one recv is not one reply
            data = conn.recv(min(remaining, RECV_SIZE))
            if not data:
                raise EOFError(f'Server returned only {size - remaining} of {size} bytes')
            remaining -= len(data)


def reap():
    """Collect the children that have ended; report one that a signal has killed."""
    while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        pid, status = ended
        number = children.pop(pid, None)
        if number is not None and os.WIFSIGNALED(status):  # it could not report that itself
            log(f'Child {number}: killed by signal {os.WTERMSIG(status)}', sys.stderr)


def stop_children():
    """Kill the children, which have nothing to save, and wait until they have ended."""
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # SIGTERM would not end one that is stopped
    for pid in children:
        os.waitpid(pid, 0)


# The rest: output and options.

def log(line, stream=sys.stdout):
    """Write *line* by one system call: fork would copy the buffer of print, os._exit drop it."""
    with contextlib.suppress(AttributeError, OSError):  # closed, or its reader has left
        os.write(stream.fileno(), os.fsencode(f'{line}\n'))


def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost', help='name or address (localhost)')
    parser.add_argument('-p', '--port', type=int, default=2000, help='port of the server (2000)')
    parser.add_argument('-c', '--child-num', type=int, default=5, help='number of children (5)')
    parser.add_argument('-t', '--con-num', type=int, default=500,
                        help='connections that each child makes, one by one (500)')
    parser.add_argument('-b', '--bytes', type=int, default=3000,
                        help='bytes to ask for on each connection (3000)')
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f'port {options.port} is not from 0 to 65535')
    if not 1 <= options.child_num <= MAX_POOL:
        parser.error(f'{options.child_num} children are not from 1 to {MAX_POOL}')
    if options.con_num < 1 or options.bytes < 1:
        parser.error(f'{options.con_num} connections of {options.bytes} bytes are too few')
    return options


if __name__ == '__main__':
    main()
