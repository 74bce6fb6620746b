"""Runs a module, and ends its process after a time limit even if the parent process has exited.

    python -P _time_limit.py SECONDS MODULE ARGUMENTS…

A parent that was killed cannot stop its child, and a child that hangs in compiled code runs no Python. A timer of the
operating system ends the child in both cases. The command runs this file by its path, and this file imports only
standard modules that load fast, so that the limit applies from the start of the process.
"""

import os
import runpy
import signal
import sys
import threading


def limit(seconds: float) -> None:
    """End this process after `seconds`, even if it runs compiled code at that time."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process; a parent may have set the signal to ignored
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
