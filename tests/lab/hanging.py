"""A child process that hangs in compiled code; `python -m tests.lab.hanging FILE` first writes its pid to FILE."""

import os
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Path(sys.argv[1]).write_text(f"{os.getpid()}\n", encoding="utf-8")
    re.match(r"(a+)+$", "a" * 64 + "b")  # exponential time in C code that holds the GIL
