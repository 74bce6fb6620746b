"""A time limit for Python code in this process, such as a kernel in the interpreter whose loop never ends."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["OutOfTime", "deadline"]


class OutOfTime(BaseException):
    """The time is over. Not an Exception, so that neither the interpreter nor a reader's code catches it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Context manager that raises `OutOfTime` in its body after `seconds`.

    The exception arrives between two steps of Python; a call of compiled code ends first.
    """
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def fire() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:  # from here on the timer does nothing, so that no later code is interrupted
            over = True
        timer.cancel()
