"""README.rst, replayed: every command on the page is run, and its output is compared.

A literal block whose first line starts with "$ " is a terminal: commands, and what they print.
Blocks of one section are replayed in their order, as by a reader with two terminals; a block
that shows a script which is still running shows what it has printed by then. In the output,
figures, bars and runs of blanks match any other (but not in what diff prints), "..." matches any
number of lines, and ^C is the moment to press Ctrl-C. Ports are of the kernel's choice instead
of 2000; the benchmark is run with --quick. A number that follows "PID: " stands for the same
process in the whole section.
"""
import contextlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from conftest import ENVIRONMENT, LINUX, TOP, Script, wait_until

TEXT = (TOP / 'README.rst').read_text()
FIRST_SCREEN = 'Concurrent server design in Python'
SERVER = re.compile(r'python3 (?:server\w+|rstserver)\.py')
LONG_RUNNING = re.compile(r'python3 (?:server\w+|rstserver|selsigrace|selfpipe)\.py')
SLOW = ('selsigrace.py', 'selfpipe.py', 'sendfile_demo.py', 'The idle crowd')
LINUX_ONLY = ('server07.py', 'tcpcork_demo.py', 'The designs', 'The idle crowd', 'The herd')


def literal_blocks(text):
    """Return the literal blocks of a text, in order, without their indentation."""
    found = re.findall(r'::\n\n((?:(?: {4}.*)?\n)+)', text)
    return [textwrap.dedent(block).strip('\n') for block in found]


def sections():
    """Return {title: text} of the page; what stands before the first title is its first screen."""
    parts = re.split(r'^(.+)\n(?:=+|-+)\n', TEXT, flags=re.MULTILINE)
    return {title: body for title, body in zip(parts[1::2], parts[2::2])}


def terminals(text):
    """Return the blocks of a text that are terminals, as lists of (command, expected output)."""
    found = []
    for block in literal_blocks(text):
        if block.startswith('$ '):
            pieces = re.split(r'^\$ (.*)\n?', block, flags=re.MULTILINE)
            found.append(list(zip(pieces[1::2], pieces[2::2])))
    return found


CI = (TOP / '.ci' / 'run').read_text()
TERMINALS = {title: terminals(body) for title, body in sections().items() if terminals(body)}


class Replay:
    """One section in the making: its running scripts and the numbers that the page calls them."""

    def __init__(self):
        self.running = {}   # command -> Script
        self.numbers = {}   # PID on the page -> PID here
        self.server = None

    def pattern(self, expected):
        """Return the pattern of the output that the page shows; PIDs are groups, and listed."""
        lines, pids = [], []
        for line in expected.splitlines():
            if line == '...':
                lines.append(r'(?:.*\n)*?')
                continue
            for token in re.split(r'(PID: \d+|\d+(?:\.\d+)*|#+|=+| +)', line):
                if token.startswith('PID: '):
                    pids.append(token[5:])
                    lines.append(r'PID: (\d+)')
                elif token[:1].isdigit():
                    lines.append(r'\d+(?:\.\d+)*')
                elif token.startswith((' ', '#', '=')):  # blanks, bars and rules
                    lines.append(token[0] + '+')
                else:
                    lines.append(re.escape(token))
            lines.append(' *\n')
        return ''.join(lines), pids

    def compare(self, expected, output):
        """Return whether the output is the one on the page, and note the PIDs in it."""
        pattern, pids = self.pattern(expected)
        match = re.fullmatch(pattern, output)
        if match:
            self.numbers.update(zip(pids, match.groups()))
        return match

    def translate(self, command):
        """Return the command with this Python, port and PIDs in place of the page's."""
        command = re.sub(r'\b\d{4,}$', lambda pid: self.numbers.get(pid[0], pid[0]), command)
        if SERVER.match(command):
            command += ' -p 0'
        elif re.search(r'\bpython3 (client|sigpipe)\.py', command):
            command = command.replace(' -p 2000', '')
            port = self.server.port if self.server else unused_port()
            command = re.sub(r'((?:client|sigpipe)\.py)', rf'\1 -p {port}', command)
        command = command.replace('benchmark.py', 'benchmark.py --quick 2>/dev/null')
        return command.replace('python3', shlex.quote(sys.executable))

    def step(self, command, expected):
        """Run a command, or look at it again, and compare its output."""
        expected, interrupt, rest = expected.partition('^C')
        if LONG_RUNNING.match(command):
            if command not in self.running:
                script = Script('', command=shlex.split(self.translate(command)),
                                stderr=subprocess.STDOUT)
                self.running[command] = script
                if SERVER.match(command):
                    self.server = script
            script = self.running[command]
            if interrupt:
                begun = expected.count(' started with ')
                wait_until(lambda: script.out.count(' started with ') >= begun)
                return lambda: self.finish(script, expected, rest)
            wait_until(lambda: self.compare(expected, script.out)
                       or not script.drains[0].is_alive())  # it has ended, with other output
            assert self.compare(expected, script.out), f'{command}\n{script.out[-3000:]}'
            return None
        result = subprocess.run(['sh', '-c', self.translate(command)], cwd=TOP, env=ENVIRONMENT,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, timeout=55)
        if command.startswith('diff '):  # nothing in it may change from run to run
            assert [line.rstrip() for line in result.stdout.splitlines()] == expected.splitlines()
        else:
            assert self.compare(expected, result.stdout), f'{command}\n{result.stdout[-3000:]}'
        return None

    def finish(self, script, expected, rest):
        """Press Ctrl-C in the terminal of a script; by now, the other terminals are done."""
        script.send_signal(signal.SIGINT)
        assert script.wait() == 0
        assert self.compare(expected + rest, script.out), script.out[-3000:]

    def close(self):
        for script in self.running.values():
            script.kill()


def unused_port():
    """Return a port on which nobody listens."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]


def background_server(title):
    """Tell which server the text of a section takes for granted."""
    return {'client.py': 'server01.py', 'sigpipe.py': 'rstserver.py'}.get(title)


def replay(title):
    """Replay the terminals of a section."""
    later = []
    with contextlib.closing(Replay()) as play:
        if background_server(title):
            play.server = Script(background_server(title), '-p', 0)
            play.running['background'] = play.server
        for block in TERMINALS[title]:
            for command, expected in block:
                if 'client.py -c 2' in command:
                    play.server = None  # "With no server there"
                later.append(play.step(command, expected))
        for step in later:
            if step:
                step()


def replay_first_screen():
    """Run the first command as it is, but for the port; the second is for CI to run."""
    (shown, tests) = TERMINALS[FIRST_SCREEN]
    (command, expected), = shown
    port = str(unused_port())
    command = command.replace('server03a.py', f'server03a.py -p {port}').replace('2000', port)
    result = subprocess.run(['sh', '-c', command.replace('python3', shlex.quote(sys.executable))],
                            cwd=TOP, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, timeout=50)
    assert Replay().compare(expected, result.stdout), result.stdout
    counts = re.findall(r'^child \d+ : +(\d+) times$', result.stdout, re.MULTILINE)
    assert sum(map(int, counts)) == 1500
    assert result.stderr == ''
    selected = subprocess.run(['sh', '-c', re.search(r'^command=\$\((sed .*)\)$', CI, re.M)[1]],
                              cwd=TOP, capture_output=True, text=True)
    assert selected.stdout.strip() == tests[0][0]
    assert tests[0][0].endswith('python -m pytest -q')


def replays():
    """Return {title: function that replays the section}, the longest first."""
    titles = sorted(TERMINALS, key=lambda title: title not in SLOW)
    functions = {title: lambda title=title: replay(title) for title in titles
                 if LINUX or title not in LINUX_ONLY}
    functions[FIRST_SCREEN] = replay_first_screen
    return functions


BACKGROUND = replays()


def test_every_terminal_is_in_a_section():
    blocks = [block for block in literal_blocks(TEXT) if block.startswith('$ ')]
    assert sum(map(len, TERMINALS.values())) == len(blocks) == len(
        re.findall(r'^(?!    ).*\n\n    \$ ', TEXT, re.MULTILINE))


@pytest.mark.parametrize('title', TERMINALS)
def test_terminals(background, title):
    if title in LINUX_ONLY and not LINUX:
        pytest.skip('Linux only')
    background[title]()


def test_the_excerpts_stand_in_the_scripts():
    excerpts = re.findall(r'^\.\. code::\n   :class: (\S+)\n\n((?:(?: {3}.*)?\n)+)', TEXT, re.M)
    assert len(excerpts) == TEXT.count('.. code::')
    for script, excerpt in excerpts:
        source = (TOP / script).read_text()
        excerpt = textwrap.dedent(excerpt).strip('\n')
        assert any(textwrap.indent(excerpt, ' ' * depth) in source for depth in range(0, 24, 4))


def test_what_the_text_names_exists():
    """Functions that a script's section names stand in that script, or in another it names."""
    for title, body in sections().items():
        if not title.endswith('.py'):
            continue
        source = (TOP / title).read_text()
        others = [TOP / name for name in re.findall(r'``(\w+\.py)``', body)]
        other = ''.join(path.read_text() for path in others)
        for name in re.findall(r'``(\w+)\(\)``', body):
            assert re.search(rf'\b{name}\b', source + other), (title, name)


def test_the_index_lists_every_script():
    for path in TOP.glob('*.py'):
        assert re.search(rf'^`{path.name}`_ ', TEXT, re.MULTILINE)
        assert f'\n{path.name}\n---' in TEXT


def test_it_renders_without_a_warning():
    docutils = pytest.importorskip('docutils.core', reason='docutils is not installed')
    docutils.publish_doctree(TEXT, settings_overrides={'halt_level': 2, 'warning_stream': False})
