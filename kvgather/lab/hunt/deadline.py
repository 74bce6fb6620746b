"""A time limit for Python code in this process, such as a kernel in the interpreter whose loop never ends."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["OutOfTime", "deadline"]


class OutOfTime(BaseException):
    """The time is over. Not an Exception, so that neither the interpreter nor a reader's code catches it."""


AGAIN = 5.0
"""Seconds after which the exception is raised again: longer than the body's clean-up takes."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Context manager that raises `OutOfTime` in its body after `seconds`.

    The exception arrives between two steps of Python; a call of compiled code ends first. If it arrives in a callback
    of the garbage collector or in a `__del__`, Python prints and drops it: then it comes again.
    """
    thread, lock, ended, in_body = threading.get_ident(), threading.Lock(), threading.Event(), [True]

    def fire() -> None:
        wait = seconds
        while not ended.wait(wait):
            with lock:
                if not in_body:
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))
            wait = AGAIN

    threading.Thread(target=fire, name="kvgather deadline", daemon=True).start()
    try:
        yield
    finally:
        in_body.clear()  # first, and compiled: the exception arrives before it or after it
        with lock:  # from here on no later code is interrupted
            ended.set()
