#!/usr/bin/env python3
"""A yardstick: the service of the collection with asyncio's streams, as their manual shows it.

It does what server07.py does: the same lines, reply blocks, backlog and options of the listener.
Not equal, and to its favour: it checks a request less strictly, and has no timeout.

Try:       python3 tests/yardstick_asyncio.py
           python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096
See also:  server07.py (epoll by hand), benchmark.py.
"""
import argparse
import asyncio
import contextlib
import os
import signal
import socket

BACKLOG = 1024            # connections
BLOCK = b'x' * 64 * 1024


async def handle(reader, writer):
    with contextlib.suppress(OSError):  # the client has left
        while line := await reader.readline():
            size = int(line)
            os.write(1, f'Got request to send {size} bytes. Sending them all...\n'.encode())
            for remaining in range(size, 0, -len(BLOCK)):
                writer.write(BLOCK[:remaining])
                await writer.drain()
        writer.close()
        await writer.wait_closed()


async def serve(address):
    listener = socket.create_server(address, backlog=BACKLOG)  # asyncio sets TCP_NODELAY itself
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 128 * 1024)
    server = await asyncio.start_server(handle, sock=listener, backlog=BACKLOG)
    os.write(1, f'Listening on port {listener.getsockname()[1]} ...\n'.encode())
    async with server:
        await server.serve_forever()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('-i', '--host', default='localhost')
    parser.add_argument('-p', '--port', type=int, default=2000)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(0))
    asyncio.run(serve((options.host, options.port)))


if __name__ == '__main__':
    main()
