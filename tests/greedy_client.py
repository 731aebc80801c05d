#!/usr/bin/env python3
"""A greedy client."""
import argparse
import os
import select
import signal
import socket
import sys
import time

REQUESTS = b'1\n' * 4096
RECV_SIZE = 64 * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('-i', '--host', default='localhost')
    parser.add_argument('-p', '--port', type=int, default=2000)
    parser.add_argument('-c', '--con-num', type=int, default=50)
    parser.add_argument('-s', '--secs', type=float, default=10)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(0))
    poller, conns, replies = select.epoll(), {}, 0
    for _ in range(options.con_num):
        conn = socket.create_connection((options.host, options.port))
        conn.setblocking(False)
        conns[conn.fileno()] = conn
        poller.register(conn, select.EPOLLIN | select.EPOLLOUT)
    end = time.monotonic() + options.secs
    print('Connected', flush=True)
    while time.monotonic() < end:
        for descriptor, events in poller.poll(1):
            if events & ~select.EPOLLOUT:
                data = conns[descriptor].recv(RECV_SIZE)
                if not data: sys.exit('closed')
                replies += len(data)
            if events & select.EPOLLOUT:
                try:
                    conns[descriptor].send(REQUESTS)
                except BlockingIOError: pass
    print(f'{replies} replies')


if __name__ == '__main__':
    main()
