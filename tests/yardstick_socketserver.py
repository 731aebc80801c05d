#!/usr/bin/env python3
"""A yardstick: the service of the collection with socketserver, as its manual shows it.

It does what server01.py or server05.py does: the same lines, reply blocks, backlog, timeout, stack
and options of the listener. Not equal, and to its favour: it checks a request less strictly, it
sets no limit to its threads, and they are daemons, of which it need not keep a list.

Try:       python3 tests/yardstick_socketserver.py ForkingTCPServer
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
See also:  server01.py, server05.py (the same by hand), benchmark.py.
"""
import argparse
import contextlib
import os
import signal
import socket
import socketserver
import threading

BLOCK = b'x' * 64 * 1024
TIMEOUT = 10              # seconds


class Handler(socketserver.StreamRequestHandler):
    timeout = TIMEOUT

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            while line := self.rfile.readline():
                size = int(line)
                os.write(1, f'Got request to send {size} bytes. Sending them all...\n'.encode())
                for remaining in range(size, 0, -len(BLOCK)):
                    self.wfile.write(BLOCK[:remaining])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('design', choices=['ForkingTCPServer', 'ThreadingTCPServer'])
    parser.add_argument('-i', '--host', default='localhost')
    parser.add_argument('-p', '--port', type=int, default=2000)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if ignored
    threading.stack_size(256 * 1024)
    design = getattr(socketserver, options.design)
    design.request_queue_size = 1024
    design.allow_reuse_address = design.daemon_threads = True
    with design((options.host, options.port), Handler) as server:
        for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_NOTSENT_LOWAT, 128 * 1024)):
            server.socket.setsockopt(socket.IPPROTO_TCP, option, value)  # connections inherit it
        with contextlib.suppress(KeyboardInterrupt):
            os.write(1, f'Listening on port {server.server_address[1]} ...\n'.encode())
            server.serve_forever()
        for pid in getattr(server, 'active_children', None) or ():
            with contextlib.suppress(ProcessLookupError):  # it has just been reaped
                os.kill(pid, signal.SIGKILL)  # or the end of this block would wait for its client
    os._exit(0)  # whatever the threads are doing


if __name__ == '__main__':
    main()
