"""The crash, safely: one gather per child process, and what became of it.

A case is a kernel, where its scale lies, and a device: "before/guarded/cpu".

- before: the gather as it was. shipped-fix: with upstream's fix; both in our rewrite. after: `kvgather.gather`.
- guarded: behind the scale comes memory that faults (`kvgather.lab.fence`). unguarded: on a GPU an ordinary
  allocation; on a CPU the scale lies in an arena whose element i holds i, so that the outcome repeats.
- cpu: Triton's interpreter. cuda: a GPU, CUDA or ROCm.

Cases with a per-head scale have its name in theirs: "shipped-fix/per-head/guarded/cpu".
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import platform
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..device import has_gpu
from ..files import replace_text
from .child import ROOT, STARTER, AnswerError, answers, check_seconds, command, environment

KINDS = ("ok", "silent corruption", "segfault", "illegal access", "abort", "timeout", "failed")
RECORDED = ROOT / "benchmarks" / "results" / "crash_h100.json"
ACCESS_VIOLATION = 0xC0000005  # what Windows calls a segfault


class CrashError(ValueError):
    """There is no such case, this machine cannot run it, or a file of outcomes is not one."""


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
    """What became of a case.

    Attributes:
        case: its name.
        kind: one of `KINDS`; "failed" is a child that died of something else, and `message` says what.
        exit_code: of the child; negative is a signal; None when it was stopped at the time limit.
        relative_error: norm of the difference over norm of the exact values; inf when anything is NaN or
            infinite; None when there are no values to compare.
        file, line, source: the line of the kernel that faulted, where that is known (on a CPU).
        message: the driver's words, or the last words of a child that failed.
        device, torch, triton, python, date: where and when.
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

    @property
    def as_expected(self) -> bool:
        """Whether the table of cases expects this kind."""
        return self.kind in CASES[self.case].expected

    def __str__(self) -> str:
        """The outcome in a few words: its kind, and the number or the place that belongs to it."""
        if self.kind == "silent corruption":
            return f"{self.kind}, relative error {self.relative_error:.3g}"
        if self.kind == "segfault" and self.file:
            return f"{self.kind} (exit {self.exit_code}) at {self.file}:{self.line}"
        if self.kind in ("segfault", "abort"):
            return f"{self.kind} (exit {self.exit_code})"
        return f"{self.kind}: {self.message}" if self.kind in ("failed", "timeout") else self.kind


def names(device: str = "all") -> list[str]:
    """The names of the cases of a device: "cpu", "cuda", or "all" that this machine can run.

    Raises:
        CrashError: the device is none of these, or this machine has no GPU.
    """
    if device not in ("cpu", "cuda", "all"):
        raise CrashError(f"device is {device!r}; accepted: 'cpu', 'cuda', 'all'")
    if device == "cuda" and not has_gpu():
        raise CrashError("device is 'cuda', and torch sees no GPU here; accepted: 'cpu'")
    return [
        name
        for name, case in CASES.items()
        if case.device == device or (device == "all" and (case.device == "cpu" or has_gpu()))
    ]


def run(case: Case | str, *, timeout: float = 120.0) -> Outcome:
    """Run one case in a child process of its own.

    Args:
        case: a `Case`, or its name.
        timeout: seconds that the child may take; it is killed after that.

    Raises:
        CrashError: there is no such case, or it needs a GPU and there is none.
        TypeError, ValueError: `timeout` is no time, or more than 1e6 seconds.
    """
    name = case if isinstance(case, str) else case.name
    if name not in CASES:
        raise CrashError(f"case is {name!r}; accepted: {', '.join(CASES)}")
    case = CASES[name]
    if case.device == "cuda" and not has_gpu():
        raise CrashError(f"case {name!r} needs a GPU, and torch sees none here; accepted: the cases that end in /cpu")
    return run_child(
        "kvgather.lab._crash_child",
        case.kernel,
        case.scale,
        case.placement,
        case.device,
        name=name,
        device=case.device,
        timeout=timeout,
    )


def run_child(module: str, *arguments: str, name: str = "", device: str = "cpu", timeout: float = 120.0) -> Outcome:
    """Run `python -m module arguments…` in a child process, and say what became of it.

    The child may print JSON objects, one a line; their keys, attributes of `Outcome` other than `case` and `exit_code`,
    go into the outcome. Without one that has a "kind", a child that ends with status 0 is ok. One that ends by itself
    and printed something else that begins with a brace has failed.

    Args:
        module, arguments: what to run.
        name: the outcome's `case`; the module's name if empty.
        device: "cpu" hides every GPU and switches Triton's interpreter on; "cuda" leaves both alone.
        timeout: seconds that the child may take; it is killed after that. If this process is gone by then, the child
            ends itself.

    Raises:
        TypeError, ValueError: `timeout` is no time, or more than 1e6 seconds.
    """
    timeout = check_seconds(timeout)
    common: dict[str, Any] = {
        "case": name or module,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    try:
        child = subprocess.run(
            command(module, *arguments, seconds=timeout, options=("-X", "faulthandler")),
            env=_environment(device),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Outcome(kind="timeout", message=f"no answer in {timeout:g} s", **common)
    wrong = ""
    try:
        for answer in answers(iter(child.stdout.splitlines())):
            common |= _checked(answer)
    except AnswerError as error:
        wrong = str(error)
    common["exit_code"] = child.returncode
    if wrong and child.returncode >= 0:
        return Outcome(**common | {"kind": "failed", "message": wrong})
    if child.returncode == 0:
        common.setdefault("kind", "ok")
    if child.returncode < 0 or child.returncode == ACCESS_VIOLATION or "kind" not in common:
        common |= _died(child.returncode, child.stderr)
    return Outcome(**common)


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """What a child said, with the types that an `Outcome` has.

    Raises:
        AnswerError: a key or a value is not one of an outcome's.
    """
    found: dict[str, Any] = {}
    for key, value in answer.items():
        if key not in _SAID:
            raise AnswerError(f"the child printed the key {key!r:.40}; accepted: {', '.join(_SAID)}")
        try:
            found[key] = _SAID[key](value)
        except (TypeError, ValueError, OverflowError):
            raise AnswerError(f"the child printed {key}: {value!r:.40}; accepted: {_SAID[key].__name__}") from None
    if found.get("kind", KINDS[0]) not in KINDS:
        raise AnswerError(f"the child printed kind: {found['kind']!r:.40}; accepted: {', '.join(KINDS)}")
    return found


_TYPES = {"str": str, "int": int, "float | None": float}
_SAID = {f.name: _TYPES[str(f.type)] for f in fields(Outcome) if f.name not in ("case", "exit_code")}


def run_all(cases: Iterable[str], *, timeout: float = 120.0) -> Iterator[Outcome]:
    """Run several cases and yield their outcomes in order; on a CPU two at a time.

    Args:
        cases: names.
        timeout: seconds that each may take.
    """
    cases = list(cases)
    with ThreadPoolExecutor(1 if any(name.endswith("/cuda") for name in cases) else 2) as pool:
        yield from pool.map(lambda name: run(name, timeout=timeout), cases)


def _environment(device: str) -> dict[str, str]:
    """The child's: this package on its path; on a CPU the interpreter and no GPU in sight."""
    variables = environment()
    variables.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
        variables.setdefault("OMP_NUM_THREADS", "1")
    return variables


def _triton_version() -> str:
    for package in ("triton", "triton-windows"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def _died(code: int, stderr: str) -> dict[str, Any]:
    """Kind, place and last words of a child that did not finish."""
    if code in (-signal.SIGSEGV, -getattr(signal, "SIGBUS", signal.SIGSEGV), ACCESS_VIOLATION):
        return {"kind": "segfault", **_place(stderr)}
    if code == -signal.SIGABRT:
        return {"kind": "abort", **_place(stderr)}
    last = [line for line in stderr.strip().splitlines() if line.strip()][-1:]
    return {"kind": "failed", "message": last[0] if last else f"exit {code} with no output"}


def _place(stderr: str) -> dict[str, Any]:
    """The innermost line of this package in what faulthandler printed, innermost first."""
    package = _as_faulthandler_prints(str(ROOT / "kvgather") + os.sep)
    for file, line in re.findall(r'^\s*File "(.+?)", line (\d+)', stderr, re.MULTILINE):
        if file.startswith(package) and not file.endswith(STARTER):
            path = ROOT / "kvgather" / file.removeprefix(package)
            source = linecache.getline(str(path), int(line)).strip()
            return {"file": path.relative_to(ROOT).as_posix(), "line": int(line), "source": source}
    return {}


def _as_faulthandler_prints(path: str) -> str:
    """A path in ASCII: the handler of a signal may not encode, so what is not printable ASCII it writes as escapes."""
    printed = ""
    for character in path:
        code = ord(character)
        if 32 <= code < 127:
            printed += character
        else:
            printed += f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return printed


def leave_no_core() -> None:
    """Called by a child that may crash on purpose: the crash then leaves no core file behind."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def describe(outcome: Outcome) -> str:
    """An outcome in a few words, and what was expected where it was something else."""
    wanted = " or ".join(CASES[outcome.case].expected)
    return str(outcome) if outcome.as_expected else f"{outcome}  <- expected: {wanted}"


def as_json(outcomes: Iterable[Outcome]) -> str:
    """Outcomes as the text of a JSON file, one object per case."""
    objects = [asdict(o) | ({"relative_error": "inf"} if o.relative_error == float("inf") else {}) for o in outcomes]
    return json.dumps({"outcomes": objects}, indent=2) + "\n"


def save(outcomes: Iterable[Outcome], path: Path | str) -> None:
    """Write outcomes to a JSON file, for `recorded`.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    replace_text(Path(path), as_json(outcomes))


def recorded(path: Path | str = RECORDED) -> dict[str, Outcome]:
    """Outcomes that were recorded on another machine, by case; empty when there is no such file.

    Raises:
        CrashError: the file is not what `save` writes.
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
