#!/usr/bin/env python3
"""TCP iterative server that answers every connection with an RST.

With SO_LINGER on and a time of 0 seconds, close does not say goodbye (FIN): it
throws away what is unsent and resets the connection (RST); see "Unix Network
Programming", section 7.5.

Try:       python3 rstserver.py
           python3 sigpipe.py
Notice:    sudo tcpdump -i lo port 2000 shows the flag R where F would be.
See also:  sigpipe.py (what the reset does to a client that goes on writing).
"""
import argparse
import os
import signal
import socket
import struct
import sys
import time

BACKLOG = 1024            # connections; a 5, as in old books, overflows under 15 clients, and
                          # each one dropped tries again only after a second
RETRY = 0.1               # seconds until accept is tried again after an error
TICK = 0.5                # seconds; no wait is longer: signals are heard by then
RESET = struct.pack('ii', 1, 0)  # struct linger: on, for 0 seconds


def say(line, stream=sys.stdout):
    """Write *line* by one system call, so that others cannot split it and no buffer holds it.

    A buffer would be copied by fork and dropped by os._exit.
    """
    try:
        os.write(stream.fileno(), f'{line}\n'.encode(errors='surrogateescape'))
    except (AttributeError, OSError):  # closed, full, or its reader has left: go on in silence
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


def stop(signum, frame):
    """Exit at once; the kernel closes every connection."""
    os._exit(0)


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, stop)  # even if ignored, as in a background job of sh
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # even if blocked
    listener = listen(options.host, options.port)
    listener.settimeout(TICK)
    while True:
        try:
            conn, (host, port, *_) = listener.accept()
        except socket.timeout:  # time to hear a signal that came just before the wait
            continue
        except OSError:  # out of descriptors: leave it in the kernel's queue a while
            time.sleep(RETRY)
            continue
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        conn.close()  # sends the RST
        say(f'Sent RST to {host} port {port}')


if __name__ == '__main__':
    main()
