"""Which rank is missing, when an exchange between the ranks of an engine has failed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

SECONDS = 2.0
"""How long to look: torchrun clears a dead process away within 0.1 s, and waiting ranks give up at about one time."""


def missing_ranks(processes: Sequence[int], rank: int, reason: str) -> str:
    """What an error says of other ranks: "rank 1 died", "rank 2 does not answer", or nothing.

    Every rank that meets an error calls it. The ranks are processes of one machine, which torchrun has started.

    Args:
        processes: the process id of each rank.
        rank: this one.
        reason: the error's text: an exchange that took too long fails on all ranks that waited, and these say so to
            each other in torchrun's store.
    """
    if len(processes) == 1 or os.name != "posix":  # elsewhere, signal 0 is more than a question
        return ""
    if "timed out" in reason.lower():
        return _named(_silent(len(processes), rank), "does not answer")
    return _named(_first(lambda: [other for other, process in enumerate(processes) if not _alive(process)]), "died")


def _silent(count: int, rank: int) -> list[int]:
    """The ranks that do not say within the time that they have waited as well."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=SECONDS),
        )  # fmt: skip
        store.set(f"kvgather/waited/{rank}", "")
        waited = _first(lambda: [count] if store.check([f"kvgather/waited/{other}" for other in range(count)]) else [])
        return [] if waited else [other for other in range(count) if not store.check([f"kvgather/waited/{other}"])]
    except (RuntimeError, KeyError, ValueError):  # no store: rank 0 may have it, and be the one that hangs
        return []


def _first(find: Callable[[], list[int]]) -> list[int]:
    """The first result that is not empty within the time."""
    end = time.monotonic() + SECONDS
    while not (found := find()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _named(ranks: Sequence[int], what: str) -> str:
    return f"{' and '.join(f'rank {rank}' for rank in ranks)} {what}" if ranks else ""
