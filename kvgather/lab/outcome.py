"""The cases of the crash experiment, the outcome of each, and the file that records the outcomes of a GPU.

A case is a kernel, the placement of its scale, and a device: "before/guarded/cpu".

- before: the gather before the fix. shipped-fix: the gather with upstream's fix; both in our rewrite.
  after: `kvgather.gather`.
- guarded: memory that faults follows the scale (`kvgather.lab.fence`). unguarded: on a GPU the scale is an ordinary
  allocation; on a CPU it is the start of an arena whose element i holds i, which makes the outcome reproducible.
- cpu: Triton's interpreter. cuda: a GPU, CUDA or ROCm.

The name of a case with a per-head scale contains the scale's kind: "shipped-fix/per-head/guarded/cpu".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..files import replace_text
from .child import ROOT

KINDS = ("ok", "silent corruption", "segfault", "illegal access", "abort", "timeout", "failed")
RECORDED = ROOT / "benchmarks" / "results" / "crash_h100.json"


class CrashError(ValueError):
    """A case does not exist, this machine cannot run a case, or a file contains no outcomes."""


@dataclass(frozen=True)
class Case:
    """One experiment.

    Attributes:
        kernel: "before", "shipped-fix" or "after".
        placement: "guarded" or "unguarded".
        device: "cpu" or "cuda".
        scale: "per-tensor" or "per-head".
    """

    kernel: str
    placement: str
    device: str
    scale: str = "per-tensor"

    @property
    def name(self) -> str:
        scale = [] if self.scale == "per-tensor" else [self.scale]
        return "/".join([self.kernel, *scale, self.placement, self.device])

    @property
    def expected(self) -> tuple[str, ...]:
        """The kinds of outcome that this case may have."""
        if self.kernel == "after" or (self.kernel == "shipped-fix" and self.scale == "per-tensor"):
            return ("ok",)
        if self.device == "cpu":
            return ("segfault",) if self.placement == "guarded" else ("silent corruption",)
        faults = ("illegal access", "abort")  # ROCm ends the process where CUDA reports an error
        return faults if self.placement == "guarded" else ("silent corruption", *faults)


SUBJECTS = (
    ("before", "per-tensor"),
    ("shipped-fix", "per-tensor"),
    ("shipped-fix", "per-head"),
    ("after", "per-tensor"),
    ("after", "per-head"),
)
CASES = {
    case.name: case
    for device in ("cpu", "cuda")
    for kernel, scale in SUBJECTS
    for placement in ("guarded", "unguarded")
    for case in [Case(kernel, placement, device, scale)]
}


@dataclass(frozen=True)
class Outcome:
    """The result of one case.

    Attributes:
        case: the name of the case.
        kind: one of `KINDS`. "failed" is a child that died for a reason outside the experiment; `message` gives the
            reason.
        exit_code: the child's exit status; negative for a signal; None if the child ran out of time.
        relative_error: norm of the difference over norm of the exact values; inf if any value is NaN or infinite;
            None if the child produced no values.
        file, line, source: the line of the kernel that faulted, if it is known (on a CPU).
        message: the driver's error message, or the last line that a failed child printed.
        device, torch, triton, python, date: the machine, the versions and the day of the run.
        output: what a caller's function or script printed (`kvgather.lab.isolated`).
    """

    case: str
    kind: str
    exit_code: int | None = None
    relative_error: float | None = None
    file: str = ""
    line: int = 0
    source: str = ""
    message: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    date: str = ""
    output: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether the table of cases expects this kind."""
        return self.kind in CASES[self.case].expected

    def renamed(self, file: str, name: str) -> Outcome:
        """The outcome with another name for one file."""
        return replace(self, file=name) if self.file == file else self

    def __str__(self) -> str:
        """The kind, with its relative error, its line of source or its message."""
        if self.kind == "silent corruption":
            return f"{self.kind}, relative error {self.relative_error:.3g}"
        if self.kind == "segfault" and self.file:
            return f"{self.kind} (exit {self.exit_code}) at {self.file}:{self.line}"
        if self.kind in ("segfault", "abort"):
            return f"{self.kind} (exit {self.exit_code})"
        return f"{self.kind}: {self.message}" if self.kind in ("failed", "timeout") else self.kind


def describe(outcome: Outcome) -> str:
    """An outcome in one line, followed by the expected kinds if it is not one of them."""
    expected = " or ".join(CASES[outcome.case].expected)
    return str(outcome) if outcome.as_expected else f"{outcome}  <- expected: {expected}"


def as_json(outcomes: Iterable[Outcome]) -> str:
    """Outcomes as the text of a JSON file, one object per case."""
    objects = [asdict(o) | ({"relative_error": "inf"} if o.relative_error == float("inf") else {}) for o in outcomes]
    for o in objects:
        if not o["output"]:
            del o["output"]
    return json.dumps({"outcomes": objects}, indent=2) + "\n"


def save(outcomes: Iterable[Outcome], path: Path | str) -> None:
    """Write outcomes to a JSON file that `recorded` reads.

    Raises:
        OSError: the file cannot be written; the file at `path` is unchanged.
    """
    replace_text(Path(path), as_json(outcomes))


def recorded(path: Path | str = RECORDED) -> dict[str, Outcome]:
    """The outcomes in a file that `save` wrote, by case; empty if the file does not exist.

    Raises:
        CrashError: the file was not written by `save`.
    """
    if not Path(path).exists():
        return {}
    try:
        objects = json.loads(Path(path).read_text(encoding="utf-8"))["outcomes"]
        for o in objects:
            o["relative_error"] = None if o["relative_error"] is None else float(o["relative_error"])
        return {o["case"]: Outcome(**o) for o in objects}
    except (KeyError, TypeError, ValueError) as error:
        raise CrashError(f"{path} holds no recorded outcomes: {error!r}") from error
