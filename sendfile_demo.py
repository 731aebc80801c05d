#!/usr/bin/env python3
"""Sending a file: read and write in a loop, against sendfile.

The loop copies every byte out of the kernel and back into it. sendfile has
the kernel move the file to the socket by itself: no byte enters this process.
Either way a forked child receives, over a TCP connection.

Try:       python3 sendfile_demo.py
           python3 sendfile_demo.py -m 1000
Notice:    sendfile takes next to no system calls and no user CPU. It beats the
           loop of small blocks. A loop of large ones may beat *it* here, where
           both ends are one machine; the table says which it is on yours.
See also:  tcpcork_demo.py (TCP_CORK, by which a header shares a segment with
           the file that follows), sendfile(2).
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
READY, SAME, DIFFERENT = b'>', b'=', b'!'  # all that it ever says


def say(line, stream=sys.stdout):
    """Write *line* by one system call, so that others cannot split it and no buffer holds it.

    A buffer would be copied by fork and dropped by os._exit.
    """
    try:
        os.write(stream.fileno(), f'{line}\n'.encode(errors='surrogateescape'))
    except (AttributeError, OSError):  # closed, full, or its reader has left: go on in silence
        pass


def send_by_loop(conn, file, size, block):
    """Send *size* bytes of *file*, a block at a time; return the number of system calls."""
    offset = calls = 0
    while offset < size:  # not until end of file: in a file that grows it might never come
        data = os.pread(file.fileno(), min(block, size - offset), offset)
        calls += 1
        if not data:
            raise OSError(f'it has shrunk: nothing left after {offset} of {size} bytes')
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
            raise OSError(f'it has shrunk: nothing left after {offset} of {size} bytes')
        offset += sent
    return calls


METHODS = {  # name: the function, and the bytes that it moves at most by one system call
    'read/write 4 KiB': (send_by_loop, 4 * 2 ** 10),
    'read/write 64 KiB': (send_by_loop, 64 * 2 ** 10),
    'read/write 1 MiB': (send_by_loop, 2 ** 20),
    'sendfile': (send_by_sendfile, 0x7ffff000),  # Linux moves no more, whatever it is asked
}


def receive(conn, file, size, check):
    """Take all that comes; answer whether it was *size* bytes and, to *check*, those of *file*."""
    buffer = memoryview(bytearray(RECEIVE_BLOCK))
    offset = 0
    answer = SAME
    conn.sendall(READY)  # before this, a run would measure the fork
    while count := conn.recv_into(buffer):
        if check and os.pread(file.fileno(), count, offset) != buffer[:count]:
            answer = DIFFERENT
        offset += count
    conn.sendall(answer if offset == size else DIFFERENT)


@contextlib.contextmanager
def connection(file, size, check):
    """Fork a child that receives; lend the connection to it, then wait for its end."""
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


def transfer(method, file, size, check=False):
    """Send *file* to a child; return seconds, those of user and system CPU, and system calls."""
    send, block = METHODS[method]
    with connection(file, size, check) as conn:  # no timeout: it would make sendfile fail (EAGAIN)
        # The kernel may tell user from system CPU by sampling; it is their sum that is exact.
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        calls = send(conn, file, size, block)
        conn.shutdown(socket.SHUT_WR)  # end of file; no delayed ACK can hold back the last bytes
        answer = conn.recv(1)  # sent is not received: the clock runs until the child has it all
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
    if answer != SAME:
        raise OSError('what arrived is not what was sent')
    return seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, calls


def demonstrate(file):
    """Send *file* by each method and print what that took."""
    size = os.fstat(file.fileno()).st_size
    say(f'Sending {size} bytes. Of {RUNS} runs the one in the middle:')
    say('method             seconds    MB/s  user CPU  system CPU  system calls')
    for method in METHODS:
        # To compare every byte takes longer than to send it, so it has a turn of its own. That
        # turn also reads the file into memory: in the runs nobody compares or waits for the disk.
        transfer(method, file, size, check=True)
        runs = sorted(transfer(method, file, size) for _ in range(RUNS))
        seconds, user, system, calls = runs[RUNS // 2]
        say(f'{method:17} {seconds:8.3f} {size / MEGABYTE / seconds:7.0f} {user:9.3f} '
            f'{system:11.3f} {calls:13}')


def positive_number(text):
    """Return *text* as a number from 1 up; argparse reports a ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument('-f', '--file', help='file to send, instead of a temporary one')
    group.add_argument('-m', '--megabytes', type=positive_number, default=256,
                       help='size of the temporary file (default: %(default)s)')
    return parser.parse_args()


def open_file(path):
    """Return the file *path*, open; if it cannot be sent, say why and exit with status 2."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            raise OSError('not a regular file')
        return open(path, 'rb', buffering=0)
    except OSError as error:
        say(f'{sys.argv[0]}: error: cannot send {path!r}: {error.strerror or error}', sys.stderr)
        sys.exit(2)


def main():
    options = parse_options()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback; the child follows
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, waitpid would find no child
    try:
        if options.file is not None:
            with open_file(options.file) as file:
                demonstrate(file)
        else:
            with tempfile.TemporaryFile(buffering=0) as file:  # no name: it goes when we go
                while remaining := options.megabytes * MEGABYTE - file.tell():
                    file.write(os.urandom(min(remaining, MEGABYTE)))
                demonstrate(file)
    except OSError as error:
        name = 'the temporary file' if options.file is None else repr(options.file)
        say(f'{sys.argv[0]}: error: cannot send {name}: {error.strerror or error}', sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
