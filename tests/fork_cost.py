#!/usr/bin/env python3
"""What a fork costs, and what a thread costs.

Try:       python3 tests/fork_cost.py -m 400
"""
import argparse
import os
import threading
import time


def fork_and_wait():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def start_and_join():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def microseconds(function, count):
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-m', '--megabytes', type=int, default=0)
    parser.add_argument('-n', '--number', type=int, default=50)
    options = parser.parse_args()
    data = [bytes(992) for _ in range(options.megabytes * 1024)]
    print(f'fork, exit and wait: {microseconds(fork_and_wait, options.number):.0f} us')
    print(f'start and join of a thread: {microseconds(start_and_join, options.number):.0f} us')


if __name__ == '__main__':
    main()
