#!/usr/bin/env python3
"""A greedy client: it sends requests for one byte without end, on many connections at once.

Try:       python3 server07.py
           python3 tests/greedy_client.py 2000 50 10    (port, connections, seconds)
           python3 client.py -i localhost -p 2000 -c 1 -t 100 -b 4096
Notice:    how long the other client needs now.
See also:  benchmark.py (its table "greedy").
"""
import contextlib
import os
import select
import signal
import socket
import sys
import time

REQUESTS = b'1\n' * 4096
RECV_SIZE = 64 * 1024     # bytes

signal.signal(signal.SIGINT, lambda signum, frame: os._exit(0))
port, number, seconds = map(int, sys.argv[1:])
poller, conns = select.epoll(), {}
for _ in range(number):
    conn = socket.create_connection(('localhost', port))
    conn.setblocking(False)
    conns[conn.fileno()] = conn
    poller.register(conn, select.EPOLLIN | select.EPOLLOUT)
print('Connected', flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    for descriptor, events in poller.poll(1):
        if events & select.EPOLLIN and not conns[descriptor].recv(RECV_SIZE):
            sys.exit('the server has closed a connection')
        if events & select.EPOLLOUT:
            with contextlib.suppress(BlockingIOError):
                conns[descriptor].send(REQUESTS)
