#!/usr/bin/env python3
"""A yardstick: the service of the collection with socketserver, as its manual shows it.

The work is that of server01.py and server05.py: the same checks, lines, reply blocks, backlog,
timeout and listener's options. Threads are daemons, or socketserver would keep a list of them.
One thing favours ThreadingTCPServer: server05.py bounds the number of its threads.

Try:       python3 tests/yardstick_socketserver.py ForkingTCPServer
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
Notice:    it is level with server01.py: what counts is the fork.
See also:  server01.py, server05.py (the same by hand), benchmark.py.
"""
import argparse
import contextlib
import os
import signal
import socket
import socketserver
import sys
import threading

BACKLOG = 1024            # connections; socketserver's own 5 would drop some for a second
BLOCK = b'x' * 64 * 1024
MAX_BYTES = 2 ** 30
MAX_LINE = 32             # bytes
TIMEOUT = 10              # seconds
UNSENT = 128 * 1024       # bytes that the kernel takes before it can send them
STACK = 256 * 1024        # bytes for each thread


def say(line, stream=sys.stdout):
    os.write(stream.fileno(), f'{line}\n'.encode())


def parse_request(line):
    """Return the number of bytes that *line* asks for; raise ValueError if it is no request."""
    digits = line.removesuffix(b'\n').removesuffix(b'\r')
    if len(line) > MAX_LINE or not digits.isdigit() or not 1 <= int(digits) <= MAX_BYTES:
        raise ValueError(f'bad request {line!r}')
    return int(digits)


class Handler(socketserver.StreamRequestHandler):
    timeout = TIMEOUT

    def handle(self):
        try:
            while line := self.rfile.readline(MAX_LINE + 1):
                size = parse_request(line)
                say(f'Got request to send {size} bytes. Sending them all...')
                for remaining in range(size, 0, -len(BLOCK)):
                    self.wfile.write(BLOCK[:remaining])
        except ValueError as error:
            say(f'{self.client_address}: {error}', sys.stderr)
        except OSError:  # the client has reset the connection or let the time run out
            pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('design', choices=['ForkingTCPServer', 'ThreadingTCPServer'])
    parser.add_argument('-i', '--host', default='localhost')
    parser.add_argument('-p', '--port', type=int, default=2000)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if ignored
    threading.stack_size(STACK)
    design = getattr(socketserver, options.design)
    design.request_queue_size = BACKLOG
    design.allow_reuse_address = True
    design.daemon_threads = True
    with design((options.host, options.port), Handler) as server:
        for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_NOTSENT_LOWAT, UNSENT),
                              (socket.TCP_USER_TIMEOUT, TIMEOUT * 1000)):
            server.socket.setsockopt(socket.IPPROTO_TCP, option, value)  # connections inherit it
        with contextlib.suppress(KeyboardInterrupt):
            say(f'Listening on port {server.server_address[1]} ...')
            server.serve_forever()
        for pid in getattr(server, 'active_children', None) or ():
            os.kill(pid, signal.SIGKILL)  # as server01.py does; the end of the block reaps them
    os._exit(0)  # whatever the threads are doing


if __name__ == '__main__':
    main()
