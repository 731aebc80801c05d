"""The demonstrations of chapter 2: each prints what its page says, signals and all."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ENVIRONMENT, PYTHON, TOP, wait_until


def finish(script, status):
    """Wait for a script to end with *status*."""
    assert script.wait() == status, script.err


def assert_refused(name, option, value):
    """A bad option gets argparse's usage, its one line of error, and status 2."""
    result = subprocess.run([*PYTHON, TOP / name, option, value], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=20)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith(f'usage: {name} ')
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f'{name}: error: ')
    assert value in last


# rstserver and sigpipe

def test_every_connection_is_reset(serve):
    server = serve('rstserver.py')
    for _ in range(100):
        with socket.socket() as conn:
            conn.bind(('127.0.0.1', 0))
            host, port = conn.getsockname()
            with pytest.raises(ConnectionResetError):
                conn.connect(('127.0.0.1', server.port))  # may report it, if the RST is quick
                conn.recv(1)
            wait_until(lambda: f'Sent RST to {host} port {port}\n' in server.out)
    server.stop()
    assert server.err == ''


@pytest.mark.parametrize('host', ['no.such.invalid', '192.0.2.1'])
def test_rstserver_cannot_listen_there(run, host):
    server = run('rstserver.py', '-p', 0, '-i', host)
    finish(server, 2)
    assert host in server.err
    assert server.err.count('\n') == 1


@pytest.mark.parametrize('name', ['rstserver.py', 'sigpipe.py'])
@pytest.mark.parametrize('port', ['x', '65536', '-1'])
def test_bad_port(name, port):
    assert_refused(name, '-p', port)


def test_sigpipe(serve, run):
    script = run('sigpipe.py', '-p', serve('rstserver.py').port)
    finish(script, 1)
    assert script.out == '[Errno 104] Connection reset by peer\n\n'
    assert script.err.startswith('Traceback (most recent call last):\n')
    assert script.err.endswith('\nBrokenPipeError: [Errno 32] Broken pipe\n')


def test_sigpipe_default(serve, run):
    """The kernel kills the process; the shell makes 141 of it."""
    script = run('sigpipe.py', '-p', serve('rstserver.py').port, '--default')
    finish(script, -signal.SIGPIPE)
    assert script.out == '[Errno 104] Connection reset by peer\n\n'
    assert script.err == ''


SLOW_CONNECT = """
import runpy, socket, sys, time
class SlowSocket(socket.socket):
    def connect(self, address):
        self.setblocking(False)
        self.connect_ex(address)
        time.sleep(0.3)
        self.setblocking(True)
        if error := self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise ConnectionResetError(error, 'from connect')
socket.socket = SlowSocket
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('options, status', [([], 1), (['--default'], -signal.SIGPIPE)])
def test_sigpipe_when_connect_reports_the_reset(serve, run, options, status):
    """As it may on a busy machine, when the RST comes before connect has returned."""
    port = serve('rstserver.py').port
    script = run('sigpipe.py', command=[*PYTHON, '-c', SLOW_CONNECT, TOP / 'sigpipe.py', '-p',
                                        str(port), *options])
    finish(script, status)
    assert script.out == '[Errno 104] from connect\n\n'
    assert ('\nBrokenPipeError: [Errno 32] Broken pipe\n' in script.err) == (status == 1)


def test_sigpipe_without_rstserver(run):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))  # but it does not listen
        port = taken.getsockname()[1]
        script = run('sigpipe.py', '-p', port)
        finish(script, 1)
    assert script.out == ''
    assert re.fullmatch(rf'.*port {port}: .*Connection refused.*rstserver\.py.*\n', script.err)


def test_sigpipe_with_another_server(run):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        script = run('sigpipe.py', '-p', listener.getsockname()[1])
        listener.accept()[0].close()
        finish(script, 1)
    assert script.err == 'no reset came: this is not rstserver.py\n'


# selsigrace and selfpipe

@contextlib.contextmanager
def some_stdin(kind):
    """Give a standard input that is at end of file, silent, full of data or closed."""
    if kind == 'end of file':
        yield {'stdin': subprocess.DEVNULL}
    elif kind == 'closed':
        yield {'stdin': None, 'preexec_fn': lambda: os.close(0)}
    else:
        read_end, write_end = os.pipe()
        if kind == 'data':
            os.write(write_end, b'data\n')
        yield {'stdin': read_end}
        os.close(read_end)
        os.close(write_end)


def is_blocked(pid):
    """Tell whether a process sleeps in a system call that waits for descriptors."""
    if sys.platform != 'linux':
        time.sleep(0.5)
        return True
    with open(f'/proc/{pid}/wchan') as wchan, open(f'/proc/{pid}/stat') as stat:
        return stat.read().rpartition(')')[2].split()[0] == 'S' and 'sleep' not in wchan.read()


STDINS = ['end of file', 'silent', 'data', 'closed']


@pytest.mark.waits
@pytest.mark.parametrize('stdin', STDINS)
def test_selsigrace(run, stdin):
    """A signal that comes before select is missed; one that comes during it is not."""
    with some_stdin(stdin) as settings:
        script = run('selsigrace.py', '-s', 3, **settings)
        wait_until(lambda: script.out == f'PID: {script.pid}\nSleep for 3 secs\n')
        script.send_signal(signal.SIGUSR1)
        asleep = f'PID: {script.pid}\nSleep for 3 secs\nWake up and block in "select"\n'
        wait_until(lambda: script.out == asleep)
        time.sleep(0.3)  # nothing happens
        assert script.process.poll() is None
        assert script.out == asleep
        wait_until(lambda: is_blocked(script.pid))
        script.send_signal(signal.SIGUSR1)
        finish(script, 0)
    assert script.out == asleep + 'Got signal\n'
    assert script.err == ''


def test_two_signals_in_a_row(run):
    """The second must not kill a process that is about to end because of the first."""
    for pause in range(5):
        script = run('selsigrace.py', '-s', 0)
        wait_until(lambda: 'Wake up' in script.out and is_blocked(script.pid))
        script.send_signal(signal.SIGUSR1)
        time.sleep(pause / 500)
        script.send_signal(signal.SIGUSR1)
        finish(script, 0)


@pytest.mark.parametrize('stdin', STDINS)
@pytest.mark.parametrize('during_sleep', [True, False])
def test_selfpipe(run, stdin, during_sleep):
    with some_stdin(stdin) as settings:
        script = run('selfpipe.py', *(['-s', 0.4] if during_sleep else []), **settings)
        begun = f'PID: {script.pid}\n' + during_sleep * 'Sleep for 0.4 secs\n'
        wait_until(lambda: script.out == begun)
        if not during_sleep:
            wait_until(lambda: is_blocked(script.pid))
        assert script.process.poll() is None
        script.send_signal(signal.SIGUSR1)
        finish(script, 0)
    assert script.out == begun + 'Got signal\n'
    assert script.err == ''


def test_a_signal_just_before_select():
    """It comes when Python has looked for signals for the last time, and select has not begun."""
    code = f"""
import ctypes, functools, operator, runpy, select, signal, sys
real, call = select.select, operator.methodcaller('__call__')
def select_too_late(*watched):  # map has no steps of Python between its two calls in C
    come = functools.partial(getattr(ctypes.CDLL(None), 'raise'), signal.SIGUSR1)
    return list(map(call, [come, functools.partial(real, *watched)]))[1]
select.select = select_too_late
sys.argv = ['selfpipe.py']
runpy.run_path({str(TOP / 'selfpipe.py')!r}, run_name='__main__')
"""
    result = subprocess.run([*PYTHON, '-c', code], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=20)
    assert re.fullmatch(r'PID: \d+\nGot signal\n', result.stdout)
    assert (result.returncode, result.stderr) == (0, '')


@pytest.mark.parametrize('secs', [0, 1])
def test_a_flood_of_signals(run, secs):
    """With a second of sleep, 100,000 signals more than fill the pipe of 65,536 bytes."""
    script = run('selfpipe.py', '-s', secs)
    wait_until(lambda: script.out)
    for _ in range(100_000):
        script.send_signal(signal.SIGUSR1)  # does nothing once the process has ended
    finish(script, 0)
    assert script.out == (f'PID: {script.pid}\n' + bool(secs) * f'Sleep for {secs} secs\n'
                          + 'Got signal\n')
    assert script.err == ''


@pytest.mark.parametrize('name', ['selsigrace.py', 'selfpipe.py'])
def test_ctrl_c_ends_them_without_a_traceback(run, name):
    script = run(name)
    wait_until(lambda: script.out)
    script.send_signal(signal.SIGINT)
    finish(script, -signal.SIGINT)
    assert script.err == ''


@pytest.mark.parametrize('name', ['selsigrace.py', 'selfpipe.py'])
@pytest.mark.parametrize('value', ['-1', 'soon', 'nan'])
def test_bad_sleep(name, value):
    assert_refused(name, '-s', value)
