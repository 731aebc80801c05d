"""What takes long: the clients and servers that say nothing. All these tests run side by side."""
import fcntl
import os
import pathlib
import re
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import (
    EVENT_DRIVEN,
    LINUX,
    POOLS,
    SERVERS,
    SOON,
    ask,
    bytes_in,
    client,
    connect,
    receive,
    receive_end,
    wait_until,
)

pytestmark = pytest.mark.waits


def in_the_kernel(port, peer):
    """Return how many bytes the kernel holds for a server's end of a connection."""
    table = pathlib.Path('/proc/net/tcp').read_text() if LINUX else ''
    found = re.search(rf':{port:04X} \w+:{peer:04X} \w\w (\w+):', table)
    return int(found[1], 16) if found else 0


@pytest.mark.parametrize('name', SERVERS)
def test_silent_and_stuck_clients(serve, name):
    """They fill the pool, and are closed after TIMEOUT; those who waited are served then.

    The kernel drops what stuck ones have not read, even if the server has no more to send them. A
    steady reader is not silent.
    """
    server = serve(name, *(['-n', 5] if name in POOLS else []))
    start = time.monotonic()  # earlier than the server's own clock: it cannot seem too quick
    steady, *others = [connect(server.port) for _ in range(5)]
    silent, half_a_line, *stuck = others
    half_a_line.sendall(b'12')
    for conn, request in zip(stuck, (b'200000000\n', b'150000\n')):
        conn.sendall(request)
    time.sleep(0.3)  # let all of them be accepted first

    def newcomer():
        ask(server.port)
        return time.monotonic() - start

    def read_steadily():
        steady.sendall(b'2700000\n')
        size = 0
        while size < 2_700_000 and (data := receive(steady, 20_000)):
            size += len(data)
            time.sleep(0.1)
        steady.sendall(b'7\n')
        return size + len(receive(steady, 7))

    with ThreadPoolExecutor(2) as pool:
        newcomer, steady_size = pool.submit(newcomer), pool.submit(read_steadily)
        for conn in silent, half_a_line:
            assert conn.recv(1) == b''  # end of file, and no reset
            assert 9.9 < time.monotonic() - start < 15
        least, most = (9, 15) if name in POOLS else (0, 6)
        assert least < newcomer.result() < most
        assert steady_size.result() == 2_700_007
    time.sleep(max(0, start + 14 - time.monotonic()))
    for conn in stuck:
        assert not in_the_kernel(server.port, conn.getsockname()[1])
        assert 0 < len(receive_end(conn)) < 150_000
    server.stop()
    assert server.err == ''


@pytest.mark.parametrize('name', SERVERS)
def test_a_steady_reader_with_a_small_buffer(serve, name):
    """Its window never takes a whole segment, and so TCP_USER_TIMEOUT would run out."""
    server = serve(name)
    with socket.socket() as conn:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        conn.settimeout(SOON)
        conn.connect(('127.0.0.1', server.port))
        conn.sendall(b'50000000\n')
        end = time.monotonic() + 14
        while time.monotonic() < end:
            assert len(receive(conn, 5000)) == 5000
            time.sleep(0.1)


@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_a_busy_client_amid_silent_ones(serve, name):
    """When these have been closed, others are accepted, even if the server is never idle."""
    server = serve(name, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
    with connect(server.port) as busy, ThreadPoolExecutor(1) as pool:
        silent = [connect(server.port) for _ in range(60)]
        newcomer = pool.submit(ask, server.port)
        while not newcomer.done():
            busy.sendall(b'1\n')
            assert receive(busy, 1)
            time.sleep(0.01)
        newcomer.result()
    assert len(silent) == 60


@pytest.mark.parametrize('name', SERVERS)
def test_not_the_clients_were_silent(serve, name):
    """Those are served who have spoken while the server was stopped for longer than TIMEOUT."""
    server = serve(name, *(['-n', 5] if name in POOLS else []))
    conns = [connect(server.port) for _ in range(5)]
    for conn in conns:
        conn.sendall(b'1\n')
        assert receive(conn, 1)  # it has been accepted
    os.killpg(server.pid, signal.SIGSTOP)
    for conn in conns:
        conn.sendall(b'3\n')
    time.sleep(11)
    os.killpg(server.pid, signal.SIGCONT)
    assert [len(receive(conn, 3)) for conn in conns] == [3] * 5


@pytest.mark.skipif(not LINUX, reason='knows the size of a pipe on Linux')
@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_not_the_clients_were_silent_but_stdout_blocked(run, name):
    read_end, write_end = os.pipe()
    capacity = fcntl.fcntl(read_end, 1032)  # F_GETPIPE_SZ, in the module since Python 3.10
    server = run(name, '-p', 0, stdout=write_end)
    os.close(write_end)
    with open(read_end, 'rb') as output:
        port = int(re.search(rb'port (\d+)', output.readline())[1])
        conns = [connect(port) for _ in range(5)]
        for conn in conns:
            conn.sendall(b'1\n')
            assert receive(conn, 1)
        conns[0].sendall(b'1\n' * 5000)  # each prints a line; the pipe takes about 1,300
        wait_until(lambda: bytes_in(read_end) > 0.9 * capacity)
        for conn in conns[1:]:
            conn.sendall(b'3\n')
        time.sleep(11)
        reader = threading.Thread(target=output.read)
        reader.start()
        assert [len(receive(conn, size))
                for conn, size in zip(conns, [5000, 3, 3, 3, 3])] == [5000, 3, 3, 3, 3]
        server.stop()
        reader.join()


def test_client_of_a_silent_server():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        start = time.monotonic()
        result = client(listener.getsockname()[1], '-c', 1)
    assert (result.returncode, result.stderr) == (1, 'Child 0: timed out\n')
    assert result.stdout.startswith('0 connections, 0 bytes in ')
    assert time.monotonic() - start < 35
