#!/usr/bin/env python3
"""A yardstick: the service of the collection with asyncio's streams, as their manual shows it.

Try:       python3 tests/yardstick_asyncio.py
See also:  server07.py, benchmark.py.
"""
import argparse
import asyncio
import os
import signal
import socket
import sys

BACKLOG = 1024            # connections
BLOCK = b'x' * 64 * 1024
MAX_BYTES = 2 ** 30
MAX_LINE = 32             # bytes
TIMEOUT = 10              # seconds
UNSENT = 128 * 1024       # bytes that the kernel takes before it can send them


def say(line, stream=sys.stdout):
    os.write(stream.fileno(), f'{line}\n'.encode())


def parse_request(line):
    """Return the number of bytes that *line* asks for; raise ValueError if it is no request."""
    digits = line.removesuffix(b'\n').removesuffix(b'\r')
    if len(line) > MAX_LINE or not digits.isdigit() or not 1 <= int(digits) <= MAX_BYTES:
        raise ValueError(f'bad request {line!r}')
    return int(digits)


async def handle(reader, writer):
    try:
        while line := await reader.readline():
            size = parse_request(line)
            say(f'Got request to send {size} bytes. Sending them all...')
            for remaining in range(size, 0, -len(BLOCK)):
                writer.write(BLOCK[:remaining])
                await writer.drain()
        writer.close()
        await writer.wait_closed()
    except ValueError as error:
        say(f'{writer.get_extra_info("peername")}: {error}', sys.stderr)
        writer.close()
    except OSError:  # the client has reset the connection
        writer.close()


async def serve(options):
    listener = socket.create_server((options.host, options.port), backlog=BACKLOG)
    for option, value in ((socket.TCP_NOTSENT_LOWAT, UNSENT),
                          (socket.TCP_USER_TIMEOUT, TIMEOUT * 1000)):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    server = await asyncio.start_server(handle, sock=listener, backlog=BACKLOG)
    say(f'Listening on port {listener.getsockname()[1]} ...')
    async with server:
        await server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-i', '--host', default='localhost')
    parser.add_argument('-p', '--port', type=int, default=2000)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(0))
    asyncio.run(serve(options))


if __name__ == '__main__':
    main()
