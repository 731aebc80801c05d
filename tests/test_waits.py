"""What takes long: the clients and servers that say nothing.

All of it happens side by side in the background, from the moment the suite starts (see
conftest.py); these tests, the last ones, only look at how it went.
"""
import functools
import socket
import threading
import time

import pytest
from conftest import POOLS, SERVERS, ask, client, connect, receive_end, running


def watch_silent_clients(name):
    """Fill a server with clients that do not move; return what became of them."""
    hogs = {'silent': b'', 'half a line': b'12', 'stuck': b'200000000\n'}
    result = {}
    with running(name, '-p', 0, *(['-n', len(hogs)] if name in POOLS else [])) as server:
        conns = {kind: connect(server.port) for kind in hogs}
        start = time.monotonic()
        for kind, request in hogs.items():
            conns[kind].sendall(request)
        time.sleep(0.3)  # let all of them be accepted first

        def newcomer():
            ask(server.port)
            result['newcomer'] = time.monotonic() - start

        def slow_reader():
            with connect(server.port) as conn:
                conn.sendall(b'4000000\n')
                result['slow'] = 0
                while result['slow'] < 4_000_000 and (data := conn.recv(40_000)):
                    result['slow'] += len(data)
                    time.sleep(0.12)

        others = [threading.Thread(target=newcomer), threading.Thread(target=slow_reader)]
        for other in others:
            other.start()
        for kind in 'silent', 'half a line':
            receive_end(conns[kind])
            result[kind] = time.monotonic() - start
        time.sleep(max(0, start + 12 - time.monotonic()))
        result['stuck'] = len(receive_end(conns['stuck']))
        for other in others:
            other.join()
        server.stop()
        result['err'] = server.err
    return result


def watch_silent_server():
    """Let client.py wait for a server that says nothing; return how it ended."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        start = time.monotonic()
        result = client(listener.getsockname()[1], '-c', 1)
    return result.returncode, result.stdout, result.stderr, time.monotonic() - start


BACKGROUND = {'silent server': watch_silent_server, **{
    f'silent clients of {name}': functools.partial(watch_silent_clients, name)
    for name in SERVERS}}


@pytest.mark.parametrize('name', SERVERS)
def test_silent_and_stuck_clients(background, name):
    """They fill the pool, and are closed after TIMEOUT; whoever waited is served then."""
    result = background[f'silent clients of {name}']()
    assert result['err'] == ''
    assert 9.9 < result['silent'] < 13
    assert 9.9 < result['half a line'] < 13
    assert result['stuck'] < 200_000_000
    assert (9 if name in POOLS else 0) < result['newcomer'] < (13 if name in POOLS else 3)
    assert result['slow'] == 4_000_000  # reads a little all the time: nobody closes it


def test_client_of_a_silent_server(background):
    status, out, err, seconds = background['silent server']()
    assert (status, err) == (1, 'Child 0: timed out\n')
    assert out.startswith('0 connections, 0 bytes in ')
    assert seconds < 35
