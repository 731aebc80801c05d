"""The conduct that every server shares, one row of the table after the other.

Here each test starts a server of its own, to do to it what others should not see.
"""
import contextlib
import fcntl
import os
import pathlib
import re
import resource
import select
import signal
import socket
import subprocess
import time

import pytest
from conftest import (
    ENVIRONMENT,
    EVENT_DRIVEN,
    LINUX,
    POOLS,
    PREFORKED,
    PYTHON,
    SERVERS,
    TOP,
    ask,
    assert_usage_error,
    awake_seconds,
    bytes_in,
    children_of,
    client,
    connect,
    processes,
    processes_of,
    receive,
    receive_end,
    wait_until,
)

every_server = pytest.mark.parametrize('name', SERVERS)


def limit_descriptors(soft, hard=None):
    """Return a function that leaves the process it runs in with that many."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard or soft))


def assert_idle(*servers):
    """Servers that have nothing to do must wait, not spin."""
    pids = [server.pid for server in servers]

    def is_quiet():
        before, start = list(map(awake_seconds, pids)), time.monotonic()
        time.sleep(0.25)
        after = list(map(awake_seconds, pids))
        seconds = time.monotonic() - start
        # The difference of two Counters leaves out what has ended in between.
        return all(sum((new - old).values()) < seconds / 2 for new, old in zip(after, before))

    wait_until(is_quiet)  # it may still be busy with those that it has accepted


# SIGINT or SIGTERM: listening stops, no child is left, status 0, the port is free at once.

@every_server
def test_stop_with_clients_connected(serve, name):
    port = 0
    for signum in signal.SIGINT, signal.SIGTERM:
        server = serve(name, '-p', port)
        port = server.port
        with connect(port) as silent, connect(port) as stuck:
            silent.sendall(b'12')
            stuck.sendall(b'200000000\n')
            assert receive(stuck, 1)
            start = time.monotonic()
            server.stop(signum)
            assert time.monotonic() - start < 9  # a server that waits for its clients takes 10
        assert 'Traceback' not in server.err
        with pytest.raises(ConnectionError):
            connect(port)


@pytest.mark.skipif(not LINUX, reason='reads /proc')
def test_no_wait_is_long(serve):
    """A signal that comes just before a wait, other than sigwait, is heard when the wait ends."""
    def waits(server):
        text = pathlib.Path(f'/proc/{server.pid}/status').read_text()
        return int(re.search(r'^voluntary_ctxt_switches:\s+(\d+)', text, re.MULTILINE)[1])
    names = ['server01.py', 'server04.py', 'server05.py', *EVENT_DRIVEN, 'rstserver.py']
    servers = [serve(name) for name in names]
    assert_idle(*servers)
    before = [waits(server) for server in servers]
    wait_until(lambda: all(map(int.__gt__, map(waits, servers), before)), seconds=5)


@every_server
def test_stop_twice(serve, name):
    """Even if the signals were blocked when it started, as its parent may have them."""
    signals = signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    server = serve(name, preexec_fn=lambda: signal.pthread_sigmask(*signals))
    server.send_signal(signal.SIGTERM)
    for _ in range(20):
        server.send_signal(signal.SIGINT)
    assert server.wait() == 0
    assert server.err == ''
    assert processes_of(server.pid) == []


@every_server
def test_in_the_background_of_sh_into_a_file(run, tmp_path, name):
    """sh starts a background job with SIGINT ignored. The file gets every line, and each once."""
    output = tmp_path / 'out'
    python = ' '.join(PYTHON)
    job = run(name, command=['sh', '-c', f'{python} {name} -p 0 >{output} & echo $!; wait $!'])
    pid = int(wait_until(lambda: output.exists() and job.out))
    port = int(wait_until(lambda: re.search(r'port (\d+) ', output.read_text()))[1])
    assert client(port, '-c', 3, '-t', 5, '-b', 6).returncode == 0
    pool = 10 if name in POOLS else 0
    wait_until(lambda: output.read_text().count(' started with ') == pool)
    os.kill(pid, signal.SIGINT)
    assert job.wait() == 0
    assert processes_of(job.pid) == []
    assert job.err == ''
    lines = output.read_text().splitlines()
    assert lines.count(f'Listening on port {port} ...') == 1
    assert lines.count('Got request to send 6 bytes. Sending them all...') == 15
    table = sum(line.startswith('child ') for line in lines)
    assert table == (pool if name == 'server03a.py' else 0)
    assert len(lines) == 16 + pool + table


@every_server
def test_the_reader_of_stdout_leaves(run, name):
    """As in 'python server01.py | head -1': the clients must not notice, nor stderr."""
    read_end, write_end = os.pipe()
    server = run(name, '-p', 0, stdout=write_end)
    os.close(write_end)
    with open(read_end) as pipe:
        port = int(re.fullmatch(r'Listening on port (\d+) \.\.\.\n', pipe.readline())[1])
    for _ in range(3):
        ask(port)
    server.stop()
    assert server.err == ''


@pytest.mark.skipif(not LINUX, reason='sets the size of a pipe, as Linux can')
@every_server
def test_stop_while_stdout_is_full(run, name):
    for signum in signal.SIGINT, signal.SIGTERM:
        read_end, write_end = os.pipe()
        size = fcntl.fcntl(write_end, 1031, 1)  # F_SETPIPE_SZ, in the module since Python 3.10
        os.write(write_end, b' ' * (size - 40))  # there is room for the first line, and no other
        with socket.socket() as reserved, contextlib.ExitStack() as stack:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(('127.0.0.1', 0))  # as it does not listen, the server may
            port = reserved.getsockname()[1]
            server = run(name, '-p', port, stdout=write_end)
            wait_until(lambda: bytes_in(read_end) > size - 40)
            for _ in range(2):
                stack.enter_context(connect(port)).sendall(b'1\n')
            assert_idle(server)  # all that print a line wait
            start = time.monotonic()
            server.stop(signum)
            assert time.monotonic() - start < 9  # it waits neither for a reader nor for clients
            assert server.err == ''
        os.close(read_end)
        os.close(write_end)


@pytest.mark.skipif(not LINUX, reason='reads /proc')
@every_server
def test_stop_while_stdout_has_been_full_from_the_start(run, name):
    """The first line is written before the servers with children block their signals."""
    read_end, write_end = os.pipe()
    os.write(write_end, b' ' * fcntl.fcntl(write_end, 1031, 1))
    server = run(name, '-p', 0, stdout=write_end)
    wait_until(lambda: 'pipe' in pathlib.Path(f'/proc/{server.pid}/wchan').read_text())
    server.stop(signal.SIGTERM)
    assert server.err == ''
    os.close(read_end)
    os.close(write_end)


RESOLVER = """
import os, runpy, socket, sys
def getaddrinfo(*args, **kwargs):
    os.write(2, b'resolving')
    os.read(os.pipe()[0], 1)
socket.getaddrinfo = getaddrinfo
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('name', [*SERVERS, 'rstserver.py'])
def test_stop_while_the_resolver_is_silent(run, name):
    """It does not listen yet, so the signals do what they do by default, SIGINT even if ignored."""
    for signum in signal.SIGINT, signal.SIGTERM:
        server = run(name, command=[*PYTHON, '-c', RESOLVER, TOP / name],
                     preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        wait_until(lambda: server.err)
        server.send_signal(signum)
        assert server.wait() == -signum
        assert (server.out, server.err) == ('', 'resolving')


AT_A_BAD_MOMENT = """
import os, runpy, signal, sys
write, fork = os.write, os.fork
def write_and_signal(descriptor, data):
    size = write(descriptor, data)
    if data.startswith(b'Listening'):
        os.kill(os.getpid(), signal.SIGTERM)
    return size
def fork_and_signal():
    pid = fork()
    if pid:
        os.kill(os.getpid(), signal.SIGINT)
    return pid
os.{0} = {0}_and_signal
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('name, call', [
    *((name, 'write') for name in SERVERS),
    *((name, 'fork') for name in ['server01.py', *PREFORKED])])
def test_stop_at_a_bad_moment(run, name, call):
    """As soon as the server listens, and before it can remember the child that it has forked."""
    server = run(name, command=[*PYTHON, '-c', AT_A_BAD_MOMENT.format(call), TOP / name,
                                '-p', '0'])
    if (name, call) == ('server01.py', 'fork'):
        connect(server.port).close()
    assert server.wait() == 0
    assert server.err == ''
    assert processes_of(server.pid) == []
    assert server.out.count(' started with ') <= (call == 'fork')


KILL = """
import os, runpy, sys
real = os.kill
def kill(pid, signum):
    os.write(2, b'%d\\n' % pid)
    real(pid, signum)
os.kill = kill
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_server01_kills_no_stranger(run):
    """By now, other processes may have the numbers of the children that have ended."""
    server = run('server01.py', command=[*PYTHON, '-c', KILL, TOP / 'server01.py', '-p', '0'])
    for _ in range(3):
        ask(server.port)
    wait_until(lambda: not children_of(server.pid))
    with connect(server.port) as conn:
        conn.sendall(b'1\n')
        assert receive(conn, 1)
        child, = children_of(server.pid)
        server.stop()
    assert server.err == f'{child}\n'


def run_with(name, *cases):
    """Run a script with one bad option after the other; give each option's value and stderr."""
    processes = [subprocess.Popen([*PYTHON, TOP / name, '-p', '0', *map(str, case)], text=True,
                                  env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for case in cases]
    for (*_, value), process in zip(cases, processes):
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (2, '')
        yield str(value), err


@every_server
def test_an_address_that_cannot_be_had(serve, name):
    """One line of error that names it, status 2."""
    cases = [('-p', serve(name).port), ('-i', 'no.such.host.invalid')]
    if name == 'server03.py':
        cases += [('-i', ''), ('-i', 'x' * 64 + '.y'), ('-i', '192.0.2.1')]
    for value, err in run_with(name, *cases):
        assert err.count('\n') == 1
        assert value in err
        assert name in err


@every_server
def test_bad_options(name):
    cases = [('-p', '70000')]
    cases += [('-n', '0'), ('-n', 'many')] if name in POOLS else []
    if name == 'server03.py':
        cases += [('-p', '-1'), ('-p', 'http'), ('-n', '-5'), ('-n', '99999999999999999999'),
                  ('--nonsense',)]
    for value, err in run_with(name, *cases):
        assert_usage_error(name, value, err)


def test_help():
    result = subprocess.run([*PYTHON, TOP / 'server03.py', '-h'], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=20)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith('usage: server03.py [-h] ')


@pytest.mark.skipif(not LINUX, reason='other systems may refuse the name')
def test_a_name_that_is_not_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b'/caf\xe9.py'
    os.symlink(os.fsencode(TOP / 'server01.py'), path)
    result = subprocess.run([*PYTHON, path, '-i', '192.0.2.1'], capture_output=True,
                            env=ENVIRONMENT, timeout=20)
    assert (result.returncode, result.stdout) == (2, b'')
    assert result.stderr.startswith(path + b': error: cannot listen on ')
    assert result.stderr.count(b'\n') == 1


# A crowd that asks without end has its turn, and so have the others.

GREEDY = """
import select, socket, sys
port, count = map(int, sys.argv[1:])
poller, conns = select.poll(), {}
for _ in range(count):
    conn = socket.create_connection(('127.0.0.1', port))
    conn.setblocking(False)
    poller.register(conn, select.POLLIN | select.POLLOUT)
    conns[conn.fileno()] = conn
while True:
    for descriptor, event in poller.poll():
        try:
            if event & select.POLLIN:
                conns[descriptor].recv(65536)
            if event & select.POLLOUT:
                conns[descriptor].send(b'1\\n' * 500)
        except BlockingIOError:  # there was little room
            pass
"""


@pytest.mark.serial
@every_server
def test_a_greedy_crowd(serve, name):
    """An event loop goes round; the system divides its time between processes or threads."""
    crowd, typical, worst = (300, 0.25, 1) if name in EVENT_DRIVEN else (4, 0.5, 5)
    server = serve(name)
    greedy = subprocess.Popen([*PYTHON, '-c', GREEDY, str(server.port), str(crowd)],
                              env=ENVIRONMENT)
    try:
        wait_until(lambda: server.out.count('send 1 bytes') > 5 * crowd)
        times = []
        while len(times) < 9:
            start = time.monotonic()
            ask(server.port)
            times.append(time.monotonic() - start)
            assert times[-1] < worst
        assert sorted(times)[4] < typical
        assert greedy.poll() is None
    finally:
        greedy.kill()
        greedy.wait()


@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_one_request_a_turn(serve, name):
    """Even if the reply has left at once, and the next request is there."""
    server = serve(name)
    with connect(server.port) as first, connect(server.port) as polite, \
            connect(server.port) as last:
        for conn in first, polite, last:
            conn.sendall(b'1\n')
            assert receive(conn, 1)
        server.send_signal(signal.SIGSTOP)
        wait_until(lambda: children_of(os.getpid())[server.pid] == 'T')
        for conn, requests in [(first, b'1\n' * 500), (polite, b'22\n'), (last, b'1\n' * 500)]:
            conn.sendall(requests)
        server.send_signal(signal.SIGCONT)
        for conn, size in (first, 500), (polite, 22), (last, 500):
            assert len(receive(conn, size)) == size
    wait_until(lambda: 'send 22 bytes' in server.out)
    assert server.out.partition('send 22 bytes')[0].count('send 1 bytes') < 10


# Children that die, processes and threads that cannot be had.

@pytest.mark.parametrize('name', PREFORKED)
@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_dead_child_is_replaced(serve, name, signum):
    """Even if SIGCHLD was ignored when the server started, so that no child can be reaped."""
    server = serve(name, '-n', 3,
                   preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    wait_until(lambda: server.out.count('Child started') == 3)
    first = children_of(server.pid)
    for pid in first:
        os.kill(pid, signum)
    wait_until(lambda: server.out.count('Child started') == 6)
    assert len(set(children_of(server.pid)) - set(first)) == 3
    for _ in range(6):
        ask(server.port)
    server.stop()
    started = {int(pid) for pid in re.findall(r'^Child started with PID: (.*)', server.out, re.M)}
    assert len(started) == 6
    assert started > set(first)
    assert server.err == ''


@pytest.mark.parametrize('name', PREFORKED)
def test_a_child_ends_alone(serve, name):
    """The youngest child knows the others' PIDs; it must not take them along."""
    server = serve(name, '-n', 3)
    wait_until(lambda: server.out.count('Child started') == 3)
    *others, youngest = sorted(children_of(server.pid))
    os.kill(youngest, signal.SIGTERM)
    wait_until(lambda: server.out.count('Child started') == 4)
    assert set(others) < set(children_of(server.pid))
    time.sleep(0.1)
    assert server.out.count('Child started') == 4


def test_a_child_of_server01_ends_alone(serve):
    server = serve('server01.py')
    with connect(server.port) as first:
        (elder, _), = wait_until(lambda: children_of(server.pid).items())
        with connect(server.port) as second:
            younger, = wait_until(lambda: set(children_of(server.pid)) - {elder})
            os.kill(younger, signal.SIGTERM)
            assert receive_end(second) == b''
        first.sendall(b'3\n')
        assert len(receive(first, 3)) == 3


@pytest.mark.parametrize('name', PREFORKED)
def test_children_are_killed_under_load(serve, name):
    """No connection is hurt but that of the killed child."""
    server = serve(name, '-n', 4)
    load = subprocess.Popen([*PYTHON, TOP / 'client.py', '-p', str(server.port), '-c', '12',
                             '-t', '150', '-b', '100000'], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    killed = set()
    while len(killed) < 6 and load.poll() is None:
        before = server.out.count('100000 bytes')
        wait_until(lambda: server.out.count('100000 bytes') > before + 20
                   or load.poll() is not None)
        victim = min(set(children_of(server.pid)) - killed)  # those that it reaps are no victims
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    out, err = load.communicate(timeout=40)
    assert killed
    assert len(err.splitlines()) <= len(killed)
    assert out.count(' is done') == 12 - len(err.splitlines())
    wait_until(lambda: list(children_of(server.pid).values()).count('S') == 4)
    assert client(server.port, '-c', 8, '-t', 5).returncode == 0
    server.stop()
    # The last idle child of server04 may die just before a connection is passed to it.
    assert server.err.count('\n') == server.err.count(': cannot be passed to a child\n')


def test_a_child_of_server01_does_not_keep_the_port(serve):
    """It outlives its parent, to serve its client to the end."""
    server = serve('server01.py')
    with connect(server.port) as conn:
        wait_until(lambda: children_of(server.pid))
        server.send_signal(signal.SIGKILL)
        server.process.wait()
        conn.sendall(b'3\n')
        assert len(receive(conn, 3)) == 3
        with pytest.raises(ConnectionRefusedError):
            connect(server.port)


def test_the_children_of_server04_end_with_their_parent(serve):
    """At once if idle, or else after their client."""
    def living():
        return [pid for pid, _, session, state in processes()
                if session == server.pid and state != 'Z']  # init will collect it
    server = serve('server04.py', '-n', 3)
    wait_until(lambda: server.out.count('Child started') == 3)
    with connect(server.port) as conn:
        conn.sendall(b'1\n')
        assert receive(conn, 1)
        server.send_signal(signal.SIGKILL)
        server.process.wait()
        wait_until(lambda: len(living()) == 1)
        with pytest.raises(ConnectionRefusedError):
            connect(server.port)
        conn.sendall(b'3\n')
        assert len(receive(conn, 3)) == 3
    wait_until(lambda: not living())
    assert server.wait() == -signal.SIGKILL
    assert server.err == ''


def test_no_zombies(serve):
    """server01 collects its children although no client comes any more."""
    server = serve('server01.py')
    with connect(server.port) as conn:
        conn.sendall(b'1\n')
        assert receive(conn, 1)
        assert client(server.port, '-c', 5, '-t', 5).returncode == 0
        wait_until(lambda: len(children_of(server.pid)) == 1)
        (pid, state), = children_of(server.pid).items()
        assert state != 'Z'
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not children_of(server.pid))
        assert receive_end(conn) == b''
    ask(server.port)


SHORTAGE = """
import runpy, sys, {module}
real, calls = {function}, 0
def scarce(*args):
    global calls
    calls += 1
    if calls in {calls}:
        raise {error}
    return real(*args)
{function} = scarce
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
FORK = SHORTAGE.format(module='os', function='os.fork', calls='{calls}',
                       error="BlockingIOError(11, 'scarce')")
START = SHORTAGE.format(module='threading', function='threading.Thread.start',
                        calls='{calls}', error="RuntimeError('scarce')")


@pytest.mark.parametrize('name, shim', [
    ('server01.py', FORK), ('server05.py', START),
    ('server05.py', START.replace("RuntimeError('scarce')", "MemoryError('scarce')")),
    ('server04.py', SHORTAGE.format(module='socket', function='socket.send_fds', calls='{calls}',
                                    error="OSError(109, 'scarce')"))])
def test_no_process_or_thread_for_a_client(run, name, shim):
    """Two clients in a row are turned away; then all is as it was."""
    server = run(name, command=[*PYTHON, '-c', shim.format(calls=(2, 3)), TOP / name, '-p', '0',
                                *(['-n', '1'] if name in POOLS else [])])
    ask(server.port)
    for _ in range(2):
        with connect(server.port) as conn:
            assert receive_end(conn) == b''
    for _ in range(3):
        ask(server.port)
    server.stop()
    assert len(server.err.splitlines()) == server.err.count('cannot ') == 2


def test_the_table_comes_although_a_fork_has_failed(run):
    """The alarm that has the fork tried again must not end the table."""
    shim = FORK.format(calls='range(3, 1000)')
    server = run('server03a.py', command=[*PYTHON, '-c', shim, TOP / 'server03a.py', '-p', '0',
                                          '-n', '3', '--select'])
    wait_until(lambda: 'scarce' in server.err)
    time.sleep(0.8)  # so that the alarm rings while the server waits for the last counts
    server.stop()
    assert server.out.count('child ') == 3


@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_ready_but_not_readable(run, name):
    """As select(2) warns of; the client must not pay for it."""
    shim = SHORTAGE.format(module='socket', function='socket.socket.recv', calls=(1, 3, 4),
                           error="BlockingIOError(11, 'nothing there')")
    server = run(name, command=[*PYTHON, '-c', shim, TOP / name, '-p', '0'])
    for _ in range(3):
        ask(server.port)
    server.stop()
    assert server.err == ''


@pytest.mark.skipif(not LINUX, reason='needs prlimit')
def test_no_room_for_the_passed_descriptor(serve):
    """The message arrives without its descriptor; that connection alone is lost."""
    server = serve('server04.py', '-n', 1)
    wait_until(lambda: server.out.count('Child started') == 1)
    child, = children_of(server.pid)
    resource.prlimit(child, resource.RLIMIT_NOFILE, (3, 1000))
    with connect(server.port) as conn:
        assert receive_end(conn) == b''
    resource.prlimit(child, resource.RLIMIT_NOFILE, (1000, 1000))
    ask(server.port)
    assert set(children_of(server.pid)) == {child}
    server.stop()
    assert server.err == ''


def test_a_child_is_replaced_for_a_connection(serve):
    """The new child has a connection passed that was there before it: one copy, not two."""
    server = serve('server04.py', '-n', 1)
    wait_until(lambda: server.out.count('Child started') == 1)
    server.send_signal(signal.SIGSTOP)  # so that the parent learns of both at once
    child, = children_of(server.pid)
    os.kill(child, signal.SIGKILL)
    with connect(server.port) as conn:
        server.send_signal(signal.SIGCONT)
        conn.sendall(b'nonsense\n')
        assert receive_end(conn) == b''
    ask(server.port)
    server.stop()
    assert server.out.count('Child started') == 2


@pytest.mark.parametrize('name', POOLS)
def test_no_process_or_thread_for_the_pool(run, name):
    """The pool starts with what it can get, and grows when it can, a second later."""
    shim = (START if name == 'server08.py' else FORK).format(calls=(2,))
    server = run(name, command=[*PYTHON, '-c', shim, TOP / name, '-p', '0', '-n', '3'])
    ask(server.port)
    wait_until(lambda: server.out.count(' started with ') == 3)
    ask(server.port)
    server.stop()
    error, = server.err.splitlines()
    assert 'scarce' in error


# Out of descriptors: stop accepting until someone leaves, never spin, never die.

def serve_crowd(server, count):
    """Connect many clients, more than the server can have at once; in turn, each gets its due."""
    conns = [connect(server.port) for _ in range(count)]
    for conn in conns:
        conn.sendall(b'5\n')
    assert len(receive(conns[0], 5)) == 5
    assert_idle(server)
    for conn in conns[1:]:
        conns[0].close()  # its place is free for another
        conns[0] = conn
        assert len(receive(conn, 5)) == 5
    conns[0].close()
    ask(server.port)
    server.stop()
    assert server.err == ''


@every_server
def test_64_descriptors_for_200_clients(serve, name):
    serve_crowd(serve(name, preexec_fn=limit_descriptors(64)), 200)


@pytest.mark.parametrize('name', EVENT_DRIVEN)
def test_a_place_is_taken_as_soon_as_it_is_free(serve, name):
    """Not at the next TICK: that would be some 50 times slower."""
    def seconds(**options):
        result = client(serve(name, **options).port, '-c', 30, '-t', 40)
        assert result.returncode == 0
        return float(re.search(r'in (\S+) seconds', result.stdout)[1])
    assert seconds(preexec_fn=limit_descriptors(20)) < 10 * max(seconds(), 0.1)


@pytest.mark.parametrize('name', ['server02.py', 'server05.py'])
def test_1100_clients_on_select_and_on_threads(serve, name):
    """More than 1024 descriptors, and more than MAX_THREADS."""
    serve_crowd(serve(name), 1100)


def lowest_unused(pid):
    """Return the descriptor that the next call to open one would get."""
    used = {int(path.name) for path in pathlib.Path(f'/proc/{pid}/fd').iterdir()}
    return min({*range(len(used) + 1)} - used)


@pytest.mark.skipif(not LINUX, reason='needs prlimit')
@pytest.mark.parametrize('name, options', [*((name, []) for name in SERVERS),
                                           ('server03a.py', ['--select'])])
def test_not_one_descriptor_left(serve, name, options):
    """Clients wait in the kernel's queue for as long as they cannot be accepted.

    A call of accept that waits has its descriptor already, so each of a pool may still take one.
    """
    pool = 5 if name in POOLS else 0
    server = serve(name, *(['-n', pool] if pool else []), *options)
    wait_until(lambda: server.out.count(' started with ') == pool)
    wait_until(lambda: {state for _, _, session, state in processes()
                        if session == server.pid} == {'S'})  # by then it has closed its copies
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE)
              for pid in [server.pid, *children_of(server.pid)]}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_unused(pid), hard))
    replies = select.poll()
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(connect(server.port)) for _ in range(pool + 1)]
        for conn in conns:
            conn.sendall(b'5\n')
            conn.shutdown(socket.SHUT_WR)  # or the pool would be busy rather than short of them
            replies.register(conn, select.POLLIN)
        assert_idle(server)
        assert len(replies.poll(0)) <= pool
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        for conn in conns:
            assert len(receive(conn, 5)) == 5
    assert set(children_of(server.pid)) >= set(limits) - {server.pid}
    server.stop()
    assert server.err == ''


def test_a_pool_larger_than_the_descriptors(serve):
    """server04 needs one for each child; it must keep one for the next connection."""
    server = serve('server04.py', '-n', 40, preexec_fn=limit_descriptors(20))
    for _ in range(5):
        ask(server.port)
    server.stop()
    assert 'Traceback' not in server.err


def test_a_pool_larger_than_the_soft_limit(serve):
    server = serve('server04.py', '-n', 40, preexec_fn=limit_descriptors(20, 200))
    wait_until(lambda: server.out.count('Child started') == 40)
    server.stop()
    assert server.err == ''


@pytest.mark.serial
@pytest.mark.parametrize('name', ['server06.py', 'server07.py'])
def test_ten_thousand_idle_connections(serve, name):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 10_100:
        pytest.skip('the hard limit of descriptors is below 10,100')
    server = serve(name, preexec_fn=limit_descriptors(256, hard))
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(connect(server.port)) for _ in range(10_000)]
        start = time.monotonic()
        ask(server.port)
        assert time.monotonic() - start < 4  # one that accepts one client a turn takes 8
        conns[-1].sendall(b'5\n')  # the first may have been silent for too long
        assert len(receive(conns[-1], 5)) == 5
        assert_idle(server)
    server.stop()
    assert server.err == ''
