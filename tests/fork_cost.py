#!/usr/bin/env python3
"""What a fork costs in a process that has so many megabytes of data, and what a thread costs.

Try:       python3 tests/fork_cost.py 0
           python3 tests/fork_cost.py 400
Notice:    fork copies the page tables: it costs by the size of the parent. A thread does not.
See also:  server01.py (a fork for each client), server03.py (the forks come first).
"""
import os
import sys
import threading
import time

SECONDS = 0.3             # for each figure
OBJECT = 1024 - 33        # bytes; with its header, one KiB


def fork_and_wait():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def start_and_join():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


data = [bytes(OBJECT) for _ in range(int(sys.argv[1]) * 1024)]  # small, so that no huge page helps
for action in fork_and_wait, start_and_join:
    costs, end = [], time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        action()
        costs.append(time.perf_counter() - start)
    median = sorted(costs)[len(costs) // 2]  # statistics would make this process larger
    print(f'{action.__name__}: {median * 1e6:.0f} us')
