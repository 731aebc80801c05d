#!/usr/bin/env python3
"""The self-pipe trick: a signal that select cannot miss.

The signal becomes a byte in a pipe, and the pipe is one of the descriptors
that select watches. The byte stays there until somebody reads it, so it does
not matter whether the signal comes before select or during it.

Try:       python3 selfpipe.py -s 10
           kill -USR1 PID    while it sleeps
Notice:    the signal that selsigrace.py misses is there when select begins.
See also:  selsigrace.py (the race), server03.py (sigwait, for signals alone).
"""
import argparse
import os
import select
import signal
import time


def handler(signum, frame):
    """Do nothing, but be there: without a handler, the signal would kill us."""


def seconds(text):
    """Return *text* as a number from 0 up; argparse reports a ValueError."""
    if not 0 <= float(text) < 1e9:
        raise ValueError(text)
    return float(text)


def parse_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-s', '--secs', type=seconds, default=0,
                        help='how long to sleep before select (default: %(default)s)')
    return parser.parse_args()


def main():
    options = parse_options()
    quiet, _ = os.pipe()  # stands for a client that says nothing

    # 1. Create a pipe and make both of its ends nonblocking. It comes before the handler, which
    #    writes to it.
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)

    # 2. Have select watch the read end, among the others.
    watched = [quiet, read_end]

    # 3. Install a handler that writes a byte to the pipe. It must be the one in C that Python
    #    installs: it runs at once. Ours runs only later, between two steps of the program, and
    #    select may have blocked by then. When the pipe is full, one more byte tells nothing new.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGUSR1, handler)
    print(f'PID: {os.getpid()}', flush=True)
    time.sleep(options.secs)

    # 4. When select returns, look at the pipe: if it is readable, the signal has come.
    readable, _, _ = select.select(watched, [], [])
    if read_end in readable:

        # 5. Read all the bytes that are in the pipe, then do what the signal calls for.
        try:
            while os.read(read_end, 4096):
                pass
        except BlockingIOError:  # the pipe is empty
            pass
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # one at exit would kill us
        print('Got signal')


if __name__ == '__main__':
    main()
