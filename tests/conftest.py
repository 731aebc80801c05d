"""What the tests share: starting a script as a user would, rude clients, and a look at /proc."""
import array
import collections
import contextlib
import fcntl
import inspect
import os
import pathlib
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
SERVERS = ['server01.py', 'server02.py', 'server03.py', 'server03a.py', 'server04.py',
           'server05.py', 'server06.py', 'server07.py', 'server08.py']
POOLS = ['server03.py', 'server03a.py', 'server04.py', 'server08.py']
PREFORKED = ['server03.py', 'server03a.py', 'server04.py']
EVENT_DRIVEN = ['server02.py', 'server06.py', 'server07.py']
LINUX = sys.platform == 'linux'
PYTHON = [sys.executable, '-X', 'dev', '-W', 'error']
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
SOON = 20  # seconds: an event that must come, on a machine that may be busy

# Ten thousand connections need as many descriptors on this side.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def wait_until(condition, seconds=SOON):
    """Return as soon as condition() is true, and whatever it returned; fail when time runs out."""
    pause, deadline = 0.001, time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, 'what was waited for did not happen'
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)  # those who wait long must not take the processors
    return result


class Script:
    """A script of the collection, running, in a session of its own; its output is collected."""

    def __init__(self, name, *options, command=None, **popen):
        command = command or [*PYTHON, TOP / name, *map(str, options)]
        settings = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE,
                    'stderr': subprocess.PIPE, 'env': ENVIRONMENT, 'cwd': TOP, **popen}
        self.name = name
        self.process = subprocess.Popen(command, start_new_session=True, **settings)
        self.pid = self.process.pid
        self.texts = {'stdout': '', 'stderr': ''}
        self.drains = [threading.Thread(target=self.drain, args=(stream,), daemon=True)
                       for stream in self.texts if getattr(self.process, stream)]
        for drain in self.drains:
            drain.start()

    def drain(self, stream):
        with getattr(self.process, stream) as pipe:
            while data := os.read(pipe.fileno(), 65536):
                self.texts[stream] += data.decode()

    @property
    def out(self):
        return self.texts['stdout']

    @property
    def err(self):
        return self.texts['stderr']

    @property
    def port(self):
        """The port from the 'Listening' line, as soon as that is there."""
        def line():
            assert self.process.poll() is None or self.out, self.err
            return re.search(r'^Listening on port (\d+) \.\.\.$', self.out, re.MULTILINE)
        return int(wait_until(line)[1])

    def send_signal(self, signum):
        self.process.send_signal(signum)

    def wait(self, seconds=SOON):
        """Return the exit status; by then all output is here."""
        status = self.process.wait(seconds)
        for drain in self.drains:
            drain.join(SOON)
        return status

    def stop(self, signum=signal.SIGINT):
        """Stop a server the polite way and check that it went the polite way."""
        self.send_signal(signum)
        assert self.wait() == 0, self.err
        assert processes_of(self.pid) == []

    def kill(self):
        """Leave nothing of it."""
        for pid in [self.pid, *processes_of(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


def processes():
    """Return (PID, parent's PID, session or group, state) of every process of the machine."""
    if not LINUX:
        columns = 'pid=,ppid=,pgid=,stat='
        listing = subprocess.check_output(['ps', '-A', '-o', columns], text=True)
        rows = [line.split() for line in listing.splitlines()]
        return [(int(pid), int(parent), int(group), stat[0]) for pid, parent, group, stat in rows]
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):  # a glob looks inside, and may raise
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            with open(f'/proc/{pid}/stat', 'rb') as stat:
                state, parent, _, session = stat.read().rpartition(b')')[2].split()[:4]
            found.append((int(pid), int(parent), int(session), state.decode()))
    return sorted(found)


def processes_of(session):
    """Return the processes of a session."""
    return [pid for pid, _, its_session, _ in processes() if its_session == session]


def children_of(pid):
    """Return the children of a process and their states, as {PID: letter}."""
    return {child: state for child, parent, _, state in processes() if parent == pid}


def awake_seconds(session):
    """Return for how long each thread of a session has run, or waited for a processor: a Counter.

    On a busy machine, one that spins need not use much CPU; but it is awake all the time.
    """
    found = collections.Counter()
    ended = FileNotFoundError, ProcessLookupError
    for pid in processes_of(session):
        with contextlib.suppress(*ended):
            for thread in os.listdir(f'/proc/{pid}/task'):
                with contextlib.suppress(*ended):
                    stat = pathlib.Path(f'/proc/{pid}/task/{thread}/schedstat').read_text()
                    found[thread] = sum(map(int, stat.split()[:2])) / 1e9
    return found


@contextlib.contextmanager
def running(name, *options, **popen):
    """Run a script for the length of a with block, and leave nothing of it."""
    script = Script(name, *options, **popen)
    try:
        yield script
    finally:
        script.kill()


@contextlib.contextmanager
def starters():
    """Give what tests start scripts with; leave nothing of the scripts in the end."""
    with contextlib.ExitStack() as stack:
        def run(*args, **popen):
            return stack.enter_context(running(*args, **popen))

        def serve(name, *options, **popen):
            server = run(name, '-p', 0, *options, **popen)
            assert server.port
            return server
        yield {'run': run, 'serve': serve}


@pytest.fixture
def run():
    """Start scripts, and leave nothing of them after the test."""
    with starters() as functions:
        yield functions['run']


@pytest.fixture
def serve():
    """Start servers on ports of the kernel's choice; each is returned when it listens."""
    with starters() as functions:
        yield functions['serve']


def client(port, *options):
    """Run client.py to its end."""
    return subprocess.run([*PYTHON, TOP / 'client.py', '-p', str(port), *map(str, options)],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=50)


def bytes_in(pipe):
    """Return how many bytes wait in a pipe to be read."""
    return array.array('i', fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def connect(port, timeout=SOON):
    """Return a connection to a server on this machine."""
    return socket.create_connection(('127.0.0.1', port), timeout)


def reset(conn):
    """Close a connection by RST."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    conn.close()


def receive(conn, size):
    """Return *size* bytes, or fewer at end of file."""
    data = bytearray()
    while len(data) < size and (piece := conn.recv(min(size - len(data), 1 << 20))):
        data += piece
    return data


def assert_usage_error(name, value, err):
    """Check that argparse has told how to use a script, and in one line what was wrong."""
    first, *_, last = err.splitlines()
    assert first.startswith(f'usage: {name} ')
    assert last.startswith(f'{name}: error: ')
    assert value in last


def receive_end(conn):
    """Return what still comes before end of file, or before a reset, which is as good."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := conn.recv(1 << 20):
            data += piece
    return data


def ask(port, size=10):
    """Be a polite client for one request; check that exactly the reply comes."""
    with connect(port) as conn:
        conn.sendall(b'%d\n' % size)
        assert len(receive(conn, size)) == size
        conn.shutdown(socket.SHUT_WR)
        assert receive_end(conn) == b''


# Tests run side by side, in threads, from the moment the suite starts; pytest only asks for their
# results. Those marked serial run in its own thread, one after another, and come first.

WORKERS = {'waits': 32,      # the test does little but wait: all of these at once
           'others': 5}
futures = {}                 # item -> future


def pytest_configure(config):
    config.addinivalue_line('markers', 'waits: does little but wait')
    config.addinivalue_line('markers', 'serial: measures time, or shares a server with others')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.get_closest_marker('serial'))


def call(item):
    """Run the function of a test, which may ask for parameters, run, serve and tmp_path."""
    parameters = item.callspec.params if hasattr(item, 'callspec') else {}
    with starters() as functions, tempfile.TemporaryDirectory() as folder:
        arguments = {**parameters, **functions, 'tmp_path': pathlib.Path(folder)}
        item.function(**{name: arguments[name]
                         for name in inspect.signature(item.function).parameters})


@pytest.fixture(scope='session', autouse=True)
def threads(request):
    """Start the tests that run in threads, in an order that has the longest first."""
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ThreadPoolExecutor(workers))
                 for name, workers in WORKERS.items()}
        for item in reversed(request.session.items):
            if not any(mark.args[0] for mark in item.iter_markers('skipif')):
                if not item.get_closest_marker('serial'):
                    pool = pools['waits' if item.get_closest_marker('waits') else 'others']
                    futures[item] = pool.submit(call, item)
        yield
        for future in futures.values():
            future.cancel()


def pytest_pyfunc_call(pyfuncitem):
    """Return true if the test has run in a thread: then pytest need not run it."""
    if pyfuncitem in futures:
        futures[pyfuncitem].result()
        return True
    return None
