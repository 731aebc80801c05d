#!/usr/bin/env python3
"""Measure the servers of the collection, beside those of the standard library.

Three tables: "designs" loads each server with client.py; "idle" has one busy
client amid a crowd of silent ones; "herd" counts whom a connection wakes.

Try:       python tests/benchmark.py
           python tests/benchmark.py --quick --only herd
Notice:    the ratios; the CPU that poll takes for a crowd that does nothing;
           how many children wake up for one connection.
See also:  client.py (the load), server01.py to server08.py. Linux only.
"""
import argparse
import asyncio
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
import socketserver
import statistics
import subprocess
import sys
import threading
import time

if not sys.platform.startswith('linux'):
    sys.exit('benchmark.py: it asks the /proc of Linux, and epoll exists on Linux only')

HOST = '127.0.0.1'        # in numbers: nobody looks up a name, nobody tries ::1 first
BACKLOG = 1024            # connections; here and in the next three, as in the servers
BLOCK = bytes(64 * 1024)
TIMEOUT = 10              # seconds
STACK = 256 * 1024        # bytes
PATIENCE = 60             # seconds for anything that has to happen
LOADERS = 15              # children of client.py
SIZE = 4096               # bytes for each connection
SMALL_SIZE = 100          # bytes for each request amid a crowd: the waiting counts
CROWDS = 0, 250, 900, 2500, 10000  # idle connections
QUICK_CROWDS = 0, 250, 900, 1200, 2500
BATCH = 500               # connections to open before the server must catch up: within BACKLOG
SPARE = 50                # descriptors needed beside those of a crowd
FD_SETSIZE = 1024         # what select can watch: descriptors below this
POOL = 10                 # children, or threads, in each of POOLS
BAR = 10                  # characters, the longest bar
STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

ROOT = pathlib.Path(__file__).resolve().parent.parent
DESIGNS = {               # a yardstick comes right after its server: less changes in between
    'server01': 'fork', 'ForkingTCPServer': 'socketserver', 'server02': 'select',
    'server03': 'prefork', 'server03a': 'prefork+count', 'server04': 'prefork+pass',
    'server05': 'thread', 'ThreadingTCPServer': 'socketserver', 'server06': 'poll',
    'server07': 'epoll', 'asyncio': 'streams', 'server08': 'prethread'}
LOADS = {                 # of options.connections; for all others 2, so that each takes a second
    'server01': 1 / 4, 'ForkingTCPServer': 1 / 4, 'server05': 1 / 2, 'ThreadingTCPServer': 1 / 2}
POOLS = 'server03', 'server04', 'server08'
RATIOS = [('server01', 'ForkingTCPServer'), ('server03', 'ForkingTCPServer'),
          ('server05', 'ThreadingTCPServer'), ('server07', 'asyncio')]
IDLE = 'server02', 'server06', 'server07', 'asyncio'
HERDS = {'server03a': 'accept', 'server03a --select': 'select', 'server04': 'recvmsg'}

running = []              # Programs
started = time.perf_counter()


class Failure(Exception):
    """A server or client.py has not done what it should: there is nothing to measure."""


# The yardsticks offer the same service in the way that the library's own manual shows. What is
# not equal favours them: they check a request less strictly, and asyncio has no timeout.

def say(line):
    """Write *line* by one system call, as the servers do."""
    os.write(1, f'{line}\n'.encode())


class Handler(socketserver.StreamRequestHandler):
    """The service with socketserver."""

    timeout = TIMEOUT

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            while line := self.rfile.readline():
                say(f'Got request to send {int(line)} bytes. Sending them all...')
                for remaining in range(int(line), 0, -len(BLOCK)):
                    self.wfile.write(BLOCK[:remaining])


async def handle_streams(reader, writer):
    """The service with asyncio."""
    with contextlib.suppress(OSError):  # the client has left
        while line := await reader.readline():
            say(f'Got request to send {int(line)} bytes. Sending them all...')
            for remaining in range(int(line), 0, -len(BLOCK)):
                writer.write(BLOCK[:remaining])
                await writer.drain()
    writer.close()


async def serve_streams(port):
    """Be an asyncio server, for ever."""
    server = await asyncio.start_server(handle_streams, HOST, port, backlog=BACKLOG)
    say(f'Listening on port {server.sockets[0].getsockname()[1]} ...')
    await server.serve_forever()


def serve_yardstick(name, port):
    """Be the server *name* until SIGINT; end as the servers do, at once."""
    raise_limit()
    if name == 'asyncio':
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(0))
        asyncio.run(serve_streams(port))
    threading.stack_size(STACK)
    design = getattr(socketserver, name)
    design.request_queue_size = BACKLOG  # by default 5: it would lose a SYN for a second
    design.daemon_threads = True         # or it keeps a list of them, and walks through it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with design((HOST, port), Handler) as server, contextlib.suppress(KeyboardInterrupt):
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        say(f'Listening on port {server.server_address[1]} ...')
        server.serve_forever()
    os._exit(0)  # ForkingTCPServer has reaped its children: their CPU is counted


# What is measured, and how.

def raise_limit():
    """Allow as many descriptors as can be had; return the number."""
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


def wait_until(condition, complaint, seconds=PATIENCE):
    """Wait until *condition* returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise Failure(complaint)
        time.sleep(0.001)
    return result


class Program:
    """A script that runs in a process group of its own. Its output stays in memory."""

    def __init__(self, name, *command):
        self.name = name
        self.files = os.memfd_create('stdout'), os.memfd_create('stderr')
        for file in self.files:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # or its children overwrite each other
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # until stop() knows of it
        self.process = subprocess.Popen(
            [sys.executable, '-I', *map(str, command)], cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self.files[0], stderr=self.files[1],
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP))
        running.append(self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
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
        with contextlib.suppress(ProcessLookupError):  # as it should be
            os.killpg(self.pid, 0)
            raise Failure(f'{self.name}: has left processes behind')
        running.remove(self)
        for file in self.files:
            os.close(file)
        return output


class Server(Program):
    """A server that is ready for clients."""

    def __init__(self, name):
        script, *options = name.split()
        command = [f'{script}.py', *options, '-i', HOST]
        if not script.startswith('server'):
            command = [__file__, '--yardstick', script]
        super().__init__(name, *command, '-p', 0)
        self.port = int(wait_until(self.is_ready, f'{name}: does not start')[1])
        self.children = [int(pid) for pid in re.findall(r' PID: (\d+)', self.output())]
        self.cpu_before = sum(map(cpu_now, [self.pid, *self.children]))

    def is_ready(self):
        """Return a match of its first line, once its pool is complete."""
        output = self.output()
        if self.process.poll() is not None:
            raise Failure(f'{self.name}: exit status {self.process.returncode}')
        if output.count(' started with ') < POOL * self.name.startswith(POOLS):
            return None
        return re.match(r'Listening on port (\d+) \.\.\.\n', output)

    def stop(self, requests):
        """Stop it; it must have got *requests*. Return the seconds of CPU that they took."""
        before = cpu_reaped()
        self.process.send_signal(signal.SIGINT)
        served = self.wait().count('Got request')
        if served != requests:
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

    def connect(self):
        """Return a connection to it."""
        return socket.create_connection((HOST, self.port), PATIENCE)


def ask(conn, size):
    """Make a request on *conn* and take the reply."""
    conn.sendall(b'%d\n' % size)
    while size:
        data = conn.recv(size)
        if not data:
            raise Failure('a server has closed a connection too early')
        size -= len(data)


def kill_all():
    """Kill all that runs, and wait until it is gone."""
    for program in running:
        group = program.pid
        with contextlib.suppress(ProcessLookupError, ChildProcessError, Failure):
            os.killpg(group, signal.SIGKILL)
            os.waitpid(group, 0)  # not Popen.wait: a signal may have come while it held its lock
            wait_until(lambda group=group: os.killpg(group, 0), 'gone, but not reaped', 2)


def stop(signum, frame):
    """Leave nothing behind and exit."""
    kill_all()
    os._exit(128 + signum)


# The tables.

def progress(line):
    """Tell on stderr how far we are."""
    print(f'{time.perf_counter() - started:4.0f} s  {line}', file=sys.stderr, flush=True)


def spread(values, places=0):
    """Return two cells: the median of *values*; the minimum and the maximum."""
    return [f'{statistics.median(values):.{places}f}',
            f'{min(values):.{places}f}-{max(values):.{places}f}']


def bar(value, longest):
    """Return a cell to look at."""
    return '#' * max(1, round(BAR * value / longest))


def print_table(title, *rows):
    """Print *rows*, first the heading, as a literal block of reST; numbers go to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = '  '.join('=' * width for width in widths)
    lines = ['  '.join(cell.rjust(width) if sample[0].isdigit() else cell.ljust(width)
                       for cell, width, sample in zip(row, widths, rows[1])).rstrip()
             for row in rows]
    print(f'\n{title}::\n', *[rule, lines[0], rule, *lines[1:], rule], sep='\n    ')


def interleaved(cells, rounds):
    """Yield each of *cells* once per round, each round from another one on."""
    for number in range(rounds):
        start = number * 5 % len(cells)
        for cell in cells[start:] + cells[:start]:
            yield number + 1, cell


def designs(options):
    """Load every design with client.py."""
    rates, cpu = {name: [] for name in DESIGNS}, {name: [] for name in DESIGNS}
    for number, name in interleaved([*DESIGNS], options.rounds):
        connections = int(options.connections * LOADS.get(name, 2))
        server = Server(name)
        rates[name].append(server.load(LOADERS, connections))
        total = LOADERS * connections
        cpu[name].append(server.stop(total) / total * 1e6)
        progress(f'designs, round {number}: {name}, {rates[name][-1]} connections per second')
    fastest = max(map(statistics.median, rates.values()))
    print_table(
        f'Designs: {LOADERS} clients, {SIZE} bytes for each, rounds: {options.rounds}; '
        'CPU in us per connection',
        ['server', 'design', 'conn./s', 'min-max', 'CPU us', 'min-max', 'conn./s'],
        *([name, DESIGNS[name], *spread(rates[name]), *spread(cpu[name]),
           bar(statistics.median(rates[name]), fastest)]
          for name in sorted(DESIGNS, key=lambda name: (not name.startswith('server'), name))))
    print_table(
        'Ratios, round by round: how many times the connections, how many times less CPU',
        ['ratio', 'conn./s', 'min-max', 'CPU', 'min-max'],
        *([f'{one} / {other}',
           *spread([a / b for a, b in zip(rates[one], rates[other])], 2),
           *spread([b / a for a, b in zip(cpu[one], cpu[other])], 2)] for one, other in RATIOS))


def serve_amid(server, size, seconds):
    """Return the requests per second and the microseconds of CPU of each, amid *size* idlers."""
    crowd, requests = [], 0
    while len(crowd) < size:
        crowd += [server.connect() for _ in range(min(BATCH, size - len(crowd)))]
        ask(crowd[-1], SMALL_SIZE)  # it is the last in the queue: all have been accepted
        requests += 1
    with server.connect() as conn, select.epoll() as watcher:
        ask(conn, SMALL_SIZE)
        count, before, start = 0, cpu_now(server.pid), time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            ask(conn, SMALL_SIZE)
            count += 1
        cpu = cpu_now(server.pid) - before
        for idler in crowd:
            watcher.register(idler, select.EPOLLIN)  # nothing can come but the end
        if watcher.poll(0):
            raise Failure(f'{server.name}: has closed idle connections while we measured')
    server.stop(requests + 1 + count)
    for idler in crowd:
        idler.close()
    return count / elapsed, cpu / count * 1e6


def idle(options):
    """Make requests on one connection, while a crowd of others is open and silent.

    They go to and fro, never two at a time. On two processors, half of the CPU would be spent
    on waking the other one, or not: as the scheduler likes. So all stays on one.
    """
    most, processors = raise_limit(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})  # the servers inherit it
    crowds = [size for size in options.crowds if size < max(1, most - SPARE)]
    cells = {(name, size): [] for size in crowds for name in IDLE
             if name != 'server02' or size < FD_SETSIZE - SPARE}
    for number, (name, size) in interleaved([*cells], options.rounds):
        figures = serve_amid(Server(name), size, options.seconds)
        cells[name, size].append(figures)
        progress(f'idle, round {number}: {name} amid {size}, {figures[0]:.0f} requests per second')
    os.sched_setaffinity(0, processors)
    costs = {cell: statistics.median(cpu for _, cpu in cells[cell]) for cell in cells}
    rows = []
    for name, size in [(name, size) for name in IDLE for size in crowds]:
        row = ['--'] * 4 + ['beyond select']
        if (name, size) in cells:
            rates, cpu = zip(*cells[name, size])
            row = [*spread(rates), *spread(cpu), bar(costs[name, size], max(costs.values()))]
        rows.append([name, DESIGNS[name], str(size), *row])
    print_table(
        f'Idle crowd: 1 busy client, 1 processor, {SMALL_SIZE} bytes, rounds: {options.rounds}; '
        'CPU in us per request',
        ['server', 'design', 'idle', 'req./s', 'min-max', 'CPU us', 'min-max', 'CPU'], *rows)
    print(f'\nselect cannot watch a descriptor of {FD_SETSIZE} or more.')
    if len(crowds) < len(options.crowds):
        print(f'Left out, for only {most} descriptors can be had (ulimit -Hn): crowds of '
              f'{", ".join(map(str, options.crowds[len(crowds):]))}.')


def status_of(pid):
    """Return whether the process *pid* is asleep, and how often it has gone to sleep."""
    text = pathlib.Path(f'/proc/{pid}/status').read_text()
    return '\nState:\tS' in text, int(re.search(r'\nvoluntary_ctxt_switches:\s*(\d+)', text)[1])


def switches(server):
    """Wait until all processes of *server* sleep; return how often its children went to sleep.

    It takes two equal looks: during one, the parent may wake a child that we have looked at.
    """
    looks = [[]]

    def is_calm():
        looks.append([status_of(pid) for pid in [server.pid, *server.children]])
        return looks[-1] == looks[-2] and all(asleep for asleep, _ in looks[-1])

    wait_until(is_calm, f'{server.name}: does not come to rest')
    return sum(count for _, count in looks[-1][1:])


def herd(options):
    """Count whom a connection wakes, by what it does next: it goes to sleep again."""
    rows = []
    for name, call in HERDS.items():
        server = Server(name)
        accepting, serving = [], []
        for _ in range(options.connections):
            asleep = switches(server)
            with server.connect() as conn:
                accepted = switches(server)  # one child now waits for the request,
                ask(conn, SIZE)
                switches(server)             # and now for the end
            accepting.append(accepted - asleep)
            serving.append(switches(server) - accepted)
        before = switches(server)
        server.load(1, options.connections)
        both = (switches(server) - before) / options.connections
        server.stop(2 * options.connections)
        rows.append([name, call, *spread(accepting, 1), *spread(serving, 1), f'{both:.1f}'])
        progress(f'herd: {name}, {rows[-1][2]} by a connection')
    print_table(f'Herd: voluntary context switches of {POOL} children per connection, '
                f'{options.connections} connections',
                ['server', 'wait in', 'to accept', 'min-max', 'to serve', 'min-max', 'client.py'],
                *rows)
    print('\nto accept: the connection is made, and all sleep again; to serve: request, reply, '
          'close.\nclient.py: both together, under client.py -c 1, with too little time for '
          'some to sleep again.\nserver04, to serve: when the parent takes the byte for "idle '
          'again", its sender may wake.')


TABLES = {'designs': designs, 'idle': idle, 'herd': herd}


def positive_number(text):
    """Return *text* as a number from 1 up; argparse reports a ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=TABLES, help='make one table alone')
    parser.add_argument('--rounds', type=positive_number,
                        help='how often to measure everything (default: 5, or 1 with --quick)')
    parser.add_argument('--quick', action='store_true',
                        help='about 10 seconds, smaller crowds, rough figures')
    parser.add_argument('--yardstick', choices=[name for name in DESIGNS if name[:6] != 'server'],
                        help=argparse.SUPPRESS)  # be this server, not a benchmark
    parser.add_argument('-p', '--port', type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.connections = 20 if options.quick else 400  # for each child of client.py
    options.seconds = 0.1 if options.quick else 0.3     # amid each crowd
    options.crowds = QUICK_CROWDS if options.quick else CROWDS
    return options


def main():
    options = parse_options()
    if options.yardstick:
        serve_yardstick(options.yardstick, options.port)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide the CPU of children
    for signum in STOP:
        signal.signal(signum, stop)
    model = re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
    print(f'{model[1] if model else platform.machine()}, {os.cpu_count()} cores; '
          f'{platform.system()} {platform.release()}; {platform.python_implementation()} '
          f'{platform.python_version()}; {time.strftime("%Y-%m-%d")}')
    try:
        for name, make_table in TABLES.items():
            if options.only in (None, name):
                make_table(options)
                sys.stdout.flush()
    except (Failure, OSError) as error:
        sys.exit(f'{sys.argv[0]}: {error}')
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        kill_all()


if __name__ == '__main__':
    main()
