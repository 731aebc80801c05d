"""What takes long: the clients and servers that say nothing.

All of it happens side by side in the background, from the moment the suite starts (see
conftest.py); these tests, the last ones, only look at how it went.
"""
import pytest
from conftest import POOLS, SERVERS

HOGS = 3


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
