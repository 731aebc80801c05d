"""The demonstrations of chapter 3: sendfile, also with awkward files, and TCP_CORK."""
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, LINUX, PYTHON, TOP, processes, processes_of, wait_until

METHODS = ['read/write 4 KiB', 'read/write 64 KiB', 'read/write 1 MiB', 'sendfile']


def ignore_children():
    """Be one of those that start programs with SIGCHLD ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def send(*options):
    """Run sendfile_demo.py to its end."""
    return subprocess.run([*PYTHON, TOP / 'sendfile_demo.py', *map(str, options)],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=50,
                          preexec_fn=ignore_children)


def table(text):
    """Return {method: figures} of the table in the output."""
    rows = [re.split(r' {2,}', line.strip()) for line in text.splitlines()[2:]]
    return {row[0]: [float(figure) for figure in row[1:]] for row in rows}


def test_the_table(tmp_path):
    environment = {**ENVIRONMENT, 'TMPDIR': str(tmp_path)}
    result = subprocess.run([*PYTHON, TOP / 'sendfile_demo.py', '-m', '3'], capture_output=True,
                            text=True, env=environment, timeout=50)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith('Sending 3000000 bytes. ')
    rows = table(result.stdout)
    assert list(rows) == METHODS
    assert rows['read/write 4 KiB'][-1] >= 2 * 733  # a read and a send for each block
    assert rows['read/write 64 KiB'][-1] >= 2 * 46
    assert rows['read/write 1 MiB'][-1] >= 2 * 3
    assert rows['sendfile'][-1] < 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('size', [0, 1, 4096, 65537])
def test_a_file_of_ones_own(tmp_path, size):
    path = tmp_path / 'a file'
    path.write_bytes(os.urandom(size))
    result = send('-f', path)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith(f'Sending {size} bytes. ')
    assert list(table(result.stdout)) == METHODS
    assert path.stat().st_size == size


@pytest.mark.parametrize('kind', ['missing', 'directory', 'fifo', 'empty name'])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / 'it'
    if kind == 'directory':
        path.mkdir()
    elif kind == 'fifo':
        os.mkfifo(path)
    result = send('-f', '' if kind == 'empty name' else path)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.count('\n') == 1
    assert ("''" if kind == 'empty name' else str(path)) in result.stderr


@pytest.mark.parametrize('value', ['0', '-1', 'much'])
def test_bad_size(value):
    result = send('-m', value)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith('usage: sendfile_demo.py ')
    assert value in result.stderr.splitlines()[-1]


def test_a_file_that_shrinks(run, tmp_path):
    path = tmp_path / 'shrinking'
    with open(path, 'wb') as file:
        file.truncate(400_000_000)  # no block of it is on the disk
    script = run('sendfile_demo.py', '-f', path)
    wait_until(lambda: script.out.count('\n') >= 2)
    os.truncate(path, 1000)
    assert script.wait() == 1
    assert re.fullmatch(r'.*shrinking.* ends after .* has it shrunk\?\n', script.err)
    assert processes_of(script.pid) == []


@pytest.mark.parametrize('function, rows', [('pread', 0), ('sendfile', 3)])
def test_a_file_that_shrinks_just_before(tmp_path, function, rows):
    """Before the fourth system call of one kind in the sender."""
    path = tmp_path / 'shrinking'
    path.write_bytes(os.urandom(3_000_000))
    code = f"""
import os, runpy, sys
real, calls = os.{function}, 0
def shrink(*args):
    global calls
    calls += os.getpid() == sender
    if calls == 4:
        os.truncate({str(path)!r}, 1000)
    return real(*args)
sender, os.{function} = os.getpid(), shrink
sys.argv = ['sendfile_demo.py', '-f', {str(path)!r}]
runpy.run_path({str(TOP / 'sendfile_demo.py')!r}, run_name='__main__')
"""
    result = subprocess.run([*PYTHON, '-c', code], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=20)
    assert result.returncode == 1
    assert result.stdout.count('\n') == 2 + rows
    assert re.fullmatch(r'.*shrinking.* ends after .* has it shrunk\?\n', result.stderr)


def test_more_than_2_gib():
    """Only call the source's own function, for the whole demonstration would take a minute."""
    folder = '/dev/shm' if os.path.isdir('/dev/shm') else None  # what is a hole takes no memory
    code = f"""
import runpy, tempfile
demo = runpy.run_path({str(TOP / 'sendfile_demo.py')!r})
with tempfile.TemporaryFile(buffering=0, dir={folder!r}) as file:
    file.truncate({2 ** 31 + 5})
    print(demo['transfer']('sendfile', file, {2 ** 31 + 5})[3])
"""
    result = subprocess.run([*PYTHON, '-c', code], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=55)
    assert (result.returncode, result.stderr) == (0, '')
    assert int(result.stdout) >= 2


def test_a_wrong_byte_is_noticed(tmp_path):
    code = f"""
import os, runpy
demo = runpy.run_path({str(TOP / 'sendfile_demo.py')!r})
def send_wrongly(conn, file, size, block):
    conn.sendall(os.pread(file.fileno(), size - 1, 0) + b'?')
    return 1
demo['METHODS']['sendfile'] = 1
demo['transfer'].__globals__['send_by_sendfile'] = send_wrongly
with open({str(TOP / 'LICENSE')!r}, 'rb', buffering=0) as file:
    demo['transfer']('sendfile', file, os.fstat(file.fileno()).st_size, check=True)
"""
    result = subprocess.run([*PYTHON, '-c', code], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=50)
    assert result.stderr.endswith('OSError: what arrived is not what was sent\n')


@pytest.mark.parametrize('name', ['sendfile_demo.py', 'tcpcork_demo.py'])
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_an_early_end(run, tmp_path, name, signum):
    if name == 'tcpcork_demo.py' and not LINUX:
        pytest.skip('TCP_CORK exists on Linux only')
    size = ['-m', 50] if name == 'sendfile_demo.py' else []
    script = run(name, *size, env={**ENVIRONMENT, 'TMPDIR': str(tmp_path)})
    wait_until(lambda: script.out or len(list(processes_of(script.pid))) > 1)
    script.send_signal(signum)
    assert script.wait() == -signum
    assert script.err == ''
    wait_until(lambda: not [pid for pid, _, session, state in processes()
                            if session == script.pid and state != 'Z'])  # init will collect it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not LINUX, reason='TCP_CORK exists on Linux only')
def test_tcp_cork():
    """The stall of plain must show, and that neither of the two others has it."""
    result = subprocess.run([*PYTHON, TOP / 'tcpcork_demo.py'], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=55, preexec_fn=ignore_children)
    assert (result.returncode, result.stderr) == (0, '')
    rows = table(result.stdout)
    assert list(rows) == ['plain', 'TCP_NODELAY', 'TCP_CORK', 'TCP_CORK left on']
    plain, nodelay, cork, left_on = rows.values()
    assert cork[0] == cork[3] == left_on[0] == 1  # segments in the first round and the others
    assert cork[0] < plain[0]
    assert cork[3] < plain[3]
    assert cork[0] < nodelay[0]
    assert plain[5] > 2 * nodelay[5]  # milliseconds to the answer
    assert plain[5] > 2 * cork[5]
    assert left_on[5] > plain[5]


@pytest.mark.parametrize('name, missing', [('tcpcork_demo.py', 'socket.TCP_CORK'),
                                           ('server07.py', 'select.epoll')])
def test_what_a_system_may_lack(name, missing):
    """One clear line, exit status 1."""
    module, _, attribute = missing.partition('.')
    code = f"""
import runpy, sys, {module}
if hasattr({module}, {attribute!r}):
    del {missing}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    result = subprocess.run([*PYTHON, '-c', code, TOP / name], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=50)
    assert (result.returncode, result.stdout) == (1, '')
    assert re.fullmatch(r'.* this system has no .*\n', result.stderr)


@pytest.mark.parametrize('name, options', [('sendfile_demo.py', ['-m', '1']),
                                           ('tcpcork_demo.py', [])])
def test_no_process_for_the_receiver(name, options):
    """One clear line, exit status 1."""
    code = f"""
import os, runpy, sys
def fork():
    raise BlockingIOError(11, 'scarce')
os.fork = fork
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    result = subprocess.run([sys.executable, '-c', code, TOP / name, *options],
                            capture_output=True, text=True, env=ENVIRONMENT, timeout=50)
    assert result.returncode == 1
    assert re.fullmatch(rf'.*{name}: error: .*scarce\n', result.stderr)
