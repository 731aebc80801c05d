#!/usr/bin/env python3
"""TCP preforked server, children call accept, metered.

server03.py, which also counts the connections that each child has accepted,
in memory that parent and children share. Ctrl-C prints the table.

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
COUNT_EVERY = 0.2         # seconds; no select is longer, so wake-ups in vain are counted by then
STOP = {signal.SIGINT, signal.SIGTERM}
SIGNALS = STOP | {signal.SIGCHLD, signal.SIGALRM}

children = {}             # process ID -> number of the child, which its successor inherits


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
    parser.add_argument('--select', action='store_true',
                        help='wait in select before accept, and count the wake-ups')
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


def sleeps():
    """Return how often this process has slept until now (see getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def select_and_accept(listener, woken, number):
    """Return the next connection, and count in *woken* how often the wait for one was broken.

    Most wake-ups never come out of select: it finds that another child was quicker, and sleeps on.
    """
    while True:
        before = sleeps()
        readable, _, _ = select.select([listener], [], [], COUNT_EVERY)
        slept = sleeps() - before
        if not readable:
            woken[number] += max(0, slept - 1)  # the last time, the clock woke us
            continue
        woken[number] += max(1, slept)  # a connection that was there already took no sleep
        try:
            return listener.accept()[0]
        except BlockingIOError:  # another child was quicker
            pass
        except OSError:
            time.sleep(RETRY)


def serve(listener, accepted, woken, number):
    """Serve one connection after another, for ever."""
    while True:
        if woken:
            conn = select_and_accept(listener, woken, number)
        else:
            conn = accept(listener)
        with conn:
            accepted[number] += 1  # no other process writes here, so no count is lost
            handle(conn)


def start_child(listener, accepted, woken, number):
    """Fork a child that serves until it is killed; raise OSError if there can be none."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            say(f'Child started with PID: {os.getpid()}')
            serve(listener, accepted, woken, number)
        except Exception:
            sys.excepthook(*sys.exc_info())  # os._exit would swallow the traceback
        finally:
            os._exit(1)  # whatever happens: no child may return into its parent's loop
    children[pid] = number


def reap():
    """Collect the children that have ended; each would stay a zombie."""
    with contextlib.suppress(ChildProcessError):  # there are no more
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            children.pop(pid, None)


def stop_children():
    """Kill the children and wait until they are gone.

    They have nothing to save, and only SIGKILL ends one that somebody has stopped.
    """
    for pid in list(children):  # a copy: in server01.py a handler may change it
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def shared_counters(size):
    """Return *size* zeros, 64 bits each, in memory that children share instead of copying it."""
    return memoryview(mmap.mmap(-1, 8 * size)).cast('Q')


def print_table(accepted, woken):
    """Print what each child has counted."""
    width = len(str(max([*accepted, *woken])))
    for number, times in enumerate(accepted):
        line = f'child {number:<{len(str(len(accepted) - 1))}} : {times:{width}} times'
        if woken:
            line += f', woken {woken[number]:{width}} times'
        say(line)


def main():
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until sigwait takes them: no race
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # SIGINT is ignored in a background job of sh
    accepted = shared_counters(options.child_num)
    woken = shared_counters(options.child_num) if options.select else []
    with listen(options.host, options.port) as listener:
        listener.setblocking(not options.select)  # between select and accept, another may win
        signum = None
        while signum not in STOP:
            reap()
            try:
                for number in sorted({*range(options.child_num)} - {*children.values()}):
                    if not signal.sigpending() & STOP:
                        start_child(listener, accepted, woken, number)
            except OSError as error:
                say(f'cannot start a child: {error}', sys.stderr)
                signal.alarm(1)  # second; then SIGALRM has us try again
            signum = signal.sigwait(SIGNALS)
    if woken:
        time.sleep(2 * COUNT_EVERY)  # a child that Ctrl-C has not reached counts once more
    stop_children()
    print_table(accepted, woken)


if __name__ == '__main__':
    main()
