"""The meters of server03a: its table adds up, always."""
import os
import re
import signal
import subprocess

import pytest
from conftest import ENVIRONMENT, PYTHON, TOP, ask, children_of, client, wait_until


def table(server):
    """Return the table of a stopped server03a as rows (child, accepted, woken or None)."""
    pattern = r'child (\d+) +: +(\d+) times(?:, woken +(\d+) times)?'
    lines = [line for line in server.out.splitlines() if line.startswith('child ')]
    assert len({len(line) for line in lines}) == 1  # aligned
    rows = [re.fullmatch(pattern, line).groups() for line in lines]
    return [tuple(text and int(text) for text in row) for row in rows]


@pytest.mark.parametrize('options', [[], ['--select']])
@pytest.mark.parametrize('pool, clients, connections', [(10, 15, 100), (2, 8, 150), (1, 2, 50)])
def test_counts_add_up(serve, options, pool, clients, connections):
    server = serve('server03a.py', '-n', pool, *options)
    wait_until(lambda: server.out.count('Child started') == pool)
    result = client(server.port, '-c', clients, '-t', connections, '-b', 64)
    assert result.returncode == 0, result.stderr
    server.stop()
    assert server.err == ''
    rows = table(server)
    assert [number for number, _, _ in rows] == list(range(pool))
    accepted = [times for _, times, _ in rows]
    assert sum(accepted) == clients * connections
    if options:
        assert all(woken >= times for _, times, woken in rows)
    else:
        assert all(woken is None for _, _, woken in rows)
        assert min(accepted) > 0


def test_the_herd_lives_before_select(serve):
    """When all 8 children sleep, a connection that only one can have wakes them all."""
    server = serve('server03a.py', '--select', '-n', 8)
    for _ in range(40):
        wait_until(lambda: list(children_of(server.pid).values()) == ['S'] * 8)
        ask(server.port)
    server.stop()
    rows = table(server)
    assert sum(accepted for _, accepted, _ in rows) == 40
    assert sum(woken for _, _, woken in rows) > 6 * 40


def test_a_successor_goes_on_counting(serve):
    server = serve('server03a.py', '-n', 2)
    assert client(server.port, '-c', 2, '-t', 50).returncode == 0
    first = children_of(server.pid)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.out.count('Child started') == 4)
    assert client(server.port, '-c', 2, '-t', 50).returncode == 0
    server.stop(signal.SIGTERM)
    assert sum(accepted for _, accepted, _ in table(server)) == 200


def test_counts_of_an_interrupted_run_cover_the_successes(serve):
    """Every connection that the client saw served is in the table."""
    server = serve('server03a.py')
    load = subprocess.Popen([*PYTHON, TOP / 'client.py', '-p', str(server.port), '-c', '6', '-t',
                             '100000'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=ENVIRONMENT)
    wait_until(lambda: server.out.count('Got request') > 500)
    server.stop()
    out, err = load.communicate(timeout=20)
    assert load.returncode == 1
    assert len(err.splitlines()) == 6
    served = int(re.match(r'(\d+) connections, ', out)[1])
    assert served <= sum(accepted for _, accepted, _ in table(server)) <= served + 6
