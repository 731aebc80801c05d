#!/usr/bin/env python3
"""The load generator for every server of the collection.

Forks children; each makes one connection after another, asks for a number of
bytes, reads exactly as many and closes.

Try:       python3 server01.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    the last line; run it against the next server and compare.
See also:  server01.py to server08.py. It speaks to the servers of "Unix Network
           Programming", chapter 30, as well: the protocol is theirs.
"""
import argparse
import contextlib
import mmap
import os
import signal
import socket
import sys
import time

CHUNK = 64 * 1024         # bytes, the most to take at once
MAX_POOL = 10_000         # more would bring most machines down
TIMEOUT = 30              # seconds to wait for a byte; a pool full of idlers clears in 10
STOP = {signal.SIGINT, signal.SIGTERM}
SIGNALS = STOP | {signal.SIGCHLD}

children = {}             # process ID -> number of the child


def say(line, stream=sys.stdout):
    """Write *line* by one system call, so that others cannot split it and no buffer holds it.

    A buffer would be copied by fork and dropped by os._exit.
    """
    try:
        os.write(stream.fileno(), f'{line}\n'.encode(errors='surrogateescape'))
    except (AttributeError, OSError):  # closed, full, or its reader has left: go on in silence
        pass


def fetch(address, size):
    """Make one connection, ask for *size* bytes and read them; return the address in numbers.

    Raise EOFError if the server ends the reply early, OSError if the network fails.
    """
    with socket.create_connection(address, TIMEOUT) as conn:
        with contextlib.suppress(OSError):  # it has been reset already: the next call tells
            address = socket.getnameinfo(conn.getpeername(),
                                         socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        conn.sendall(b'%d\n' % size)
        remaining = size
        while remaining:  # one recv is not one reply
            data = conn.recv(min(remaining, CHUNK))
            if not data:
                raise EOFError(f'Server returned only {size - remaining} of {size} bytes')
            remaining -= len(data)
    return address


def run(number, options, served):
    """Do the work of one child; return its exit status."""
    address = options.host, options.port
    try:
        for _ in range(options.con_num):
            address = fetch(address, options.bytes)  # the name is looked up only once
            served[number] += 1
    except (OSError, EOFError, UnicodeError) as error:  # UnicodeError: no name looks like this
        say(f'Child {number}: {getattr(error, "strerror", None) or error}', sys.stderr)
        return 1
    say(f'Child {number} is done')
    return 0


def start_child(number, options, served):
    """Fork a child; raise OSError if there can be none."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            status = run(number, options, served)
        except Exception:
            sys.excepthook(*sys.exc_info())  # os._exit would swallow the traceback
        finally:
            os._exit(status)  # whatever happens: no child may return into its parent's loop
    children[pid] = number


def reap():
    """Collect the children that have ended; return how many of them failed."""
    failed = 0
    with contextlib.suppress(ChildProcessError):  # there are no more
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            number = children.pop(pid, None)
            if number is not None and status:
                failed += 1
                if os.WIFSIGNALED(status):  # it could not speak for itself
                    say(f'Child {number}: killed by signal {os.WTERMSIG(status)}', sys.stderr)
    return failed


def stop_children():
    """Kill the children and wait until they are gone.

    They have nothing to save, and only SIGKILL ends one that somebody has stopped.
    """
    for pid in list(children):  # a copy: in server01.py a handler may change it
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


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


def positive_number(text):
    """Return *text* as a number from 1 up; argparse reports a ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost',
                        help='name or address of the server (default: %(default)s)')
    parser.add_argument('-p', '--port', type=port_number, default=2000,
                        help='port of the server (default: %(default)s)')
    parser.add_argument('-c', '--child-num', type=pool_size, default=5,
                        help='number of children (default: %(default)s)')
    parser.add_argument('-t', '--con-num', type=positive_number, default=500,
                        help='connections that each child makes (default: %(default)s)')
    parser.add_argument('-b', '--bytes', type=positive_number, default=3000,
                        help='bytes to ask for on each connection (default: %(default)s)')
    return parser.parse_args()


def main():
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until sigwait takes them: no race
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    served = memoryview(mmap.mmap(-1, 8 * options.child_num)).cast('Q')  # each child has its own
    failed = 0
    start = time.perf_counter()
    for number in range(options.child_num):
        if signal.sigpending() & STOP:
            break
        try:
            start_child(number, options, served)
        except OSError as error:
            say(f'Child {number}: {error.strerror}', sys.stderr)
            failed += 1
    while children or signal.sigpending() & STOP:
        if signal.sigwait(SIGNALS) in STOP:
            stop_children()
            failed += 1
            break
        failed += reap()
    seconds = time.perf_counter() - start
    say(f'{sum(served)} connections, {sum(served) * options.bytes} bytes in {seconds:.2f} seconds:'
        f' {sum(served) / seconds:.0f} connections per second')
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
