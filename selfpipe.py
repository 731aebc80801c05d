#!/usr/bin/env python3
"""The self-pipe trick: a signal that select cannot miss.

The signal becomes a byte in a pipe, and the pipe is one of the descriptors
that select watches. The byte stays there until it is read, so it does not
matter whether the signal comes before select or during it.

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


def main():
    options = parse_options()
    quiet, _ = os.pipe()  # stands for a client that says nothing

    # 1. Create a pipe and make both of its ends nonblocking.
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)

    # 2. Have select watch the read end, among the others.
    watched = [quiet, read_end]

    # 3. Have a signal handler write a byte to the pipe. It must be Python's own, in C, which runs
    #    at once: ours runs between two steps of the program, and select may have blocked by then.
    #    In a full pipe, one more byte of the only signal tells nothing new.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGUSR1, handler)
    print(f'PID: {os.getpid()}', flush=True)
    if options.secs:
        print(f'Sleep for {options.secs:g} secs', flush=True)
        time.sleep(options.secs)

    # 4. When select returns, check the pipe: if its read end is readable, the signal has come.
    readable, _, _ = select.select(watched, [], [])
    if read_end in readable:

        # 5. Read all the bytes that are in the pipe, then do what the signal calls for.
        try:
            while os.read(read_end, 4096):
                pass
        except BlockingIOError:  # the pipe is empty
            pass
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # another would kill us at exit
        print('Got signal')


def handler(signum, frame):
    """Do nothing; but without a handler in Python, the signal would kill the process."""


# The rest: options.

def parse_options():
    """Return the options of the command line; exit with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-s', '--secs', type=float, default=0,
                        help='how long to sleep before select (default: %(default)s)')
    options = parser.parse_args()
    if not 0 <= options.secs < 1e9:
        parser.error(f'{options.secs} seconds are not from 0 to a billion')
    return options


if __name__ == '__main__':
    main()
