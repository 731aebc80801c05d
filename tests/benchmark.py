#!/usr/bin/env python3
"""Measure the servers of the collection, with the standard library's own as yardsticks.

Five tables. designs: every server under the load of client.py. idle: one busy client amid a crowd
of silent ones. herd: how many children wake up for one connection. greedy: how long a polite
client waits beside one that pipelines without end. fork: what a fork costs, by the size of the
parent, and what a thread costs.

Try:       python3 tests/benchmark.py
           python3 tests/benchmark.py --quick --only greedy
Notice:    the ratios. Figures of two runs differ by the mood of the machine, and a ratio
           between 0.9 and 1.1 is a draw.
See also:  client.py (the load), yardstick_socketserver.py, yardstick_asyncio.py,
           greedy_client.py, fork_cost.py. Linux only.
"""
import argparse
import contextlib
import fcntl
import os
import pathlib
import platform
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time

# What is measured.

ROOT = pathlib.Path(__file__).resolve().parent.parent
YARDSTICKS = {
    'ForkingTCPServer': ['tests/yardstick_socketserver.py', 'ForkingTCPServer'],
    'ThreadingTCPServer': ['tests/yardstick_socketserver.py', 'ThreadingTCPServer'],
    'asyncio': ['tests/yardstick_asyncio.py']}
DESIGNS = {  # in the order of the page; a yardstick comes right after its server
    'server01': 'fork', 'ForkingTCPServer': 'socketserver',
    'server05': 'thread', 'ThreadingTCPServer': 'socketserver',
    'server02': 'select', 'server06': 'poll', 'server07': 'epoll', 'asyncio': 'streams',
    'server03': 'prefork', 'server03a': 'prefork, count', 'server04': 'prefork, pass',
    'server08': 'prethread'}
POOLS = 'server03', 'server03a', 'server04', 'server08'
RATIOS = [('server01', 'ForkingTCPServer'), ('server03', 'ForkingTCPServer'),
          ('server05', 'ThreadingTCPServer'), ('server07', 'asyncio')]
IDLE = 'server02', 'server06', 'server07', 'asyncio'
HERDS = {'server03a': 'accept', 'server03a --select': 'select', 'server04': 'recvmsg'}
GREEDY = [name for name in DESIGNS if not name.endswith('TCPServer')]

LOADERS = 15              # children of client.py
SLOW_LOADS = {            # parts of options.connections for each, so that it takes a second, too
    'server01': 1 / 8, 'ForkingTCPServer': 1 / 8, 'server05': 1 / 4, 'ThreadingTCPServer': 1 / 4}
POOL = 10                 # children, or threads
SIZE = 4096               # bytes for each connection
SMALL_SIZE = 100          # bytes for each request where it is the wait that counts
CROWDS = 0, 250, 900, 2500, 10_000  # idle connections
QUICK_CROWDS = 0, 250, 900, 1200, 2500
BATCH = 500               # connections to open before the server must catch up: within its backlog
FD_SETSIZE = 1024         # what select can watch: descriptors below this
SPARE = 50                # descriptors needed beside those of a crowd
GREEDY_CONNECTIONS = 50
FREE = 10                 # children of a pool that the greedy client leaves free
SETTLE = 0.3              # seconds, until all of its connections are being served
REST = 0.01               # seconds that the polite client waits before it asks again
LIMIT = 2                 # seconds that it waits for a reply
MEGABYTES = 0, 100, 400   # by which a parent is larger when it forks

HOST = '127.0.0.1'        # a number: no time goes into names, or into trying ::1 first
PATIENCE = 60             # seconds for anything that has to happen
BAR = 10                  # characters, the longest bar
STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
SIGNALS = STOP | {signal.SIGCHLD}


class Failure(Exception):
    """A program has not done what it should: there is nothing to measure."""


def main():
    """Have a child do it all, in a process group of its own, and leave nothing of that group."""
    options = parse_options()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until sigwait takes them: no race
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        make_tables(options)
        sys.exit()
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was quicker
        os.setpgid(pid, pid)
    signum = signal.sigwait(SIGNALS)
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1000):  # the others are not our children: init reaps them
            os.killpg(pid, 0)
            time.sleep(0.001)
    sys.exit(os.waitstatus_to_exitcode(status) if signum == signal.SIGCHLD else 128 + signum)


def make_tables(options):
    """Tell what machine this is, and make the tables that are asked for."""
    model = re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
    print(f'{model[1] if model else platform.machine()}, {os.cpu_count()} cores; '
          f'{platform.system()} {platform.release()}; {platform.python_implementation()} '
          f'{platform.python_version()}; {time.strftime("%Y-%m-%d")}', flush=True)
    try:
        for name in [options.only] if options.only else TABLES:
            TABLES[name](options)
    except (Failure, OSError) as error:
        sys.exit(f'{sys.argv[0]}: {error}')


# The tables.

def designs(options):
    """Load every server with client.py."""
    rates, cpu = {name: [] for name in DESIGNS}, {name: [] for name in DESIGNS}
    for number, name in interleaved(DESIGNS, options.rounds):
        server = Server(name)
        connections = int(options.connections * SLOW_LOADS.get(name, 1))
        rates[name].append(server.load(LOADERS, connections))
        total = LOADERS * connections
        cpu[name].append(server.stop(total, SIZE) / total * 1e6)
        progress(f'designs, round {number}: {name}, {rates[name][-1]} connections per second')
    fastest = max(map(statistics.median, rates.values()))
    print_table(
        f'Designs: {LOADERS} clients, {SIZE} bytes per connection; CPU: us of the server',
        ['server', 'design', 'conn./s', 'min-max', 'CPU', 'min-max', 'conn./s'],
        *([name, DESIGNS[name], *spread(rates[name]), *spread(cpu[name]),
           bar(statistics.median(rates[name]), fastest)] for name in DESIGNS))
    print_table(
        'Ratios, round by round: times as many connections, and times less CPU for each',
        ['ratio', 'conn./s', 'min-max', 'CPU', 'min-max'],
        *([f'{one} / {other}',
           *spread([a / b for a, b in zip(rates[one], rates[other])], 2),
           *spread([b / a for a, b in zip(cpu[one], cpu[other])], 2)] for one, other in RATIOS))


def idle(options):
    """Make requests on one connection, while a crowd of others is open and silent.

    They go to and fro, never two at a time. On two processors, half of the CPU would be spent
    on waking the other one, or not: as the scheduler likes. So all stays on one.
    """
    most, processors = raise_limit(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})  # the servers inherit it
    cpu = {(size, name): [] for size in options.crowds for name in IDLE}
    for number, name in interleaved(IDLE, options.rounds):
        server, crowd, requests = Server(name), [], 0
        for size in options.crowds:
            if size > (FD_SETSIZE if name == 'server02' else most) - SPARE:
                break
            while len(crowd) < size:
                crowd += [server.connect() for _ in range(min(BATCH, size - len(crowd)))]
                ask(crowd[-1])  # it is the last in the queue: all have been accepted
                requests += 1
            count, cost = ask_for(server, options.seconds)
            cpu[size, name].append(cost)
            requests += count
        if select.select(crowd[:FD_SETSIZE // 2], [], [], 0)[0]:  # nothing can come but the end
            raise Failure(f'{name}: has closed idle connections while we measured')
        server.stop(requests, SMALL_SIZE)
        for conn in crowd:
            conn.close()
        progress(f'idle, round {number}: {name}, {cost:.0f} us amid {len(crowd)}')
    os.sched_setaffinity(0, processors)
    print_table(
        f'Idle crowd: CPU of the server in us per request of {SMALL_SIZE} bytes, on 1 processor',
        ['idle', *[heading for name in IDLE for heading in (name, 'min-max')]],
        *([str(size), *[cell for name in IDLE for cell in spread(cpu[size, name])]]
          for size in options.crowds))


def herd(options):
    """Count whom a connection wakes, by what it does next: it goes to sleep again."""
    rows = []
    for name, call in HERDS.items():
        server = Server(*name.split())
        accepting, serving = [], []
        for _ in range(options.wakes):
            asleep = server.sleeps()
            with server.connect() as conn:
                accepted = server.sleeps()  # one child now waits for the request,
                ask(conn)
                server.sleeps()             # and now for the end
            accepting.append(accepted - asleep)
            serving.append(server.sleeps() - accepted)
        server.stop(options.wakes, SMALL_SIZE)
        rows.append([name, call, *spread(accepting), *spread(serving)])
        progress(f'herd: {name}, {rows[-1][2]} by a connection')
    print_table(
        f'Herd: voluntary context switches of {POOL} children for one connection',
        ['server', 'wait in', 'to accept', 'min-max', 'to serve', 'min-max'], *rows)


def greedy(options):
    """Be polite beside a client that pipelines requests without end."""
    alone, medians, worst = [{name: [] for name in GREEDY} for _ in range(3)]
    for number, name in interleaved(GREEDY, options.rounds):
        server = Server(name, pool=GREEDY_CONNECTIONS + FREE)
        before = polite_waits(server, options.polite / 4)
        neighbour = Program('greedy_client.py', 'tests/greedy_client.py', '-i', HOST,
                            '-p', server.port, '-c', GREEDY_CONNECTIONS)
        wait_until(neighbour.output, 'greedy_client.py: does not connect')
        time.sleep(SETTLE)
        waits = polite_waits(server, options.polite)
        neighbour.process.send_signal(signal.SIGINT)
        neighbour.wait()
        server.stop(len(before) + sum(wait < LIMIT * 1000 for wait in waits), SMALL_SIZE)
        alone[name].append(statistics.median(before))
        medians[name].append(statistics.median(waits))
        worst[name].append(max(waits))
        progress(f'greedy, round {number}: {name}, {medians[name][-1]:.1f} ms')
    longest = max(map(statistics.median, medians.values()))
    print_table(
        f'Greedy neighbour, {GREEDY_CONNECTIONS} connections: ms that a polite client waits',
        ['server', 'alone', 'min-max', 'beside', 'min-max', 'worst', 'beside'],
        *([name, *spread(alone[name], 1), *spread(medians[name], 1), f'{max(worst[name]):.0f}',
           bar(statistics.median(medians[name]), longest)] for name in GREEDY))
    print(f'\n{LIMIT * 1000} ms: no reply by then; the client has given up.')


def fork(options):
    """Have processes of several sizes fork, and start threads."""
    figures = {size: [] for size in MEGABYTES}
    for number, size in interleaved(MEGABYTES, options.rounds):
        program = Program('fork_cost.py', 'tests/fork_cost.py', '-m', size, '-n', options.forks)
        figures[size].append([float(figure) for figure in re.findall(r'(\d+) us', program.wait())])
        progress(f'fork, round {number}: {size} MB more, {figures[size][-1][0]:.0f} us')
    costs = {size: [*zip(*figures[size])] for size in MEGABYTES}
    longest = max(statistics.median(forks) for forks, _ in costs.values())
    print_table(
        'What a fork costs, in us, in a parent with so many MB more; and a thread',
        ['MB', 'fork, exit, wait', 'min-max', 'start, join', 'min-max', 'fork'],
        *([str(size), *spread(forks), *spread(threads), bar(statistics.median(forks), longest)]
          for size, (forks, threads) in costs.items()))


TABLES = {'designs': designs, 'idle': idle, 'herd': herd, 'greedy': greedy, 'fork': fork}


# How it is measured.

class Program:
    """A script that runs. Its output goes to memory: a pipe may fill, and its reader costs time."""

    def __init__(self, name, *command):
        self.name = name
        self.files = os.memfd_create('stdout'), os.memfd_create('stderr')
        for file in self.files:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # or its children overwrite each other
        self.process = subprocess.Popen(
            [sys.executable, '-I', *map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=self.files[0], stderr=self.files[1])
        self.pid = self.process.pid

    def output(self):
        """Return its standard output up to now; any other output is a failure."""
        stdout, stderr = [os.pread(file, os.fstat(file).st_size, 0).decode(errors='replace')
                          for file in self.files]
        if stderr:
            raise Failure(f'{self.name}: {stderr.splitlines()[-1]}')
        return stdout

    def wait(self):
        """Wait for its end and return its output; all must have gone well."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f'none after {PATIENCE} seconds'
        output = self.output()
        if status:
            raise Failure(f'{self.name}: exit status {status}')
        for file in self.files:
            os.close(file)
        return output


class Server(Program):
    """A server that is ready for clients."""

    def __init__(self, name, *options, pool=POOL):
        command = YARDSTICKS.get(name, [f'{name}.py'])
        self.pool = pool if name in POOLS else 0
        if self.pool:
            options += '-n', pool
        super().__init__(name, *command, '-i', HOST, '-p', 0, *options)
        self.port = int(wait_until(self.is_ready, f'{name}: does not start')[1])
        self.children = [int(pid) for pid in re.findall(r' PID: (\d+)', self.output())]
        self.cpu_before = sum(map(cpu_now, [self.pid, *self.children]))

    def is_ready(self):
        """Return a match of its first line, once its pool is complete."""
        output = self.output()
        if self.process.poll() is not None:
            raise Failure(f'{self.name}: exit status {self.process.returncode}')
        if output.count(' started with ') < self.pool:
            return None
        return re.match(r'Listening on port (\d+) \.\.\.\n', output)

    def stop(self, requests, size):
        """Stop it; it must have got *requests*. Return the seconds of CPU that they took."""
        before = cpu_reaped()
        self.process.send_signal(signal.SIGINT)
        served = self.wait().count(f'Got request to send {size} bytes')
        if served < requests:
            raise Failure(f'{self.name}: got {served} of {requests} requests')
        return cpu_reaped() - before - self.cpu_before

    def load(self, children, connections):
        """Let client.py loose on it; return the connections per second."""
        client = Program(f'client.py against {self.name}', 'client.py', '-i', HOST,
                         '-p', self.port, '-c', children, '-t', connections, '-b', SIZE)
        try:
            summary = client.wait()
        except Failure:
            self.is_ready()  # if the server has died or complained, that is what to report
            raise
        made, rate = re.search(r'(\d+) connections, .* (\d+) conn', summary).groups()
        if int(made) != children * connections:
            raise Failure(f'{self.name}: {made} of {children * connections} connections')
        return int(rate)

    def connect(self, timeout=PATIENCE):
        """Return a connection to it."""
        return socket.create_connection((HOST, self.port), timeout)

    def sleeps(self):
        """Wait until all its processes sleep; return how often its children have gone to sleep.

        It takes two equal looks: during one, the parent may wake a child that we have looked at.
        """
        looks = [[]]

        def is_calm():
            looks.append([status_of(pid) for pid in [self.pid, *self.children]])
            return looks[-1] == looks[-2] and all(asleep for asleep, _ in looks[-1])

        wait_until(is_calm, f'{self.name}: does not come to rest')
        return sum(count for _, count in looks[-1][1:])


def ask(conn):
    """Make a request on *conn* and take the reply."""
    conn.sendall(b'%d\n' % SMALL_SIZE)
    remaining = SMALL_SIZE
    while remaining:
        data = conn.recv(remaining)
        if not data:
            raise Failure('a server has closed a connection too early')
        remaining -= len(data)


def ask_for(server, seconds):
    """Ask again and again; return how often, and the microseconds of the server's CPU for each."""
    with server.connect() as conn:
        ask(conn)
        count, before, end = 0, cpu_now(server.pid), time.perf_counter() + seconds
        while time.perf_counter() < end:
            ask(conn)
            count += 1
        return count + 1, (cpu_now(server.pid) - before) / count * 1e6


def polite_waits(server, seconds):
    """Ask on one connection after another; return the milliseconds that each took."""
    waits, end = [], time.perf_counter() + seconds
    while not waits or time.perf_counter() < end:
        start = time.perf_counter()
        with contextlib.suppress(socket.timeout), server.connect(LIMIT) as conn:
            ask(conn)
        waits.append(min(time.perf_counter() - start, LIMIT) * 1000)
        time.sleep(REST)
    return waits


def interleaved(names, rounds):
    """Yield each name once a round; every other round runs backwards, so that no drift counts."""
    for number in range(rounds):
        for name in [*names][::-1 if number % 2 else 1]:
            yield number + 1, name


def raise_limit():
    """Allow as many descriptors as can be had, here and in the servers; return the number."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def cpu_now(pid):
    """Return the seconds of CPU of the living process *pid*, exact, all its threads included."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) makes of it


def cpu_reaped():
    """Return the seconds of CPU of all our dead children, and of all those that they reaped."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def status_of(pid):
    """Return whether the process *pid* is asleep, and how often it has gone to sleep."""
    text = pathlib.Path(f'/proc/{pid}/status').read_text()
    return '\nState:\tS' in text, int(re.search(r'\nvoluntary_ctxt_switches:\s*(\d+)', text)[1])


def wait_until(condition, complaint):
    """Wait until *condition* returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise Failure(complaint)
        time.sleep(0.001)
    return result


# How it is shown.

def progress(line):
    """Tell on stderr how far we are."""
    print(f'{time.perf_counter() - started:4.0f} s  {line}', file=sys.stderr, flush=True)


def spread(values, places=0):
    """Return two cells: the median of *values*; the minimum and the maximum."""
    if not values:
        return ['--', '--']
    return [f'{statistics.median(values):.{places}f}',
            f'{min(values):.{places}f}-{max(values):.{places}f}']


def bar(value, longest):
    """Return a cell to look at."""
    return '#' * max(1, round(BAR * value / longest))


def print_table(title, heading, *rows):
    """Print a table for a literal block of reST: what names a row to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    to_the_right = [column > 0 and rows[0][column][0].isdigit() for column in range(len(widths))]
    rule = '  '.join('=' * width for width in widths)
    lines = ['  '.join(cell.rjust(width) if right else cell.ljust(width)
                       for cell, width, right in zip(row, widths, to_the_right)).rstrip()
             for row in [heading, *rows]]
    print('', title, '', rule, lines[0], rule, *lines[1:], rule, sep='\n', flush=True)


def positive_number(text):
    """Return *text* as a number from 1 up; argparse reports a ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_options():
    """Return the options of the command line, and what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', metavar='TABLE', choices=TABLES,
                        help=f'make one table alone: {", ".join(TABLES)}')
    parser.add_argument('--rounds', type=positive_number,
                        help='how often to measure everything (default: 5, or 1 with --quick)')
    parser.add_argument('--quick', action='store_true',
                        help='about 10 seconds, smaller crowds, rough figures')
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.connections = 80 if options.quick else 800  # for each child of client.py
    options.seconds = 0.05 if options.quick else 0.2    # amid each crowd
    options.crowds = QUICK_CROWDS if options.quick else CROWDS
    options.wakes = 20 if options.quick else 200        # connections
    options.polite = 0.1 if options.quick else 1        # seconds beside a greedy neighbour
    options.forks = 5 if options.quick else 50
    return options


started = time.perf_counter()

if __name__ == '__main__':
    main()
