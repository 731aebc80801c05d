"""What takes long: the clients and servers that say nothing.

All of it happens side by side in the background, from the moment the suite starts (see
conftest.py); these tests, the last ones, only look at how it went.
"""
import contextlib
import fcntl
import functools
import os
import pathlib
import re
import signal
import socket
import threading
import time

import pytest
from conftest import (
    EVENT_DRIVEN,
    LINUX,
    POOLS,
    SERVERS,
    ask,
    bytes_in,
    client,
    connect,
    receive,
    receive_end,
    running,
    wait_until,
)


def in_the_kernel(port, peer):
    """Return how many bytes the kernel holds for a server's end of a connection."""
    table = pathlib.Path('/proc/net/tcp').read_text()
    found = re.search(rf':{port:04X} \w+:{peer:04X} \w\w (\w+):', table)
    return int(found[1], 16) if found else 0


def watch_silent_clients(name):
    """Fill a server with clients that do not move, but for one; return what became of them."""
    hogs = {'silent': b'', 'half a line': b'12', 'stuck': b'200000000\n'}
    result = {'steady': 0}
    with running(name, '-p', 0, *(['-n', len(hogs) + 1] if name in POOLS else [])) as server:
        def steady_reader():
            with steady, contextlib.suppress(ConnectionError):
                steady.sendall(b'2700000\n')
                while result['steady'] < 2_700_000 and (data := receive(steady, 20_000)):
                    result['steady'] += len(data)
                    time.sleep(0.1)
                steady.sendall(b'7\n')
                result['steady'] += len(receive(steady, 7))

        start = time.monotonic()  # earlier than the server's own clock: it cannot seem too quick
        steady = connect(server.port)
        conns = {kind: connect(server.port) for kind in hogs}
        for kind, request in hogs.items():
            conns[kind].sendall(request)
        time.sleep(0.3)  # let all of them be accepted first

        def newcomer():
            ask(server.port)
            result['newcomer'] = time.monotonic() - start

        others = [threading.Thread(target=newcomer), threading.Thread(target=steady_reader)]
        for other in others:
            other.start()
        for kind in 'silent', 'half a line':
            receive_end(conns[kind])
            result[kind] = time.monotonic() - start
        for other in others:
            other.join()
        time.sleep(max(0, start + 14 - time.monotonic()))
        peer = conns['stuck'].getsockname()[1]
        kept = True
        while kept and time.monotonic() < start + 24:
            time.sleep(0.1)
            kept = LINUX and in_the_kernel(server.port, peer)
        result['kept'] = kept
        result['stuck'] = len(receive_end(conns['stuck']))
        server.stop()
        result['err'] = server.err
    return result


def stop_and_continue(name):
    """Stop a server for longer than TIMEOUT; return the replies to what came meanwhile."""
    with running(name, '-p', 0, *(['-n', 5] if name in POOLS else [])) as server:
        conns = [connect(server.port) for _ in range(5)]
        for conn in conns:
            conn.sendall(b'1\n')
            assert receive(conn, 1)  # it has been accepted
        os.killpg(server.pid, signal.SIGSTOP)
        for conn in conns:
            conn.sendall(b'3\n')
        time.sleep(11)
        os.killpg(server.pid, signal.SIGCONT)
        return [len(receive(conn, 3)) for conn in conns]


def block_stdout(name):
    """Leave a server's stdout unread for longer than TIMEOUT; return the same."""
    read_end, write_end = os.pipe()
    capacity = fcntl.fcntl(read_end, 1032)  # F_GETPIPE_SZ, in the module since Python 3.10
    with open(read_end, 'rb') as output, running(name, '-p', 0, stdout=write_end) as server:
        os.close(write_end)
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
        replies = [len(receive(conn, size)) for conn, size in zip(conns, [5000, 3, 3, 3, 3])]
        server.stop()
        reader.join()
        return replies


def watch_silent_server():
    """Let client.py wait for a server that says nothing; return how it ended."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        start = time.monotonic()
        result = client(listener.getsockname()[1], '-c', 1)
    return result.returncode, result.stdout, result.stderr, time.monotonic() - start


BACKGROUND = {'silent server': watch_silent_server, **{
    f'silent clients of {name}': functools.partial(watch_silent_clients, name)
    for name in SERVERS}}
BACKGROUND.update({f'stop and continue {name}': functools.partial(stop_and_continue, name)
                   for name in SERVERS})
if LINUX:
    BACKGROUND.update({f'stdout of {name}': functools.partial(block_stdout, name)
                       for name in EVENT_DRIVEN})


@pytest.mark.parametrize('name', SERVERS)
def test_silent_and_stuck_clients(background, name):
    """They fill the pool, and are closed after TIMEOUT; those who waited are served then."""
    result = background[f'silent clients of {name}']()
    assert result['err'] == ''
    assert 9.9 < result['silent'] < 13
    assert 9.9 < result['half a line'] < 13
    assert result['stuck'] < 200_000_000
    assert (9 if name in POOLS else 0) < result['newcomer'] < (13 if name in POOLS else 3)
    assert result['steady'] == 2_700_007  # reads a little all the time, and so is not silent
    assert not result['kept']  # the kernel has freed what the stuck one has not read


@pytest.mark.parametrize('name', SERVERS)
def test_not_the_clients_were_silent(background, name):
    """Those are served who have spoken while the server itself was stopped."""
    assert background[f'stop and continue {name}']() == [3] * 5


@pytest.mark.skipif(not LINUX, reason='knows the size of a pipe on Linux')
@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_not_the_clients_were_silent_but_stdout_blocked(background, name):
    assert background[f'stdout of {name}']() == [5000, 3, 3, 3, 3]


def test_client_of_a_silent_server(background):
    status, out, err, seconds = background['silent server']()
    assert (status, err) == (1, 'Child 0: timed out\n')
    assert out.startswith('0 connections, 0 bytes in ')
    assert seconds < 35
