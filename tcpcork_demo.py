#!/usr/bin/env python3
"""Many small writes: plain, with TCP_NODELAY, with TCP_CORK.

Plain TCP follows Nagle's algorithm: a small segment waits while an earlier one
is not acknowledged. TCP_NODELAY lets every write leave at once. TCP_CORK holds
back what does not fill a segment, until the cork is removed.

Try:       python3 tcpcork_demo.py
Notice:    from the second round on, the receiver delays its acknowledgement by
           some 40 ms, and plain waits for it. TCP_NODELAY cures the wait,
           TCP_CORK also the many segments. A cork left on holds data for 200 ms.
See also:  sendfile_demo.py (if the body is a file), tcp(7), RFC 896.
"""
import argparse
import contextlib
import os
import signal
import socket
import statistics
import struct
import sys
import time

# A header and a body; together they fit in one segment, even on Ethernet.
WRITES = [*(f'Name-{number:02}: value\r\n'.encode() for number in range(16)), bytes(1000)]
SIZE = sum(map(len, WRITES))  # bytes
ROUNDS = 12                  # the table shows the first, and the median of the others
DATA_SEGS_OUT = 156          # bytes before tcpi_data_segs_out in struct tcp_info, <linux/tcp.h>


def main():
    parse_options()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback; the child follows
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, waitpid would find no child
    log(f'{"":19}{"round 1":31}median of rounds 2 to {ROUNDS}; times in ms')
    log(f'{len(WRITES)} writes, 1 read' + '  segments  first byte   answer' * 2)
    try:
        for way in 'plain', 'TCP_NODELAY', 'TCP_CORK', 'TCP_CORK left on':
            with connection() as conn:
                first, *later = [exchange(conn, way) for _ in range(ROUNDS)]
            line = f'{way:17}'
            for segments, byte, reply in first, map(statistics.median, zip(*later)):
                line += f'{segments:10}{byte:12.3f}{reply:9.3f}'
            log(line)
    except (OSError, struct.error) as error:  # struct.error: the child has been killed
        sys.exit(f'{sys.argv[0]}: error: {error}')


def exchange(conn, way):
    """Write, write, read; return segments, and ms to the first byte there and the answer here."""
    segments = segments_sent(conn)
    start = time.monotonic()
    if way == 'TCP_NODELAY':
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif way != 'plain':
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for data in WRITES:
        conn.sendall(data)
    if way == 'TCP_CORK':
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)  # now the rest may go
    moment, = struct.unpack('d', conn.recv(8, socket.MSG_WAITALL))
    end = time.monotonic()
    return segments_sent(conn) - segments, (moment - start) * 1000, (end - start) * 1000


def segments_sent(conn):
    """Return how many segments with data *conn* has sent so far."""
    info = conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGS_OUT + 4)
    return struct.unpack_from('I', info, DATA_SEGS_OUT)[0]


@contextlib.contextmanager
def connection():
    """Fork a child that answers, yield a connection to it, then wait until it has ended."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        conn = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    pid = os.fork()
    if pid == 0:
        try:
            conn.close()  # while the child held it, the child would see no end of file
            answer(peer)
        finally:
            os._exit(0)  # whatever happens: no child may return into its parent's loop
    peer.close()
    try:
        with conn:
            conn.recv(1)  # wait until the child is ready
            yield conn
    finally:
        os.waitpid(pid, 0)


def answer(conn):
    """Answer each message on *conn* with the moment when its first byte came."""
    conn.sendall(b'>')  # ready; before this, the first round would measure the fork
    while conn.recv(1):
        moment = time.monotonic()  # one clock for all processes
        conn.recv(SIZE - 1, socket.MSG_WAITALL)
        conn.sendall(struct.pack('d', moment))


# The rest: output and options.

def log(line, stream=sys.stdout):
    """Write *line* by one system call: fork would copy the buffer of print, os._exit drop it."""
    with contextlib.suppress(AttributeError, OSError):  # closed, or its reader has left
        os.write(stream.fileno(), os.fsencode(f'{line}\n'))


def parse_options():
    """Accept -h alone; without a TCP_CORK, exit with status 1."""
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not hasattr(socket, 'TCP_CORK'):
        sys.exit(f'{sys.argv[0]}: error: this system has no TCP_CORK')


if __name__ == '__main__':
    main()
