"""client.py tells the truth, also about servers that fail it in every way."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import (
    ENVIRONMENT,
    PYTHON,
    TOP,
    assert_usage_error,
    client,
    processes_of,
    reset,
    wait_until,
)


@contextlib.contextmanager
def fake_server(serve_one):
    """Run serve_one(conn) in a thread for each connection; give the port."""
    def serve(conn):
        with conn, contextlib.suppress(OSError):
            serve_one(conn)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(('127.0.0.1', 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def read_request(conn):
    """Return the number that is asked for, as the readline() of UNP would see it."""
    with conn.makefile('rb') as lines:
        line = lines.readline()
    assert re.fullmatch(rb'[1-9][0-9]*\n', line)
    return int(line)


def reply_a_byte_at_a_time(conn):
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(read_request(conn)):
        conn.sendall(b'x')
    assert conn.recv(1) == b''  # the client closes first


def test_reply_in_single_bytes():
    with fake_server(reply_a_byte_at_a_time) as port:
        result = client(port, '-c', 2, '-t', 3, '-b', 500)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.splitlines()[-1].startswith('6 connections, 3000 bytes in ')


def test_a_server_with_a_lower_cap():
    """As in UNP, where a request for more than 16384 bytes ends the child that serves it."""
    def unp(conn):
        while (size := read_request(conn)) <= 16384:
            conn.sendall(b'x' * size)
            conn.recv(1)
            return
    with fake_server(unp) as port:
        assert client(port, '-c', 2, '-t', 2, '-b', 16384).returncode == 0
        result = client(port, '-c', 2, '-t', 2, '-b', 16385)
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == [
        f'Child {number}: Server returned only 0 of 16385 bytes' for number in (0, 1)]


@pytest.mark.parametrize('given', [0, 1, 4095])
def test_short_reply(given):
    """Only what succeeded is counted."""
    served = []

    def short(conn):
        size = read_request(conn)
        served.append(conn)
        conn.sendall(b'x' * (size if len(served) <= 2 else given))
        conn.shutdown(socket.SHUT_WR)
        conn.recv(1)
    with fake_server(short) as port:
        result = client(port, '-c', 1, '-t', 5, '-b', 4096)
    assert result.returncode == 1
    assert result.stderr == f'Child 0: Server returned only {given} of 4096 bytes\n'
    assert 'is done' not in result.stdout
    assert result.stdout.startswith('2 connections, 8192 bytes in ')


def test_reset_in_the_middle():
    def rude(conn):
        conn.sendall(b'x' * (read_request(conn) // 2))
        time.sleep(0.05)
        reset(conn)
    with fake_server(rude) as port:
        result = client(port, '-c', 1, '-t', 1, '-b', 100)
    assert (result.returncode, result.stderr) == (1, 'Child 0: Connection reset by peer\n')
    assert result.stdout.startswith('0 connections, 0 bytes in ')


def test_reset_at_once():
    with fake_server(reset) as port:
        result = client(port, '-c', 2, '-t', 1)
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == [f'Child {number}: Connection reset by peer'
                                                  for number in range(2)]


def test_refusal():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))  # but it does not listen
        result = client(taken.getsockname()[1], '-c', 4)
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == [
        f'Child {number}: Connection refused' for number in range(4)]
    assert result.stdout.startswith('0 connections, 0 bytes in ')


@pytest.mark.parametrize('host', ['no.such.host.invalid', 'x' * 64 + '.y', ''])
def test_unknown_host(host):
    result = client(2000, '-c', 1, '-i', host)
    assert result.returncode == 1
    assert re.fullmatch(r'Child 0: .+\n', result.stderr)
    assert result.stdout.startswith('0 connections, 0 bytes in ')


@pytest.mark.parametrize('options', [
    ('-p', '70000'), ('-p', 'x'), ('-c', '0'), ('-c', '99999999999999999999'),
    ('-t', '-1'), ('-b', '0'), ('-b', '1.5'), ('--nonsense', '--nonsense')])
def test_bad_options(options):
    result = client(2000, *options)
    assert (result.returncode, result.stdout) == (2, '')
    assert_usage_error('client.py', options[1], result.stderr)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('whole_group', [True, False])
def test_ctrl_c(run, signum, whole_group):
    """The terminal sends it to all the processes, kill to one."""
    with fake_server(lambda conn: conn.recv(1) and time.sleep(30)) as port:
        load = run('client.py', '-p', port, '-c', 5)
        wait_until(lambda: len(processes_of(load.pid)) == 6)
        start = time.monotonic()
        os.killpg(load.pid, signum) if whole_group else os.kill(load.pid, signum)
        assert load.wait() == 1
        assert time.monotonic() - start < 1
    assert processes_of(load.pid) == []
    assert load.err == ''
    assert load.out.startswith('0 connections, 0 bytes in ')


def test_a_child_is_killed(run):
    with fake_server(lambda conn: conn.recv(1) and time.sleep(30)) as port:
        load = run('client.py', '-p', port, '-c', 2)
        wait_until(lambda: len(processes_of(load.pid)) == 3)
        os.kill(max(set(processes_of(load.pid)) - {load.pid}), signal.SIGKILL)
        wait_until(lambda: re.fullmatch(r'Child [01]: killed by signal 9\n', load.err))
        load.send_signal(signal.SIGINT)
        assert load.wait() == 1


def test_into_a_pipe_without_a_reader():
    with fake_server(reply_a_byte_at_a_time) as port:
        read_end, write_end = os.pipe()
        os.close(read_end)
        process = subprocess.Popen([*PYTHON, TOP / 'client.py', '-p', str(port), '-t', '2',
                                    '-b', '9'], stdout=write_end, stderr=subprocess.PIPE,
                                   env=ENVIRONMENT)
        os.close(write_end)
        assert process.communicate(timeout=20) == (None, b'')
        assert process.returncode == 0
