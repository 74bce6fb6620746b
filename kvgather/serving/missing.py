"""Which rank is missing, when an exchange between the ranks of an engine has failed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SECONDS = 2.0
"""How long to look: torchrun clears a dead process away within 0.1 s, and waiting ranks give up at about one time."""
EXCHANGE = ("gloo", "nccl", "timed out", "timeout", "connection")
"""Words of errors of gloo and NCCL."""


def missing_ranks(processes: Sequence[int], rank: int, reason: str, engine: int = 1) -> str:
    """What an error says of other ranks: "rank 1 died", "rank 2 does not answer"; empty if it is no failed exchange.

    Every rank that meets an error calls it, and is then known to answer. The ranks are processes of one machine, which
    torchrun has started; its store holds who has answered.

    Args:
        processes: the process id of each rank.
        rank: this one.
        reason: the error's text.
        engine: how many engines each process has started with this one: an answer of an earlier engine is none.
    """
    if len(processes) == 1 or os.name != "posix":  # elsewhere, signal 0 is more than a question
        return ""
    store = _Answers(processes, rank, engine)
    if not any(word in reason.lower() for word in EXCHANGE):
        return ""
    others = [other for other in range(len(processes)) if other != rank]
    end = time.monotonic() + SECONDS
    while others and time.monotonic() < end:
        if dead := [other for other in others if not _alive(processes[other])]:
            return f"{_named(dead)} died"
        others = [other for other in others if not store.has(other)]
        time.sleep(0.02)
    return f"{_named(others)} {'does' if len(others) == 1 else 'do'} not answer" if others and store.has(rank) else ""


class _Answers:
    """Which ranks have answered, in torchrun's store. It has none if it cannot be reached, and raises never.

    A key names the rank's process, too: the store outlives processes that torchrun starts again.
    """

    def __init__(self, processes: Sequence[int], rank: int, engine: int) -> None:
        self._keys = [f"kvgather/answers/{process}/{engine}" for process in processes]
        self._store: Any = None
        with contextlib.suppress(RuntimeError, KeyError, ValueError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = timedelta(seconds=SECONDS)
            store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
            store.set(self._keys[rank], "")
            self._store = store

    def has(self, rank: int) -> bool:
        with contextlib.suppress(RuntimeError):
            return self._store is not None and bool(self._store.check([self._keys[rank]]))
        return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _named(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)
