#!/usr/bin/env python3
"""The nature of SIGPIPE: what happens to a process that writes to a reset connection.

The kernel answers such a write twice: it sends the signal SIGPIPE, and it fails
the call with the error EPIPE (see write(2)). Python ignores the signal from the
start, so the error is what is left: BrokenPipeError.

Try:       python3 rstserver.py
           python3 sigpipe.py
           python3 sigpipe.py --default; echo $?
Notice:    the traceback comes from the error. With --default there is none: the
           signal kills the process, and the shell reports 141: 128 + 13.
See also:  rstserver.py (where the reset comes from).
"""
import argparse
import signal
import socket
import sys


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    if options.default:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    family, address = resolve(options.host, options.port)
    with socket.socket(family) as conn:
        try:
            conn.connect(address)
            conn.recv(1)  # waits for the reset
            sys.exit('no reset came: this is not rstserver.py')
        except ConnectionResetError as error:  # from recv, or from connect if the RST is quick
            print(error, end='\n\n', flush=True)  # and ignore it
        except OSError as error:
            sys.exit(f'cannot connect to {options.host!r} port {options.port}: {error}'
                     ' (is rstserver.py running?)')
        conn.send(b'hello')


# The rest: name and options.

def resolve(host, port):
    """Return the family and the address for *host* and *port*; without one, say why and exit."""
    try:
        # getaddrinfo may offer IPv4 and IPv6; AF_INET sorts first, so min() prefers IPv4.
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        sys.exit(f'cannot connect to {host!r}: {error}')
    return family, address


def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost',
                        help='name or address of rstserver.py (default: %(default)s)')
    parser.add_argument('-p', '--port', type=int, default=2000,
                        help='port of rstserver.py (default: %(default)s)')
    parser.add_argument('--default', action='store_true',
                        help="restore SIGPIPE's default action, which is to kill the process")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f'port {options.port} is not from 0 to 65535')
    return options


if __name__ == '__main__':
    main()
