#!/usr/bin/env python3
"""The nature of SIGPIPE: what happens to a process that writes to a reset connection.

The kernel answers such a write twice: it sends the signal SIGPIPE, and it fails
the call with the error EPIPE (see write(2)). Python ignores the signal from the
start, so the error is what is left: BrokenPipeError.

Try:       python3 rstserver.py
           python3 sigpipe.py
           python3 sigpipe.py --default; echo $?
Notice:    the traceback comes from the error. With --default the signal is not
           ignored, and there is none: the kernel kills the process, 128 + 13.
See also:  rstserver.py (where the reset comes from).
"""
import argparse
import signal
import socket
import sys


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
                        help='name or address of rstserver.py (default: %(default)s)')
    parser.add_argument('-p', '--port', type=port_number, default=2000,
                        help='port of rstserver.py (default: %(default)s)')
    parser.add_argument('--default', action='store_true',
                        help="restore SIGPIPE's default action, which is to kill the process")
    return parser.parse_args()


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    if options.default:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        # The least is IPv4, if the name has both.
        family, *_, address = min(socket.getaddrinfo(options.host, options.port,
                                                     type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:  # UnicodeError: no name looks like this
        sys.exit(f'cannot connect to {options.host!r}: {error}')
    with socket.socket(family) as conn:
        try:
            conn.connect(address)
            conn.recv(1)
            sys.exit('no reset came: this is not rstserver.py')
        except ConnectionResetError as error:  # from recv, as a rule; the RST may be quicker yet
            print(error, end='\n\n', flush=True)  # and ignore it
        except OSError as error:
            sys.exit(f'cannot connect to {options.host!r} port {options.port}: {error}'
                     ' (is rstserver.py running?)')
        conn.send(b'hello')


if __name__ == '__main__':
    main()
