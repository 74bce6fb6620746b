"""What the user of a kernel sees: each geometry of a bug, run without any tool, in child processes.

A child process runs one job after the other. If it dies, the job that it ran has the outcome "died", and a new child
continues with the next one; so eight harmless bugs cost one process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..child import answers, check_seconds, command, environment
from ..faults import died
from .bug import Bug, geometry_label

__all__ = ["Outcome", "fence_outcomes", "geometries", "lines", "script_outcomes"]


@dataclass(frozen=True)
class Outcome:
    """One geometry of one bug, run in a child process.

    Attributes:
        bug: the bug's name.
        geometry: the arguments of its `inputs`.
        kind: "right"; "wrong", with the first difference as `message`; "died"; "timeout"; or "refused", where the
            machine lacks memory for the inputs, or the child did not start.
    """

    bug: str
    geometry: Mapping[str, Any]
    kind: str
    message: str = ""

    def __str__(self) -> str:
        return f"{geometry_label(self.geometry)}: {self.kind}" + (f", {self.message}" if self.message else "")


def geometries(bug: Bug) -> tuple[dict[str, Any], ...]:
    """The geometries of a bug's script: those that pass, then those that show the bug."""
    return (*bug.passes, *bug.also, bug.shows)


def script_outcomes(bugs: Iterable[Bug], *, timeout: float = 60.0) -> Iterator[Outcome]:
    """Run every geometry of the scripts of bugs; tensors of a `tight` bug end where their memory ends.

    Args:
        bugs: the bugs, in order.
        timeout: seconds after which a child process is killed.

    Yields:
        the outcomes in order, as they arrive.
    """
    placed = [(bug, "fenced" if bug.tight else "ordinary", i) for bug in bugs for i in range(len(geometries(bug)))]
    return _outcomes(placed, timeout)


def fence_outcomes(bugs: Iterable[Bug], *, timeout: float = 60.0) -> Iterator[Outcome]:
    """Run the geometry `shows` of bugs with a fence after every tensor: "died" means that the fence found the bug."""
    return _outcomes([(bug, "fenced", len(geometries(bug)) - 1) for bug in bugs], timeout)


def lines(outcomes: Iterable[Outcome]) -> str:
    """Outcomes as text, one a line."""
    return "\n".join(map(str, outcomes))


def _outcomes(jobs: list[tuple[Bug, str, int]], timeout: float) -> Iterator[Outcome]:
    timeout = check_seconds(timeout)
    names = [f"{bug.name}/{placement}/{number}" for bug, placement, number in jobs]
    done = 0
    while done < len(jobs):
        finished = _one_child(names[done:], timeout)
        for (bug, _, number), (kind, message) in zip(jobs[done:], finished, strict=False):
            yield Outcome(bug.name, geometries(bug)[number], kind, message)
        done += len(finished)


def _one_child(jobs: list[str], timeout: float) -> list[tuple[str, str]]:
    """Kind and message of each job that a child process finished, and of the one that ended it: one at least."""
    variables = environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="-1")
    variables.setdefault("OMP_NUM_THREADS", "1")
    try:
        child = subprocess.run(
            command("kvgather.lab.hunt._child", *jobs, seconds=timeout),
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
        code, printed, said = child.returncode, child.stdout, child.stderr
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        code, printed, said = None, out.decode() if isinstance(out, bytes) else out, ""
    found = [(str(answer["kind"]), str(answer["message"])) for answer in answers(iter(printed.splitlines()))]
    if len(found) == len(jobs):
        return found
    if code is None:
        return [*found, ("timeout", f"no answer in {timeout:g} s")]
    if died(code):
        return [*found, ("died", f"exit status {code}")]
    last = said.strip().splitlines()[-1:]
    return [*found, ("refused", last[0] if last else f"exit status {code}")]
