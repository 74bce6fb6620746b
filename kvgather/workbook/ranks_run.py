"""Ranks as child processes: a function that runs on each rank of a gloo group, and what each of them returned.

A notebook's own process never joins a group: a rank may die or hang, and the notebook should not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.checks import check_int, described
from ..lab.child import check_seconds, command, environment

__all__ = ["RankEnd", "RanksError", "each_rank", "run_ranks"]

CHILD = "kvgather.workbook._ranks_child"
POLL = 0.02


class RanksError(RuntimeError):
    """Ranks of `run_ranks` ended without an answer; the message has the last line of each, the first to end first."""


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Attributes:
        rank: its number.
        code: exit status, negative for a signal; None if it ran out of time.
        answer: what its function returned, or None if it returned nothing.
        stderr: what it wrote to stderr.
    """

    rank: int
    code: int | None
    answer: Any
    stderr: str


def each_rank(
    job: str,
    ranks: int,
    *,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
    awaited: Collection[int] | None = None,
    **arguments: Any,
) -> Iterator[RankEnd]:
    """Run a function on each rank of a gloo group, each in a child process, and yield each rank once it has ended.

    Args:
        job: "module:function". The function is called as `function(rank, ranks, **arguments)`, with the default group
            initialized, and returns what JSON can hold.
        ranks: how many processes.
        timeout: seconds after which all ranks that still run are killed.
        group_timeout: seconds after which a collective of the group fails.
        awaited: the ranks to wait for; once they have ended, the others are killed, and are not yielded unless they
            ended before. None means all.
        arguments: what JSON can hold; tuples arrive as lists.

    Yields:
        How each rank ended, in the order in which they end.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was started.
    """
    count = check_int(ranks, "ranks", minimum=1)
    seconds, group_seconds = check_seconds(timeout), check_seconds(group_timeout, "group_timeout")
    waits_for = set(range(count) if awaited is None else awaited)
    if not waits_for or not waits_for <= set(range(count)):
        raise ValueError(
            f"awaited is {described(awaited)}; accepted: one or more of the ranks 0 to {count - 1}, or None"
        )
    if not isinstance(job, str) or not all(job.partition(":")):
        raise ValueError(f"job is {described(job)}; accepted: 'module:function'")
    try:
        settings = json.dumps({"job": job, "ranks": count, "timeout": group_seconds, "arguments": arguments})
    except TypeError as error:
        raise TypeError(f"arguments cannot be sent ({error}); accepted: what JSON can hold") from None
    return _each_rank(settings, count, seconds, waits_for)


def _each_rank(settings: str, ranks: int, seconds: float, awaited: set[int]) -> Iterator[RankEnd]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(settings, encoding="utf-8")
        running: dict[int, subprocess.Popen[bytes]] = {}
        end = time.monotonic() + seconds
        try:
            for rank in range(ranks):
                with (folder / f"{rank}.err").open("wb") as stderr:
                    running[rank] = subprocess.Popen(
                        command(CHILD, str(folder), str(rank), seconds=seconds),
                        env=environment(**hidden, GLOO_SOCKET_IFNAME=loopback), start_new_session=True,
                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                    )  # fmt: skip
            while awaited & running.keys():
                late = time.monotonic() > end
                for rank, child in list(running.items()):
                    if child.poll() is None and not late:
                        continue
                    del running[rank]
                    code = None if child.poll() is None else child.returncode
                    _kill(child)
                    yield _ended(folder, rank, code)
                time.sleep(POLL)
        finally:
            for child in running.values():
                _kill(child)


def run_ranks(
    job: str, ranks: int, *, timeout: float = 60.0, group_timeout: float = 30.0, **arguments: Any
) -> list[Any]:
    """The answers of `each_rank`, by rank, where all ranks are expected to answer.

    Raises:
        RanksError: a rank ended without an answer.
        TypeError, ValueError: as `each_rank`.
    """
    ended = list(each_rank(job, ranks, timeout=timeout, group_timeout=group_timeout, **arguments))
    failed = []
    for end in ended:
        if end.code != 0:
            said = (end.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix(f"[rank{end.rank}]: ")
            status = f"no answer in {timeout:g} s" if end.code is None else f"exit status {end.code}"
            failed.append(f"rank {end.rank}: {status}, and wrote {said}")
    if failed:
        raise RanksError("\n".join(failed))
    return [end.answer for end in sorted(ended, key=lambda end: end.rank)]


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def _ended(folder: Path, rank: int, code: int | None) -> RankEnd:
    answer = folder / f"{rank}.json"
    value = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
    return RankEnd(rank, code, value, (folder / f"{rank}.err").read_text(encoding="utf-8", errors="replace"))
