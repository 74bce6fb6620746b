"""compute-sanitizer's memcheck over one launch of every kernel variant: `python3 tools/memcheck.py [--out FILE]`.

Each tensor is an allocation of its own, so that the checker sees an access to the first byte outside it. The variants
(`tests/memcheck/jobs.py` lists them) are shared among several processes; a process that meets a bad access ends, and a
new one runs the rest. The record says how many variants ran, what was found in which, and on which device:
`make memcheck` writes `benchmarks/results/memcheck.json`. The exit status is 0 if all are clean and their values right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpu_record import ROOT, cores, machine, with_path, write

RECORD = ROOT / "benchmarks" / "results" / "memcheck.json"
CHILD = "tests.memcheck.child"
SAW = 9
"""The checker's exit status when it saw errors and the program itself ended well."""
RESERVED_GIGABYTES = 20
LARGE_GIGABYTES = 8
"""A variant that takes more runs before the others, alone."""
EVENT = re.compile(r"^memcheck: (\{.*\})$")
FOUND = re.compile(r"^========= ((?:Invalid|Misaligned|Program hit|Fatal|Out-of-range|Host API|Error:).*)$")
SUMMARY = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?")


@dataclass
class Verdict:
    """What came of one job: the checker's errors, and why its values are wrong."""

    name: str
    errors: list[str] = field(default_factory=list)
    wrong: str = ""

    @property
    def clean(self) -> bool:
        return not self.errors and not self.wrong


def read(lines: Iterable[str], ended: str) -> list[Verdict]:
    """What a process's output says of the jobs that it began.

    Args:
        lines: the checker's and the child's, as they came.
        ended: how the process ended, for a job that has no end.
    """
    verdicts: list[Verdict] = []
    open_job, found, summary = False, 0, None
    for line in lines:
        if event := EVENT.match(line):
            told = json.loads(event[1])
            if "begin" in told:
                verdicts.append(Verdict(told["begin"]))
                open_job = True
            else:
                verdicts[-1].wrong, open_job = told["wrong"], False
        elif error := FOUND.match(line):
            found += 1
            (verdicts or [Verdict("before the first")])[-1].errors.append(error[1])
        elif total := SUMMARY.match(line):
            summary = int(total[1])
    if open_job:
        verdicts[-1].wrong = ended
    if summary is None and not open_job:
        verdicts.append(Verdict("the whole process", wrong=f"the checker gave no summary; {ended}"))
    elif (summary or 0) > found:
        verdicts.append(Verdict("the whole process", [f"{(summary or 0) - found} errors that no job shows"]))
    return verdicts


def share(jobs: Sequence[tuple[str, float]], workers: int) -> list[list[str]]:
    """Names for each worker, the longest first, of about equally many seconds."""
    loads = [(0.0, nth, list[str]()) for nth in range(max(1, min(workers, len(jobs))))]
    for name, seconds in sorted(jobs, key=lambda job: -job[1]):
        load, nth, names = min(loads)
        names.append(name)
        loads[nth] = (load + seconds, nth, names)
    return [names for _, _, names in loads]


@dataclass(frozen=True)
class Checker:
    """How a process is run.

    Attributes:
        prefix: the checker's command line; empty runs without one.
        device: where the jobs run.
        limit: seconds without a line of output, after which a process is killed.
        cache: where all processes keep the kernels they compile.
        child: the module that runs jobs.
    """

    prefix: tuple[str, ...]
    device: str
    limit: float
    cache: Path
    child: str = CHILD

    def run(self, names: Sequence[str]) -> list[Verdict]:
        """Run jobs in as many processes as it takes for each to have its verdict."""
        verdicts: list[Verdict] = []
        left = list(names)
        while left:
            lines, ended = self._process(left)
            told = read(lines, ended)
            begun = {verdict.name for verdict in told}
            if not begun & set(left):
                told.append(Verdict(left[0], wrong=f"not begun: {ended}; {' '.join(lines[-3:])[:300]}"))
                begun.add(left[0])
            verdicts += told
            left = [name for name in left if name not in begun]
        return verdicts

    def _process(self, names: Sequence[str]) -> tuple[list[str], str]:
        """One process's lines, and how it ended."""
        environment = with_path(ROOT) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        environment.setdefault("TRITON_CACHE_DIR", str(self.cache))
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(list(names)))
            file.flush()
            command = [*self.prefix, sys.executable, "-m", self.child, self.device, file.name]
            with subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            ) as process:  # fmt: skip
                return self._answers(process)

    def _answers(self, process: subprocess.Popen[str]) -> tuple[list[str], str]:
        last, over, killed, lines = time.monotonic(), threading.Event(), threading.Event(), list[str]()

        def watch() -> None:
            while not over.wait(0.2):
                if time.monotonic() - last > self.limit:
                    killed.set()
                    os.killpg(process.pid, signal.SIGKILL)  # what the checker started would keep the pipe open
                    return

        threading.Thread(target=watch, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            last = time.monotonic()
            lines.append(line.rstrip("\n"))
        over.set()
        status = process.wait()
        return lines, f"killed: no answer for {self.limit:g} s" if killed.is_set() else f"it ended with status {status}"


def sanitizer() -> tuple[str, str]:
    """The tool's path and version; both empty where it is not installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin")))
    if tool is None:
        return "", ""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"[Vv]ersion\s+(\S+)", said)
    return tool, version[1] if version else said.strip()


def listed() -> list[tuple[str, float, float]]:
    """Every job's name, seconds and gigabytes."""
    done = subprocess.run(
        [sys.executable, "-m", CHILD, "list"], cwd=ROOT, env=with_path(ROOT), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"the jobs cannot be listed: {done.stderr[-600:]}")
    return [(name, seconds, gigabytes) for name, seconds, gigabytes in json.loads(done.stdout.splitlines()[-1])]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memcheck.py", description="memcheck over one launch of every kernel variant."
    )
    parser.add_argument(
        "--out", type=Path, default=RECORD, help="the record; default: benchmarks/results/memcheck.json"
    )
    parser.add_argument("--only", default="", help="only variants whose name holds this; --out has to be given")
    parser.add_argument("--workers", type=int, default=cores(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one variant, after which it is killed")
    options = parser.parse_args(given)
    if options.only and options.out == RECORD:
        parser.error("--only is a part of the variants; accepted: with --out, so that the record stays that of all")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the checker; the exit status."""
    options, begun = arguments(given), time.monotonic()
    (gigabytes, where), (tool, version) = machine(), sanitizer()
    if not gigabytes or not tool:
        what = "compute-sanitizer, of the CUDA toolkit" if gigabytes else "a GPU; torch sees none here"
        print(f"memcheck needs {what}", file=sys.stderr)
        return 2
    jobs = [job for job in listed() if options.only in job[0]]
    not_run = {
        name: f"needs {needed:.0f} GB of GPU memory"
        for name, _, needed in jobs if needed > gigabytes - RESERVED_GIGABYTES
    }  # fmt: skip
    large = [name for name, _, needed in jobs if needed > LARGE_GIGABYTES and name not in not_run]
    small = [(name, seconds) for name, seconds, _ in jobs if name not in not_run and name not in large]
    shares = share(small, options.workers)
    print(f"{len(large) + len(small)} variants in {len(shares)} processes, on {where['device']}", flush=True)
    prefix = (
        tool, "--tool", "memcheck", "--error-exitcode", str(SAW), "--report-api-errors", "no",
        "--target-processes", "application-only",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="memcheck") as cache, ThreadPoolExecutor(len(shares)) as pool:
        checker = Checker(prefix, "cuda", options.limit, Path(cache))
        verdicts = checker.run(large)  # while nothing else takes memory
        for some in pool.map(checker.run, shares):
            verdicts += some
    return report(verdicts, not_run, where | {"tool": f"compute-sanitizer {version}"}, begun, options.out)


def report(verdicts: Sequence[Verdict], not_run: dict[str, str], where: dict[str, str], begun: float, out: Path) -> int:
    """Print what was found, write the record, and give the exit status."""
    bad = [verdict for verdict in verdicts if not verdict.clean]
    for verdict in bad:
        print(f"ERROR {verdict.name} - {'; '.join([*verdict.errors[:3], verdict.wrong]).strip('; ')}")
    for name, reason in not_run.items():
        print(f"NOT RUN {name} - {reason}")
    numbers = {
        "variants": len({verdict.name for verdict in verdicts} - {"the whole process", "before the first"}),
        "errors": sum(len(verdict.errors) for verdict in verdicts),
        "wrong": sum(bool(verdict.wrong) for verdict in verdicts),
    }
    seconds = time.monotonic() - begun
    found = {verdict.name: [*verdict.errors, verdict.wrong] for verdict in bad}
    write(numbers | where | {"seconds": round(seconds, 1), "not_run": not_run, "found": found}, out)
    print(f"{numbers['variants']} variants, {numbers['errors']} errors, {numbers['wrong']} wrong in {seconds:.1f}s")
    return 1 if bad or not numbers["variants"] else 0


if __name__ == "__main__":
    sys.exit(main())
