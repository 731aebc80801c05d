#!/usr/bin/env python3
"""The race between a signal and select.

A signal that comes just before select is missed: its handler has run, and
select blocks all the same. A sleep makes the dangerous moment 10 seconds long.

Try:       python3 selsigrace.py
           kill -USR1 PID    while it sleeps, and once more when it has woken up
Notice:    the first signal goes unnoticed, the second ends select.
See also:  selfpipe.py (the cure).
"""
import argparse
import os
import select
import signal
import time

got_signal = False
in_select = False


def main():
    global in_select
    options = parse_options()
    quiet, _ = os.pipe()  # stands for a client that says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGUSR1, handler)
    print(f'PID: {os.getpid()}', flush=True)

    # What if the signal comes at this point?
    print(f'Sleep for {options.secs:g} secs', flush=True)
    time.sleep(options.secs)
    print('Wake up and block in "select"', flush=True)

    try:
        in_select = True
        select.select([quiet], [], [])
    except InterruptedError:
        pass
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # another would kill us at exit
    if got_signal:
        print('Got signal')


def handler(signum, frame):
    """Note the signal, and end select if it is waiting.

    Since Python 3.5 select goes on waiting after a signal unless the handler raises (PEP 475);
    before, the kernel's EINTR ended it. Either way, a signal that comes before select ends nothing.
    """
    global got_signal, in_select
    got_signal = True
    if in_select:
        in_select = False  # once: a second signal must not spoil what the first has started
        raise InterruptedError


# The rest: options.

def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-s', '--secs', type=float, default=10,
                        help='how long to sleep before select (default: %(default)s)')
    options = parser.parse_args()
    if not 0 <= options.secs < 1e9:
        parser.error(f'{options.secs} seconds are not from 0 to a billion')
    return options


if __name__ == '__main__':
    main()
