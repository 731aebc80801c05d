"""The one service, through its many designs: what every server must do for every client.

One server of each kind serves all the tests of this file, as it would serve good and bad clients.
"""
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import pytest
from conftest import (
    ENVIRONMENT,
    LINUX,
    PYTHON,
    SERVERS,
    ask,
    client,
    connect,
    processes_of,
    receive,
    receive_end,
    reset,
    running,
    wait_until,
)

GIBIBYTE = 2 ** 30
pytestmark = pytest.mark.serial
BAD_LINES = [b'\n', b'\r\n', b'0\n', b'000\n', b'-1\n', b'+1\n', b' 1\n', b'1 \n', b'1.0\n',
             b'1e3\n', b'1_000\n', b'0x10\n', b'abc\n', b'1\x002\n', b'\xff\xfe\n',
             '\u0663\n'.encode(), b'1\r\r\n', b'%d\n' % (GIBIBYTE + 1), b'9' * 31 + b'\n',
             b'0' * 40 + b'1\n', b'1' * 100_000, b'x' * 100_000 + b'\n', b'nonsense, no newline']


@pytest.fixture(scope='module', params=SERVERS)
def server(request):
    with running(request.param, '-p', 0) as server:
        assert server.port
        yield server
        server.stop()
        assert server.err == ''


def take_errors(server, count):
    """Return the lines on stderr when there are *count* of them, and strike them off."""
    lines = wait_until(lambda: server.err.count('\n') >= count and server.err.splitlines())
    server.texts['stderr'] = ''
    return lines


def test_documented_client_run(server):
    line = 'Got request to send 4096 bytes. Sending them all...\n'
    before = server.out.count(line)
    connections = 20 if server.name == 'server01.py' else 100  # its forks take their time
    result = client(server.port, '-c', 15, '-t', connections, '-b', 4096)
    assert result.stderr == ''
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()[:-1]) == sorted(
        f'Child {number} is done' for number in range(15))
    assert re.fullmatch(rf'{15 * connections} connections, {15 * connections * 4096} bytes in '
                        r'\d+\.\d\d seconds: \d+ connections per second',
                        result.stdout.splitlines()[-1])
    wait_until(lambda: server.out.count(line) == before + 15 * connections)
    for line in server.out.splitlines():
        assert re.fullmatch(r'Listening on port \d+ \.\.\.'
                            r'|(Child started with PID|Thread started with TID): \d+'
                            r'|Got request to send \d+ bytes\. Sending them all\.\.\.', line)


def test_five_megabytes(server):
    result = client(server.port, '-c', 3, '-t', 2, '-b', 5_000_000)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith('6 connections, 30000000 bytes in ')


def test_one_request_after_another(server):
    with connect(server.port) as conn:
        for size in [1, 4096, 65536, 65537, 1, 300_000]:
            conn.sendall(b'%d\n' % size)
            assert len(receive(conn, size)) == size
        conn.shutdown(socket.SHUT_WR)
        assert receive_end(conn) == b''


def test_request_in_pieces(server):
    with connect(server.port) as conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in b'40', b'', b'9', b'6', b'\r', b'\n2', b'\n':
            conn.sendall(piece)
            time.sleep(0.01)
        assert len(receive(conn, 4098)) == 4098
        conn.shutdown(socket.SHUT_WR)
        assert receive_end(conn) == b''


@pytest.mark.parametrize('line', [b'7\n', b'7\r\n', b'7', b'7\r', b'0' * 30 + b'7\n'])
def test_line_endings(server, line):
    with connect(server.port) as conn:
        conn.sendall(line)
        conn.shutdown(socket.SHUT_WR)
        assert len(receive_end(conn)) == 7


def test_pipelined_requests(server):
    with connect(server.port) as conn:
        conn.sendall(b'1\n' * 1000 + b'70000\r\n' * 10 + b'5')
        conn.shutdown(socket.SHUT_WR)
        assert len(receive_end(conn)) == 1000 + 700_000 + 5


def test_pipelining_without_reading(server):
    """The server must neither store the replies nor block in a send; and it must lose none.

    Each reply goes out by one send. Without a look whether there is room, one of them blocks.
    """
    size, requests = 60_000, 500
    with connect(server.port) as conn:
        conn.sendall(b'%d\n' % size * requests)
        assert receive(conn, 1)  # it is at it
        ask(server.port)
        assert len(receive(conn, size * requests - 1)) == size * requests - 1


def test_no_stall_between_replies(server):
    """Nagle's algorithm in the server would hold back the second of two small replies."""
    with connect(server.port) as conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(51):
            start = time.monotonic()
            conn.sendall(b'1\n1\n1\n')
            assert len(receive(conn, 3)) == 3
            times.append(time.monotonic() - start)
        assert sorted(times)[25] < 0.03  # in the middle; a delayed ACK takes 40 ms


def test_bad_lines(server):
    for line in BAD_LINES:
        with connect(server.port) as bystander, connect(server.port) as conn:
            bystander.sendall(b'4')
            try:
                conn.sendall(b'9\n' + line)
                conn.shutdown(socket.SHUT_WR)
            except OSError:  # closed before it had taken all of this
                pass
            assert len(receive_end(conn)) <= 9
            error, = take_errors(server, 1)
            assert f'127.0.0.1 port {conn.getsockname()[1]}: ' in error
            assert repr(line.split(b'\n')[0][:10])[2:-1] in error
            assert error.isprintable()
            assert len(error) < 300
            bystander.sendall(b'2\n')
            assert len(receive(bystander, 42)) == 42
    ask(server.port)


def test_an_endless_line(server):
    """It is refused as soon as it is too long, without waiting for its end."""
    with connect(server.port) as conn:
        conn.sendall(b'1' * 40)
        assert receive_end(conn) == b''
    error, = take_errors(server, 1)
    assert '1' * 32 in error


def test_a_browser_is_not_reset(server):
    """What came with the bad line has been read, so close sends FIN: end of file, no error."""
    with connect(server.port) as conn:
        conn.sendall(b'GET / HTTP/1.1\r\nHost: localhost:2000\r\nUser-Agent: ' + b'M' * 500
                     + b'\r\n\r\n')
        assert conn.recv(1) == b''
    error, = take_errors(server, 1)
    assert error.endswith(r": bad request b'GET / HTTP/1.1\r'")


def test_the_replies_before_a_bad_line_arrive(server):
    with connect(server.port) as conn:
        conn.sendall(b'200000\nbad\n')
        assert len(receive_end(conn)) == 200_000
    take_errors(server, 1)


def test_limits_of_a_request(server):
    with connect(server.port) as conn:
        conn.sendall(b'%d\n' % GIBIBYTE)
        assert len(receive(conn, 100_000)) == 100_000
        reset(conn)
    with connect(server.port) as conn:
        conn.sendall(b'%d\n' % (GIBIBYTE + 1))
        assert receive_end(conn) == b''
        take_errors(server, 1)


def test_clients_that_leave(server):
    for step in range(60):
        conn = connect(server.port)
        if step % 6 in (1, 2):
            conn.sendall(b'123')
        elif step % 6 in (3, 4, 5):
            conn.sendall(b'10000000\n')
        if step % 6 == 5:
            receive(conn, 70_000)
        conn.close() if step % 2 else reset(conn)
    ask(server.port)
    assert server.err == ''


def test_a_slow_reader_delays_no_other(server):
    size = 30_000_000
    with connect(server.port) as slow:
        slow.sendall(b'%d\n' % size)
        assert len(receive(slow, 1000)) == 1000
        start = time.monotonic()
        for _ in range(20):
            ask(server.port, 100_000)
        assert time.monotonic() - start < 5
        assert len(receive(slow, size - 1000)) == size - 1000


def test_a_greedy_reader_delays_no_other(server):
    """A client that takes all that is sent must not keep an event-driven server to itself."""
    code = f"""
import socket
with socket.create_connection(('127.0.0.1', {server.port})) as conn:
    conn.sendall(b'{GIBIBYTE}\\n')
    buffer = bytearray(1 << 20)
    while conn.recv_into(buffer):
        pass
"""
    before = server.out.count(f'send {GIBIBYTE} bytes')
    greedy = subprocess.Popen([*PYTHON, '-c', code], env=ENVIRONMENT)
    try:
        wait_until(lambda: server.out.count(f'send {GIBIBYTE} bytes') > before)
        times = []
        for _ in range(10):
            start = time.monotonic()
            ask(server.port)
            times.append(time.monotonic() - start)
        assert greedy.poll() is None
        assert sorted(times)[5] < 0.3  # in the middle
    finally:
        greedy.kill()
        greedy.wait()


@pytest.mark.skipif(not LINUX, reason='reads /proc')
def test_memory_does_not_grow_with_the_request(server):
    def largest(figure):
        found = []
        for pid in processes_of(server.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                status = pathlib.Path(f'/proc/{pid}/status').read_text()
                found += re.findall(rf'{figure}:\s+(\d+)', status)
        return max(map(int, found))
    before = largest('VmRSS')
    with connect(server.port) as conn:
        conn.sendall(b'%d\n' % GIBIBYTE)
        assert len(receive(conn, 50_000_000)) == 50_000_000
        assert largest('VmHWM') < before + 40_000  # KiB
        reset(conn)


def test_clients_before_the_server_accepts(server):
    """The queue holds at least 128: no SYN is dropped, to be sent again a second later."""
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        conns, seconds = [], []
        for _ in range(130):
            start = time.monotonic()
            conns.append(connect(server.port))
            seconds.append(time.monotonic() - start)
        assert sorted(seconds)[-3] < 0.9  # a busy machine may be slow for one or two
    finally:
        os.killpg(server.pid, signal.SIGCONT)
    for conn in conns:
        with conn:
            conn.sendall(b'5\n')
            assert len(receive(conn, 5)) == 5


def test_ipv6():
    """On ::1, where the machine has it."""
    try:
        socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip('no IPv6 on this machine')
    with running('server03.py', '-i', '::1', '-p', 0, '-n', 2) as server:
        result = client(server.port, '-i', '::1', '-c', 2, '-t', 3, '-b', 5)
        assert (result.returncode, result.stderr) == (0, '')
        with socket.create_connection(('::1', server.port)) as conn:
            conn.sendall(b'bad\n')
            assert receive_end(conn) == b''
            assert f'::1 port {conn.getsockname()[1]}: ' in wait_until(lambda: server.err)
        server.stop()
