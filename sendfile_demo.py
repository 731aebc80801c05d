#!/usr/bin/env python3
"""Sending a file: read and write in a loop, against sendfile.

The loop copies every byte out of the kernel and back into it. sendfile has
the kernel move the file to the socket by itself: no byte enters this process.
Either way a forked child receives, over a TCP connection.

Try:       python3 sendfile_demo.py
           python3 sendfile_demo.py -m 1000
Notice:    sendfile takes next to no system calls and no user CPU. It beats the
           loop of small blocks. A loop of large ones may beat *it* here, where
           both ends are one machine; the table tells for yours.
See also:  tcpcork_demo.py (a header and a body in one segment), sendfile(2).
"""
import argparse
import contextlib
import os
import resource
import signal
import socket
import stat
import sys
import tempfile
import time

MEGABYTE = 10 ** 6            # bytes
RUNS = 5                      # times that each method is measured
RECEIVE_BLOCK = 2 ** 20       # bytes that the child takes at once, whatever the method
READY, SAME, DIFFERENT = b'>', b'=', b'!'  # all that the child ever sends
METHODS = {                   # name: bytes that one system call moves at most
    'read/write 4 KiB': 4 * 2 ** 10,
    'read/write 64 KiB': 64 * 2 ** 10,
    'read/write 1 MiB': 2 ** 20,
    'sendfile': 0x7ffff000}   # Linux moves no more, whatever it is asked: sendfile(2)


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback; the child follows
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, waitpid would find no child
    try:
        with open_file(options) as file:
            demonstrate(file)
    except OSError as error:
        log(f'{sys.argv[0]}: error: {options.file or "temporary file"!r}: {error}', sys.stderr)
        sys.exit(1)


def demonstrate(file):
    """Send *file* by each method and print what that took."""
    size = os.fstat(file.fileno()).st_size
    log(f'Sending {size} bytes. Of {RUNS} runs the one in the middle:')
    log('method             seconds    MB/s  user CPU  system CPU  system calls')
    for method in METHODS:
        # Comparing every byte takes longer than sending it, so it has a run of its own. That run
        # also reads the file into memory: no run that is measured waits for the disk.
        transfer(method, file, size, check=True)
        runs = sorted(transfer(method, file, size) for _ in range(RUNS))
        seconds, user, system, calls = runs[RUNS // 2]
        log(f'{method:17} {seconds:8.3f} {size / MEGABYTE / seconds:7.0f} {user:9.3f} '
            f'{system:11.3f} {calls:13}')


def transfer(method, file, size, check=False):
    """Send *file* to a child; return seconds, those of user and system CPU, and system calls."""
    send = send_by_sendfile if method == 'sendfile' else send_by_loop
    with connection(file, size, check) as conn:  # no timeout: it would make sendfile fail (EAGAIN)
        # The kernel may tell user from system CPU by sampling; it is their sum that is exact.
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        calls = send(conn, file, size, METHODS[method])
        conn.shutdown(socket.SHUT_WR)  # end of file; the last bytes leave at once, too
        answer = conn.recv(1)  # sent is not received: the clock runs until the child has it all
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
    if answer != SAME:
        raise OSError('what arrived is not what was sent')
    return seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, calls


def send_by_loop(conn, file, size, block):
    """Send *size* bytes of *file*, a block at a time; return the number of system calls."""
    offset = calls = 0
    while offset < size:  # not until end of file: in a file that grows it might never come
        data = os.pread(file.fileno(), min(block, size - offset), offset)
        calls += 1
        if not data:
            raise OSError(f'it ends after {offset} of {size} bytes; has it shrunk?')
        offset += len(data)
        while data:  # one send does not send all
            data = data[conn.send(data):]
            calls += 1
    return calls


def send_by_sendfile(conn, file, size, block):
    """Do the same, but have the kernel move the bytes."""
    offset = calls = 0
    while offset < size:  # one sendfile does not send all, either
        sent = os.sendfile(conn.fileno(), file.fileno(), offset, min(block, size - offset))
        calls += 1
        if not sent:  # end of file is no error to sendfile: we would call it for ever
            raise OSError(f'it ends after {offset} of {size} bytes; has it shrunk?')
        offset += sent
    return calls


@contextlib.contextmanager
def connection(file, size, check):
    """Fork a child that receives, yield a connection to it, then wait until it has ended."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        conn = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    pid = os.fork()
    if pid == 0:
        try:
            conn.close()  # while the child held it, the child would see no end of file
            receive(peer, file, size, check)
        finally:
            os._exit(0)  # whatever happens: no child may return into its parent's loop
    peer.close()
    try:
        with conn:
            conn.recv(1)  # wait until the child is ready
            yield conn
    finally:
        os.waitpid(pid, 0)


def receive(conn, file, size, check):
    """Receive to the end; answer whether it was *size* bytes and, if *check*, those of *file*."""
    buffer = memoryview(bytearray(RECEIVE_BLOCK))
    offset = 0
    answer = SAME
    conn.sendall(READY)  # before this, a run would measure the fork
    while count := conn.recv_into(buffer):
        if check and os.pread(file.fileno(), count, offset) != buffer[:count]:
            answer = DIFFERENT
        offset += count
    conn.sendall(answer if offset == size else DIFFERENT)


# The rest: the file, output and options.

def open_file(options):
    """Return the file to send, open; if it cannot be sent, say why and exit with status 2."""
    if options.file is None:
        file = tempfile.TemporaryFile(buffering=0)  # it has no name, and goes when we go
        while remaining := options.megabytes * MEGABYTE - file.tell():
            file.write(os.urandom(min(remaining, MEGABYTE)))
        return file
    try:
        if not stat.S_ISREG(os.stat(options.file).st_mode):  # to open a FIFO waits for a writer
            raise OSError('not a regular file')
        return open(options.file, 'rb', buffering=0)
    except OSError as error:
        log(f'{sys.argv[0]}: error: cannot send {options.file!r}: {error.strerror or error}',
            sys.stderr)
        sys.exit(2)


def log(line, stream=sys.stdout):
    """Write *line* by one system call: fork would copy the buffer of print, os._exit drop it."""
    with contextlib.suppress(AttributeError, OSError):  # closed, or its reader has left
        os.write(stream.fileno(), os.fsencode(f'{line}\n'))


def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument('-f', '--file', help='file to send, instead of a temporary one')
    group.add_argument('-m', '--megabytes', type=int, default=256,
                       help='size of the temporary file (default: %(default)s)')
    options = parser.parse_args()
    if options.megabytes < 1:
        parser.error(f'{options.megabytes} megabytes are too few')
    return options


if __name__ == '__main__':
    main()
