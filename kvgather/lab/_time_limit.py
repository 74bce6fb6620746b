"""Runs a module, and ends its process after a time limit even if the process that started it is gone.

    python -P _time_limit.py SECONDS MODULE ARGUMENTS…

A parent that is killed cannot stop its child, and a child that hangs in compiled code runs no Python. The system's own
timer ends both. This file is run by its path and imports nothing that takes time: the limit holds from the beginning.
"""

import os
import runpy
import signal
import sys
import threading


def limit(seconds: float) -> None:
    """End this process after `seconds`, whatever it does then."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent's choice is inherited; the default ends the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:  # Windows has no such timer
        timer = threading.Timer(seconds, os._exit, (1,))
        timer.daemon = True
        timer.start()


def main() -> None:
    limit(float(sys.argv[1]))
    module = sys.argv[2]
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
