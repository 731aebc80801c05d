#!/usr/bin/env python3
"""Measure the servers of the collection, with the standard library's own as yardsticks.

Five tables. designs: every server under the load of client.py. idle: one busy client amid a crowd
of silent ones. herd: how many children wake up for one connection. greedy: how long a polite
client waits beside one that pipelines requests without end. fork: what a fork costs.

Try:       python3 tests/benchmark.py
           python3 tests/benchmark.py --quick --only greedy
Notice:    the ratios, where 0.9 to 1.1 is level. The figures change with the machine and its mood.
           On a busy machine only the ratios of CPU hold from run to run, not those of connections.
See also:  client.py (the load), yardstick_socketserver.py and yardstick_asyncio.py (what is not
           equal, and to whose favour), greedy_client.py, fork_cost.py. Linux only.
"""
import argparse
import contextlib
import fcntl
import logging
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

ROUNDS = {'designs': 5, 'idle': 3, 'herd': 1, 'greedy': 3, 'fork': 3}
FULL = {'connections': 600, 'idle_seconds': 0.2, 'crowds': (0, 250, 900, 2500, 10_000),
        'wakes': 200, 'settle': 0.3, 'polite_seconds': 0.6, 'limit': 2}
QUICK = {'connections': 30, 'idle_seconds': 0.05, 'crowds': (0, 250, 900, 1200, 2500),
         'wakes': 20, 'settle': 0.1, 'polite_seconds': 0.1, 'limit': 0.5}
DESIGNS = {               # in the order of the page; a yardstick comes right after its server
    'server01': 'fork', 'ForkingTCPServer': 'socketserver',
    'server05': 'thread', 'ThreadingTCPServer': 'socketserver',
    'server02': 'select', 'server06': 'poll', 'server07': 'epoll', 'asyncio': 'streams',
    'server03': 'prefork', 'server03a': 'prefork, count', 'server04': 'prefork, pass',
    'server08': 'prethread'}
RATIOS = [('server01', 'ForkingTCPServer'), ('server05', 'ThreadingTCPServer'),
          ('server07', 'asyncio'), ('server03', 'ForkingTCPServer')]
IDLE = 'server02', 'server06', 'server07', 'asyncio'
HERDS = {'server03a': 'accept', 'server03a --select': 'select', 'server04': 'recvmsg'}
GREEDY = [name for name in DESIGNS if not name.endswith('TCPServer')]
MEGABYTES = 0, 100, 400   # of data in the parent of a fork

COMMANDS = {              # for all others: the name and .py
    'ForkingTCPServer': ['tests/yardstick_socketserver.py', 'ForkingTCPServer'],
    'ThreadingTCPServer': ['tests/yardstick_socketserver.py', 'ThreadingTCPServer'],
    'asyncio': ['tests/yardstick_asyncio.py'],
    'server03a --select': ['server03a.py', '--select']}
POOLS = 'server03', 'server04', 'server08'  # how their names begin
POOL = 10                 # children, or threads
CLIENTS = 15              # children of client.py
SLOW = {                  # parts of the connections for these, so that they take no longer
    'server01': 1 / 8, 'ForkingTCPServer': 1 / 8, 'server05': 1 / 4, 'ThreadingTCPServer': 1 / 4}
SIZE = 4096               # bytes for each connection of client.py
SMALL_SIZE = 100          # bytes for each request where the wait counts
BATCH = 500               # connections to open before the server must catch up: within its backlog
FD_SETSIZE = 1024         # what select can watch: descriptors below this
SPARE = 50                # descriptors needed beside those of a crowd
NEIGHBOURS = 50           # connections of greedy_client.py; as many children of a pool are busy,
FREE = 10                 # and these are not
REST = 0.01               # seconds between two requests of the polite client
PATIENCE = 60             # seconds for anything that has to happen
HOST = '127.0.0.1'        # a number: no time goes into names, or into trying ::1 first
BAR = 10                  # characters, the longest bar
ROOT = pathlib.Path(__file__).resolve().parent.parent
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
    os.setpgid(pid, pid)  # in both, as a shell does: neither knows who comes first
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        make_tables(options)
        sys.exit()
    signum = signal.sigwait(SIGNALS)
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(2000):  # milliseconds; init reaps what the child has left
            os.killpg(pid, 0)
            time.sleep(0.001)
    sys.exit(os.waitstatus_to_exitcode(status) if signum == signal.SIGCHLD else 128 + signum)


def make_tables(options):
    """Tell what machine this is, and make the tables that are asked for."""
    logging.basicConfig(format='%(asctime)s  %(message)s', datefmt='%X', level=logging.INFO)
    model = re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
    print(f'{model[1] if model else platform.machine()}, {os.cpu_count()} cores; '
          f'{platform.system()} {platform.release()}; {platform.python_implementation()} '
          f'{platform.python_version()}; {time.strftime("%Y-%m-%d")}', flush=True)
    try:
        for name in [options.only] if options.only else TABLES:
            TABLES[name](options, options.rounds or (1 if options.quick else ROUNDS[name]))
    except Failure as error:
        sys.exit(f'{sys.argv[0]}: {error}')
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f'{sys.argv[0]}: {Server.latest}: {error}')


# The tables.

def designs(options, rounds):
    """Load every server with client.py."""
    rates, cpu = {name: [] for name in DESIGNS}, {name: [] for name in DESIGNS}
    for number, name in interleaved(DESIGNS, rounds):
        connections = int(options.connections * SLOW.get(name, 1))
        server = Server(name)
        summary = Program(f'client.py against {name}', 'client.py', '-i', HOST, '-p', server.port,
                          '-c', CLIENTS, '-t', connections, '-b', SIZE).wait()
        total = CLIENTS * connections
        rates[name].append(int(re.search(r'(\d+) connections per second', summary)[1]))
        cpu[name].append(server.stop(total, SIZE) / total * 1e6)
        logging.info('designs, round %d: %s, %d conn./s', number, name, rates[name][-1])
    fastest = max(map(statistics.median, rates.values()))
    print_table(
        f'Designs: {CLIENTS} clients, {SIZE} bytes per connection; CPU in us per connection',
        ['server', 'design', 'conn./s', 'min-max', 'CPU', 'min-max', '(bar)'],
        *([name, design, *spread(rates[name]), *spread(cpu[name]),
           '#' * max(1, round(BAR * statistics.median(rates[name]) / fastest))]
          for name, design in DESIGNS.items()))
    print_table(
        'Ratios, round by round: times as many connections per second; times less CPU for each',
        ['ratio', 'conn./s', 'min-max', 'CPU', 'min-max'],
        *([f'{one} / {other}',
           *spread([a / b for a, b in zip(rates[one], rates[other])], 2),
           *spread([b / a for a, b in zip(cpu[one], cpu[other])], 2)] for one, other in RATIOS))


def idle(options, rounds):
    """Make requests on one connection, while a crowd of others is open and silent.

    They go to and fro, never two at a time. On two processors, half of the CPU would be spent
    on waking the other one, or not: as the scheduler likes. So all stays on one.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the servers inherit it, and this:
    if hasattr(os, 'sched_setaffinity'):  # PyPy may lack it
        os.sched_setaffinity(0, {max(processors := os.sched_getaffinity(0))})
    cpu = {(size, name): [] for size in options.crowds for name in IDLE}
    for number, name in interleaved(IDLE, rounds):
        server, crowd, requests = Server(name), [], 1
        with server.connect() as conn:
            ask(conn)  # once it has gone, malloc keeps the 256 KiB of asyncio's recv
        for size in options.crowds:
            if size > (FD_SETSIZE if name == 'server02' else most) - SPARE:
                break
            while len(crowd) < size:
                crowd += [server.connect() for _ in range(min(BATCH, size - len(crowd)))]
                ask(crowd[-1])  # it is the last in the queue: all have been accepted
                requests += 1
            count, cost = cpu_for_requests(server, options.idle_seconds)
            requests += count
            cpu[size, name].append(cost)
        if select.select(crowd[:BATCH], [], [], 0)[0]:  # nothing can come but the end
            raise ConnectionError('has closed idle connections while we measured')
        server.stop(requests, SMALL_SIZE)
        for conn in crowd:
            conn.close()
        logging.info('idle, round %d: %s, %.0f us amid %d', number, name, cost, len(crowd))
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, processors)
    print_table(
        f'Idle crowd: server CPU in us for a request of {SMALL_SIZE} bytes, all on one processor',
        ['idle', *[heading for name in IDLE for heading in (name, 'min-max')]],
        *([str(size), *[cell for name in IDLE for cell in spread(cpu[size, name])]]
          for size in options.crowds))


def herd(options, rounds):
    """Count whom a connection wakes, by what it does next: it goes to sleep again."""
    rows = []
    for name, call in HERDS.items():
        server, accepting, serving = Server(name), [], []
        for _ in range(rounds * options.wakes):
            asleep = sleeps(server)
            with server.connect() as conn:
                accepted = sleeps(server)  # one child now waits for the request,
                ask(conn)
                sleeps(server)             # and now for the end
            accepting.append(accepted - asleep)
            serving.append(sleeps(server) - accepted)
        server.stop(len(serving), SMALL_SIZE)
        rows.append([name, call, *spread(accepting), *spread(serving)])
        logging.info('herd: %s, %s for a connection', name, rows[-1][2])
    print_table(f'Herd: how often {POOL} children, taken together, go to sleep for one connection',
                ['server', 'wait in', 'waiting', 'min-max', 'serving', 'min-max'], *rows)


def greedy(options, rounds):
    """Be polite, first alone, then beside a client that pipelines requests without end."""
    alone, beside, worst = [{name: [] for name in GREEDY} for _ in range(3)]
    for number, name in interleaved(GREEDY, rounds):
        server = Server(name, NEIGHBOURS + FREE)
        before = polite_waits(server, options.polite_seconds / 4, options.limit)
        neighbour = Program(f'greedy_client.py against {name}', 'tests/greedy_client.py',
                            server.port, NEIGHBOURS, PATIENCE)
        wait_until(neighbour.output)
        time.sleep(options.settle)  # until all NEIGHBOURS are being served
        waits = polite_waits(server, options.polite_seconds, options.limit)
        neighbour.interrupt()
        server.stop(len(before) + sum(wait < options.limit * 1000 for wait in waits), SMALL_SIZE)
        alone[name].append(statistics.median(before))
        beside[name].append(statistics.median(waits))
        worst[name].append(max(waits))
        logging.info('greedy, round %d: %s, %.1f ms', number, name, beside[name][-1])
    print_table(
        f'Greedy neighbour, {NEIGHBOURS} connections: ms that a polite client waits for its reply',
        ['server', 'design', 'alone', 'min-max', 'beside it', 'min-max', 'worst'],
        *([name, DESIGNS[name], *spread(alone[name], 1), *spread(beside[name], 1),
           f'{max(worst[name]):.0f}'] for name in GREEDY))
    print(f'({options.limit * 1000:.0f}: no reply by then, and the client gave up)')


def fork(options, rounds):
    """Have processes of several sizes fork, and start threads."""
    costs = {size: [] for size in MEGABYTES}
    for number, size in interleaved(MEGABYTES, rounds):
        output = Program('fork_cost.py', 'tests/fork_cost.py', size).wait()
        costs[size].append([int(cost) for cost in re.findall(r'(\d+) us', output)])
        logging.info('fork, round %d: %d us with %d MB', number, costs[size][-1][0], size)
    print_table(
        'What a fork costs, and a thread, in us, in a process with so many MB of data more',
        ['MB', 'fork, exit, wait', 'min-max', 'start, join', 'min-max'],
        *([str(size), *[cell for column in zip(*costs[size]) for cell in spread(column)]]
          for size in MEGABYTES))


TABLES = {'designs': designs, 'idle': idle, 'herd': herd, 'greedy': greedy, 'fork': fork}


# How it is measured.

class Program:
    """A script that runs. Its output goes to memory: a pipe could fill, and needs a reader."""

    def __init__(self, name, *command):
        self.name = name
        self.stdout = os.memfd_create('stdout')
        fcntl.fcntl(self.stdout, fcntl.F_SETFL, os.O_APPEND)  # or its children overwrite each other
        self.process = subprocess.Popen([sys.executable, '-I', *map(str, command)], cwd=ROOT,
                                        stdin=subprocess.DEVNULL, stdout=self.stdout)
        self.pid = self.process.pid

    def output(self):
        """Return its output up to now."""
        return os.pread(self.stdout, os.fstat(self.stdout).st_size, 0).decode()

    def check(self):
        """Check that it still runs."""
        if self.process.poll() is not None:
            raise Failure(f'{self.name}: has ended with status {self.process.returncode}')

    def wait(self):
        """Wait for its end and return its output; all must have gone well."""
        if self.process.wait(PATIENCE):
            self.check()  # it raises
        output = self.output()
        os.close(self.stdout)
        return output

    def interrupt(self):
        """Stop it by SIGINT and return its output."""
        self.check()
        self.process.send_signal(signal.SIGINT)
        return self.wait()


class Server(Program):
    """A server that is ready for clients."""

    latest = None         # its name: what goes wrong with a connection is its fault

    def __init__(self, name, pool=POOL):
        Server.latest = name
        self.pool = pool if name.startswith(POOLS) else 0
        super().__init__(name, *COMMANDS.get(name, [f'{name}.py']), '-i', HOST, '-p', 0,
                         *(['-n', pool] if self.pool else []))
        self.port = int(wait_until(self.is_ready)[1])
        self.children = [int(pid) for pid in re.findall(r' PID: (\d+)', self.output())]
        self.cpu_before = sum(map(cpu_now, [self.pid, *self.children]))

    def is_ready(self):
        """Return a match of its first line, once its pool is complete."""
        self.check()
        output = self.output()
        if output.count(' started with ') < self.pool:
            return None
        return re.match(r'Listening on port (\d+) \.\.\.\n', output)

    def connect(self, timeout=PATIENCE):
        """Return a connection to it."""
        return socket.create_connection((HOST, self.port), timeout)

    def stop(self, requests, size):
        """Stop it; it must have got *requests*. Return the seconds of CPU that they took."""
        before = cpu_reaped()
        served = self.interrupt().count(f'Got request to send {size} bytes.')
        if served < requests:
            raise Failure(f'{self.name}: has lost {requests - served} of {requests} requests')
        return cpu_reaped() - before - self.cpu_before


def ask(conn):
    """Make a request on *conn* and take the reply."""
    conn.sendall(b'%d\n' % SMALL_SIZE)
    remaining = SMALL_SIZE
    while remaining:
        data = conn.recv(remaining)
        if not data:
            raise ConnectionError('has closed a connection before the end of the reply')
        remaining -= len(data)


def cpu_for_requests(server, seconds):
    """Ask for so many seconds; return how often, and the server's CPU for each in microseconds."""
    with server.connect() as conn:
        ask(conn)
        count, before, end = 1, cpu_now(server.pid), time.perf_counter() + seconds
        while time.perf_counter() < end:
            ask(conn)
            count += 1
        return count, (cpu_now(server.pid) - before) / (count - 1) * 1e6


def polite_waits(server, seconds, limit):
    """Ask on one connection after another; return the milliseconds that each took, to *limit*."""
    waits, end = [], time.perf_counter() + seconds
    while not waits or time.perf_counter() < end:
        start = time.perf_counter()
        with contextlib.suppress(socket.timeout), server.connect(limit) as conn:
            ask(conn)
        waits.append(min(time.perf_counter() - start, limit) * 1000)
        time.sleep(REST)
    return waits


def sleeps(server):
    """Wait until the whole server sleeps; return how often its children have gone to sleep."""
    looks = [None]

    def is_calm():  # two equal looks: during one, the parent may wake a child already looked at
        texts = [pathlib.Path(f'/proc/{pid}/status').read_text()
                 for pid in [server.pid, *server.children]]
        looks.append([int(re.search(r'\nvoluntary_ctxt_switches:\s*(\d+)', text)[1])
                      for text in texts])
        return looks[-1] == looks[-2] and all('\nState:\tS' in text for text in texts)

    wait_until(is_calm)
    return sum(looks[-1][1:])


def cpu_now(pid):
    """Return the seconds of CPU of the living process *pid*, exact, all its threads included."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) makes of it


def cpu_reaped():
    """Return the seconds of CPU of all our dead children, and of all those that they reaped."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def wait_until(condition):
    """Wait until *condition* returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f'not ready after {PATIENCE} seconds')
        time.sleep(0.001)
    return result


def interleaved(names, rounds):
    """Yield each name once a round; every other round runs backwards, against a drift."""
    for number in range(1, rounds + 1):
        for name in [*names][::1 if number % 2 else -1]:
            yield number, name


# How it is shown.

def spread(values, places=0):
    """Return two cells: the median of *values*; the minimum and the maximum."""
    if not values:
        return ['--', '--']
    return [f'{statistics.median(values):.{places}f}',
            f'{min(values):.{places}f}-{max(values):.{places}f}']


def print_table(title, heading, *rows):
    """Print a table for a literal block of the page; names go to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    print('', title, sep='\n')
    for row in heading, *rows:
        print('  '.join(cell.rjust(width) if sample[0].isdigit() else cell.ljust(width)
                        for cell, width, sample in zip(row, widths, [' ', *rows[0][1:]])).rstrip(),
              flush=True)


def parse_options():
    """Return the options of the command line, with what --quick or its absence sets."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=TABLES, help='make one table alone')
    parser.add_argument('--rounds', type=int, metavar='N',
                        help='how often to measure (default: 1 to 7, as a table needs)')
    parser.add_argument('--quick', action='store_true',
                        help='about 15 seconds, smaller crowds, rough figures')
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error('--rounds: at least 1')
    vars(options).update(QUICK if options.quick else FULL)
    return options


if __name__ == '__main__':
    main()
