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
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, 'what was waited for did not happen'
        time.sleep(0.005)
    return result


class Script:
    """A script of the collection, running, in a session of its own; its output is collected."""

    def __init__(self, name, *options, command=None, **popen):
        command = command or [*PYTHON, TOP / name, *map(str, options)]
        settings = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE,
                    'stderr': subprocess.PIPE, 'env': ENVIRONMENT, 'cwd': TOP, **popen}
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
            stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
            state, parent, _, session = stat.rpartition(')')[2].split()[:4]
            found.append((int(pid), int(parent), int(session), state))
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


@pytest.fixture
def run():
    """Start scripts, and leave nothing of them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **popen: stack.enter_context(running(*args, **popen))


@pytest.fixture
def serve(run):
    """Start servers on ports of the kernel's choice; each is returned when it listens."""
    def start(name, *options, **popen):
        server = run(name, '-p', 0, *options, **popen)
        assert server.port
        return server
    return start


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


def pytest_collection_modifyitems(items):
    """Put those tests last that look at what has been done in the background."""
    items.sort(key=lambda item: 'background' in inspect.signature(item.function).parameters)


@pytest.fixture(scope='session', autouse=True)
def background(request):
    """Start what takes long as soon as the suite starts: the functions in BACKGROUND of each file.

    Give {name: function that waits for the result and returns it}.
    """
    work = {}
    for module in reversed(dict.fromkeys(item.module for item in request.session.items)):
        work.update(getattr(module, 'BACKGROUND', {}))
    with ThreadPoolExecutor(32) as pool:  # most of them only wait, see test_waits.py
        futures = {name: pool.submit(function) for name, function in work.items()}
        yield {name: future.result for name, future in futures.items()}
        for future in futures.values():
            future.cancel()
