"""README.rst, replayed: every command on the page is run, and its output is compared.

A literal block whose first line is a prompt is a replay. "$ " runs a command to its end; "1$ "
runs one in terminal 1, where it may go on; "1> " is what that terminal prints next; "1< " is typed
there; ^C is Ctrl-C. In the output, figures, bars and runs of blanks match any other (but not in
what diff prints), and "..." matches any number of lines. A number after "PID: " stands for one
process in the whole section. Ports are of the kernel's choice instead of 2000, loads are smaller,
and the benchmark is run with --quick.
"""
import contextlib
import os
import platform
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import (
    ENVIRONMENT,
    LINUX,
    SERVERS,
    TOP,
    Script,
    children_of,
    connect,
    processes_of,
    wait_until,
)

TEXT = (TOP / 'README.rst').read_text()
CI = (TOP / '.ci' / 'run').read_text()
FIRST_SCREEN = 'Concurrent server design in Python'
PROMPT = re.compile(r'(\d?)(\$|(?<=\d)[<>]) ?(.*)')
SERVER = re.compile(r'python3 (?:server\w+|rstserver|iterative)\.py')
LONG_RUNNING = re.compile(rf'{SERVER.pattern}|nc |python3 (?:selsigrace|selfpipe)\.py')
LINUX_ONLY = re.compile(r'server0[16]|tcpcork|measurements')
# The kernel gives these ports to no one that asks for a free one.
PORTS = iter(random.sample(range(20_000, 32_000), 1000))


def literal_blocks(text):
    """Return the literal blocks of a text, in order, without their indentation."""
    found = re.findall(r'::\n\n((?:(?: {4}.*)?\n)+)', text)
    return [textwrap.dedent(block).strip('\n') for block in found]


def sections():
    """Return {title: text} of the page; what stands before the first title is its first screen."""
    parts = re.split(r'^(.+)\n(?:=+|-+)\n', TEXT, flags=re.MULTILINE)
    return {title: body for title, body in zip(parts[1::2], parts[2::2])}


def steps_of(block):
    """Return the steps of a replay: [terminal, '$', '<' or '>', its text, lines of output]."""
    steps = []
    for line in block.splitlines():
        prompt = PROMPT.fullmatch(line)
        if prompt and prompt[2] == '>' and steps[-1][:2] == [prompt[1], '>']:
            steps[-1][3].append(prompt[3])
        elif prompt and prompt[2] == '>':
            steps.append([prompt[1], '>', '', [prompt[3]]])
        elif prompt:
            steps.append([prompt[1], prompt[2], prompt[3], []])
        else:
            steps[-1][3].append(line)
    return steps


def replays_of(text):
    """Return the replays of a text, as lists of steps."""
    return [steps_of(block) for block in literal_blocks(text) if re.match(r'\d?\$ ', block)]


REPLAYS = {title: replays_of(body) for title, body in sections().items() if replays_of(body)}


class Netcat:
    """What nc does: sends what is typed, prints what comes."""

    def __init__(self, port):
        self.out = ''
        self.conn = connect(port, timeout=None)
        self.drains = [threading.Thread(target=self.drain, daemon=True)]
        self.drains[0].start()

    def drain(self):
        with contextlib.suppress(OSError):
            while data := self.conn.recv(4096):
                self.out += data.decode() + '\n'

    def kill(self):
        with contextlib.suppress(OSError):  # the server has reset it
            self.conn.shutdown(socket.SHUT_RDWR)
        self.drains[0].join()
        self.conn.close()


class Replay:
    """One section in the making: its terminals, and the numbers that the page calls processes."""

    def __init__(self):
        self.running = {}   # terminal -> Script or Netcat
        self.seen = {}      # terminal -> characters of its output that have been compared
        self.numbers = {}   # PID on the page -> PID here
        self.server = self.port = None

    def play(self, replays):
        with contextlib.closing(self):
            for steps in replays:
                for number, (terminal, kind, text, lines) in enumerate(steps):
                    goes_on = [step[1] for step in steps[number + 1:] if step[0] == terminal]
                    if kind == '<' and text != '^C':
                        self.running[terminal].conn.sendall(f'{text}\n'.encode())
                    elif text == '^C':
                        self.interrupt(terminal, lines)
                    elif kind == '>':
                        self.expect(terminal, lines)
                    elif LONG_RUNNING.match(text) or goes_on[:1] not in ([], ['$']):
                        self.start(terminal, text)
                        self.expect(terminal, lines)
                    else:
                        self.run(text, lines)

    def pattern(self, lines):
        """Return the pattern of lines that the page shows; PIDs are groups, and listed."""
        pieces, pids = [], []
        for line in lines:
            if line == '...':
                pieces.append(r'(?:.*\n)*?')
                continue
            if re.match(r'Child \d+: Server returned only', line):
                pieces.append(r'(?:Child \d+: .*\n)?')  # the kill may have hurt no client
                continue
            pieces.append(' *')
            for token in re.split(r'(PID: \d+|\d+(?:\.\d+)*|#+|=+| +)', line.lstrip()):
                if token.startswith('PID: '):
                    pids.append(token[5:])
                    pieces.append(r'PID: (\d+)')
                elif token[:1].isdigit():
                    pieces.append(r'\d+(?:\.\d+)*')
                elif token.startswith((' ', '#', '=')):  # blanks, bars and rules
                    pieces.append(token[0] + '+')
                else:
                    pieces.append(re.escape(token))
            pieces.append(' *\n')
        return ''.join(pieces), pids

    def compare(self, lines, output, match=re.fullmatch):
        """Return whether the output is that on the page, and note the PIDs in it."""
        pattern, pids = self.pattern(lines)
        output = output.replace(sys.executable, 'python3').replace(f' -p {self.port}', '')
        output = output.replace(platform.python_implementation(), 'CPython')
        found = match(pattern, output)
        if found:
            self.numbers.update(zip(pids, found.groups()))
        return found

    def translate(self, command):
        """Return the command with this Python, port, and PIDs in place of the page's."""
        command = re.sub(r'\b\d{4,}$', lambda pid: self.numbers.get(pid[0], pid[0]), command)
        if SERVER.match(command):
            command = re.sub(r'((?:server|rst)\w+\.py)', rf'\1 -p {self.port}', command)
        elif re.search(r'\bpython3 (client|sigpipe)\.py', command):
            command = command.replace(' -p 2000', '').replace('-t 3000 -b', '-t 60 -b')
            command = re.sub(r'((?:client|sigpipe)\.py)', rf'\1 -p {self.port or unused_port()}',
                             command)
        if self.server:  # other tests may run the same server
            command = command.replace('pgrep ', f'pgrep -s {self.server.pid} ')
        command = command.replace('| grep', '| grep --line-buffered')
        command = command.replace('-m 64', '-m 16')
        command = command.replace('benchmark.py', 'benchmark.py --quick 2>/dev/null')
        return command.replace('python3', shlex.quote(sys.executable))

    def start(self, terminal, command):
        """Start a command in a terminal, and end what has been running there."""
        if terminal in self.running:
            self.running.pop(terminal).kill()
        self.seen[terminal] = 0
        if command.startswith('nc '):
            self.running[terminal] = Netcat(self.port)
            return
        if SERVER.match(command):
            self.port = unused_port()
        shell = self.translate(command)
        if 'iterative.py' in command:
            shell = f'{shlex.quote(sys.executable)} -c {shlex.quote(iterative(self.port))}'
        script = Script('', command=['sh', '-c', shell if '|' in shell else f'exec {shell}'],
                        stderr=subprocess.STDOUT)
        self.running[terminal] = script
        if SERVER.match(command):
            self.server = script
        if 'iterative.py' in command:
            wait_until(lambda: is_open(self.port))

    def run(self, command, lines):
        """Run a command to its end, and compare all that it prints."""
        if command.startswith('kill -9'):  # while the clients in terminal 2 are at work
            load = self.running['2']
            wait_until(lambda: len(processes_of(load.pid)) > 1 or load.process.poll() is not None)
        if command.startswith('ps --forest'):  # a child for each client
            clients = sum(isinstance(script, Netcat) for script in self.running.values())
            wait_until(lambda: len(children_of(self.server.pid)) == clients)
        result = subprocess.run(['sh', '-c', self.translate(command)], cwd=TOP, env=ENVIRONMENT,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, timeout=300)
        if command.startswith('diff '):  # nothing in it may change from run to run
            assert [line.rstrip() for line in result.stdout.splitlines()] == lines
        else:
            assert self.compare(lines, result.stdout), f'{command}\n{result.stdout[-3000:]}'

    def expect(self, terminal, lines):
        """Wait until a terminal has printed these lines next."""
        script = self.running[terminal]

        def rest():
            return script.out[self.seen[terminal]:]
        wait_until(lambda: self.compare(lines, rest(), re.match)
                   or not script.drains[0].is_alive())  # it has ended, with other output
        found = self.compare(lines, rest(), re.match)
        assert found, f'{lines}\n{rest()[-3000:]}'
        self.seen[terminal] += found.end()

    def interrupt(self, terminal, lines):
        """Press Ctrl-C; what is printed to the end must end with these lines."""
        script = self.running.pop(terminal)
        if isinstance(script, Netcat):
            script.kill()
            return
        if '--select' in str(script.process.args):
            time.sleep(1)  # as the page says
        os.killpg(script.pid, signal.SIGINT)
        assert script.wait() == 0
        assert self.compare(['...', *lines], script.out[self.seen[terminal]:]), script.out[-3000:]
        script.kill()

    def close(self):
        for script in self.running.values():
            script.kill()


def unused_port():
    """Return a port at which no one listens."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(('127.0.0.1', next(PORTS))) as free:
            return free.getsockname()[1]


def is_open(port):
    """Return whether a server accepts a client, who leaves at once."""
    with contextlib.suppress(ConnectionError):
        connect(port).close()
        return True


def iterative(port):
    """Return the first program on the page, for another port."""
    block, = re.findall(r'   :class: iterative\.py\n\n((?:(?: {3}.*)?\n)+)', TEXT)
    return textwrap.dedent(block).replace('2000', str(port))


def replay_first_screen():
    """Replay the first block; run the line as it is, but for the port; the tests are CI's."""
    (main_job, (line,), (tests,)) = REPLAYS[FIRST_SCREEN]
    port = str(unused_port())
    command = line[2].replace('server03a.py', f'server03a.py -p {port}')
    command = command.replace('client.py', f'client.py -p {port}')
    result = subprocess.run(['sh', '-c', command.replace('python3', shlex.quote(sys.executable))],
                            cwd=TOP, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, timeout=50)
    assert Replay().compare(line[3], result.stdout), result.stdout
    counts = re.findall(r'^child \d+ : +(\d+) times$', result.stdout, re.MULTILINE)
    assert sum(map(int, counts)) == 1500
    assert result.stderr == ''
    assert len(f'    $ {line[2]}') <= 100
    assert [step[2] for step in main_job[:2]] == [
        'python3 server03a.py', 'python3 client.py -i localhost -p 2000 -c 15 -t 100 -b 4096']
    Replay().play([main_job])
    selected = subprocess.run(['sh', '-c', re.search(r'^command=\$\((sed .*)\)$', CI, re.M)[1]],
                              cwd=TOP, capture_output=True, text=True)
    assert selected.stdout.strip() == tests[2]
    assert tests[2].endswith('python -m pytest -q')


def test_every_terminal_is_in_a_section():
    blocks = [block for block in literal_blocks(TEXT) if re.match(r'\d?\$ ', block)]
    assert sum(map(len, REPLAYS.values())) == len(blocks)
    assert len(blocks) == len(re.findall(r'^(?!    ).*\n\n    \d?\$ ', TEXT, re.MULTILINE))


@pytest.mark.parametrize('title', REPLAYS)
def test_terminals(title):
    if LINUX_ONLY.search(title) and not LINUX:
        pytest.skip('Linux only')
    replay_first_screen() if title == FIRST_SCREEN else Replay().play(REPLAYS[title])


def test_each_server_has_its_result_of_the_standard_run():
    for title, body in sections().items():
        if title.startswith('server') and not title.startswith(('server01', 'server03a')):
            assert re.search(r'^\*The standard run\*: [\d,]+ connections', body, re.M), title


def test_the_excerpts_stand_in_the_scripts():
    excerpts = re.findall(r'^\.\. code:: python\n   :class: (\S+)\n\n((?:(?: {3}.*)?\n)+)', TEXT,
                          re.M)
    assert len(excerpts) == TEXT.count('.. code::')
    for script, excerpt in excerpts:
        if script != 'iterative.py':  # replayed
            source = (TOP / script).read_text()
            excerpt = textwrap.dedent(excerpt).strip('\n')
            assert any(textwrap.indent(excerpt, ' ' * depth) in source
                       for depth in range(0, 24, 4)), (script, excerpt)
    assert {script for script, _ in excerpts} >= {*SERVERS} - {'server06.py', 'server07.py'}


def test_what_the_text_names_exists():
    """Functions that a script's section names stand in that script, or in another it names."""
    for title, body in sections().items():
        names = re.findall(r'(\w+\.py)', title + body)
        if re.match(r'\w+\.py', title):
            source = ''.join((TOP / name).read_text() for name in names if name != 'iterative.py')
            for name in re.findall(r'``(\w+)\(\)``', body):
                assert re.search(rf'\b{name}\b', source), (title, name)


def test_the_page_links_every_script():
    for path in TOP.glob('*.py'):
        assert f'`{path.name} <{path.name}>`__' in TEXT
        assert any(path.name in title for title in sections())


def test_it_renders_without_a_warning():
    docutils = pytest.importorskip('docutils.core', reason='docutils is not installed')
    docutils.publish_doctree(TEXT, settings_overrides={'halt_level': 2, 'warning_stream': False})
