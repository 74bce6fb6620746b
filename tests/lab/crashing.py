"""Functions for child processes: each ends its process in another way. As a script: the name of one of them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch
import triton
import triton.language as tl

from kvgather.lab.fence import fenced


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)  # no mask
    tl.store(out_ptr + i, 2 * x, mask=i < n)


def read_behind(n: int) -> None:
    """Read 8 floats of a tensor with n."""
    print(f"n is {n}")
    out = torch.zeros(n)
    double_kernel[(1,)](fenced(torch.ones(n)), out, n, BLOCK=8)
    print("sum", int(out.sum()))


def touch_nothing() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def complain(text: str) -> None:
    raise ArithmeticError(text)


def leave(status: int) -> None:
    sys.exit(status)


def interrupt() -> None:
    """As Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def hang_with_a_child() -> None:
    """Wait, and leave a process behind that keeps the output open."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])
    print("waiting", flush=True)
    time.sleep(60)


def add(tensor: torch.Tensor, other: float) -> None:
    print((tensor + other).tolist(), {"a": 1})


if __name__ == "__main__":
    print(sys.argv[1:])
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
