#!/usr/bin/env python3
"""TCP iterative server that answers every connection with an RST.

With SO_LINGER on and a time of 0 seconds, close sends no FIN: it throws away
what is unsent and resets the connection (RST); see "Unix Network Programming",
section 7.5.

Try:       python3 rstserver.py
           python3 sigpipe.py
Notice:    sudo tcpdump -i lo port 2000 shows the flag R where F would be.
See also:  sigpipe.py (what the reset does to a client that goes on writing).
"""
import argparse
import contextlib
import os
import signal
import socket
import struct
import sys
import time

RESET = struct.pack('ii', 1, 0)  # struct linger: on, for 0 seconds
TICK = 0.1                # seconds; no wait is longer


def main():
    options = parse_options()
    listener = listen(options.host, options.port)
    listener.settimeout(TICK)
    while True:
        try:
            conn, address = listener.accept()
        except socket.timeout:  # time to notice a signal that came just before the wait
            continue
        except OSError:  # out of descriptors: the client waits in the kernel's queue
            time.sleep(TICK)
            continue
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        conn.close()  # sends the RST
        log(f'Sent RST to {address[0]} port {address[1]}')


# The rest: as in the servers; the options of the listener make no difference here.

BACKLOG = 1024            # clients not yet accepted; the 5 of old books stalls some of 15 for 1 s
MAX_UNSENT = 128 * 1024   # bytes the kernel takes ahead; more would hide that a client reads


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
