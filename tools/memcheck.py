"""Runs compute-sanitizer's memcheck over one launch of every kernel variant: `python3 tools/memcheck.py [--out FILE]`.

Each tensor is an allocation of its own, so that memcheck reports an access to the first byte outside it. The variants,
listed in `tests/memcheck/jobs.py`, are distributed over processes. A bad access ends its process, and a new process
runs the remaining variants. The record contains the number of variants, the errors of each, and the device:
`make memcheck` writes `benchmarks/results/memcheck.json`. The exit status is 0 if no variant has an error or a wrong
value.
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
"""The checker's exit status for a program with errors that itself exits with status 0."""
RESERVED_GIGABYTES = 20
LARGE_GIGABYTES = 8
"""A variant that needs more memory runs alone, before the others."""
EVENT = re.compile(r"^memcheck: (\{.*\})$")
ERROR = re.compile(r"^========= ((?:Invalid|Misaligned|Program hit|Fatal|Out-of-range|Host API|Error:).*)$")
SUMMARY = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?")


@dataclass
class Verdict:
    """The result of one job: the checker's errors, and the reason why its values are wrong."""

    name: str
    errors: list[str] = field(default_factory=list)
    wrong: str = ""

    @property
    def clean(self) -> bool:
        return not self.errors and not self.wrong


def read(lines: Iterable[str], ended: str) -> list[Verdict]:
    """The verdicts of the jobs that a process began, from its output.

    Args:
        lines: the lines that the checker and the child printed, in their order.
        ended: how the process ended, for the verdict of an unfinished job.
    """
    verdicts: list[Verdict] = []
    open_job, num_errors, summary = False, 0, None
    for line in lines:
        if match := EVENT.match(line):
            event = json.loads(match[1])
            if "begin" in event:
                verdicts.append(Verdict(event["begin"]))
                open_job = True
            else:
                verdicts[-1].wrong, open_job = event["wrong"], False
        elif error := ERROR.match(line):
            num_errors += 1
            (verdicts or [Verdict("before the first")])[-1].errors.append(error[1])
        elif total := SUMMARY.match(line):
            summary = int(total[1])
    if open_job:
        verdicts[-1].wrong = ended
    if summary is None and not open_job:
        verdicts.append(Verdict("the whole process", wrong=f"the checker gave no summary; {ended}"))
    elif (summary or 0) > num_errors:
        verdicts.append(Verdict("the whole process", [f"{(summary or 0) - num_errors} errors that no job shows"]))
    return verdicts


def share(jobs: Sequence[tuple[str, float]], workers: int) -> list[list[str]]:
    """Distribute jobs over workers, the longest first, so that all workers take about the same time.

    Args:
        jobs: the name and the seconds of each job.
        workers: the maximum number of shares.

    Returns:
        The names of each worker's jobs.
    """
    loads = [(0.0, nth, list[str]()) for nth in range(max(1, min(workers, len(jobs))))]
    for name, seconds in sorted(jobs, key=lambda job: -job[1]):
        load, nth, names = min(loads)
        names.append(name)
        loads[nth] = (load + seconds, nth, names)
    return [names for _, _, names in loads]


@dataclass(frozen=True)
class Checker:
    """Starts the processes that run jobs.

    Attributes:
        prefix: the checker's command line; empty to run without a checker.
        device: the device of the jobs.
        limit: seconds without a line of output after which a process is killed.
        cache: the folder for compiled kernels that all processes share.
        child: the module that runs jobs.
    """

    prefix: tuple[str, ...]
    device: str
    limit: float
    cache: Path
    child: str = CHILD

    def run(self, names: Sequence[str]) -> list[Verdict]:
        """Run jobs, with a new process after each one that ends early, until each job has a verdict."""
        verdicts: list[Verdict] = []
        remaining = list(names)
        while remaining:
            lines, ended = self._process(remaining)
            new_verdicts = read(lines, ended)
            begun = {verdict.name for verdict in new_verdicts}
            if not begun & set(remaining):
                reason = f"not begun: {ended}; {' '.join(lines[-3:])[:300]}"
                new_verdicts.append(Verdict(remaining[0], wrong=reason))
                begun.add(remaining[0])
            verdicts += new_verdicts
            remaining = [name for name in remaining if name not in begun]
        return verdicts

    def _process(self, names: Sequence[str]) -> tuple[list[str], str]:
        """Run one process; returns its lines of output, and how it ended."""
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
                return self._output(process)

    def _output(self, process: subprocess.Popen[str]) -> tuple[list[str], str]:
        """The lines of a process, and how it ended; a process that prints no line for `limit` seconds is killed."""
        last_time, finished, killed, lines = time.monotonic(), threading.Event(), threading.Event(), list[str]()

        def watch() -> None:
            while not finished.wait(0.2):
                if time.monotonic() - last_time > self.limit:
                    killed.set()
                    os.killpg(process.pid, signal.SIGKILL)  # the whole group: the checker's child holds the pipe open
                    return

        threading.Thread(target=watch, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            last_time = time.monotonic()
            lines.append(line.rstrip("\n"))
        finished.set()
        status = process.wait()
        return lines, f"killed: no answer for {self.limit:g} s" if killed.is_set() else f"it ended with status {status}"


def sanitizer() -> tuple[str, str]:
    """compute-sanitizer's path and version; both are empty if it is not installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin")))
    if tool is None:
        return "", ""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"[Vv]ersion\s+(\S+)", text)
    return tool, version[1] if version else text.strip()


def all_jobs() -> list[tuple[str, float, float]]:
    """The name, seconds and gigabytes of every job."""
    child = subprocess.run(
        [sys.executable, "-m", CHILD, "list"], cwd=ROOT, env=with_path(ROOT), capture_output=True, text=True
    )
    if child.returncode:
        raise SystemExit(f"the jobs cannot be listed: {child.stderr[-600:]}")
    return [(name, seconds, gigabytes) for name, seconds, gigabytes in json.loads(child.stdout.splitlines()[-1])]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memcheck.py", description="Run memcheck over one launch of every kernel variant."
    )
    parser.add_argument(
        "--out", type=Path, default=RECORD, help="the record; default: benchmarks/results/memcheck.json"
    )
    parser.add_argument("--only", default="", help="only variants whose name contains this text; requires --out")
    parser.add_argument("--workers", type=int, default=cores(), help="number of parallel processes")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which one variant is killed")
    options = parser.parse_args(argv)
    if options.only and options.out == RECORD:
        parser.error("--only selects some variants; accepted: with --out, because the record covers all variants")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checker, and return the exit status."""
    options, start_time = arguments(argv), time.monotonic()
    (gigabytes, _, description), (tool, version) = machine(), sanitizer()
    if not gigabytes or not tool:
        requirement = "compute-sanitizer, of the CUDA toolkit" if gigabytes else "a GPU; torch sees none here"
        print(f"memcheck needs {requirement}", file=sys.stderr)
        return 2
    jobs = [job for job in all_jobs() if options.only in job[0]]
    not_run = {
        name: f"needs {needed:.0f} GB of GPU memory"
        for name, _, needed in jobs if needed > gigabytes - RESERVED_GIGABYTES
    }  # fmt: skip
    large = [name for name, _, needed in jobs if needed > LARGE_GIGABYTES and name not in not_run]
    small = [(name, seconds) for name, seconds, _ in jobs if name not in not_run and name not in large]
    shares = share(small, options.workers)
    print(f"{len(large) + len(small)} variants in {len(shares)} processes, on {description['device']}", flush=True)
    prefix = (
        tool, "--tool", "memcheck", "--error-exitcode", str(SAW), "--report-api-errors", "no",
        "--target-processes", "application-only",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="memcheck") as cache, ThreadPoolExecutor(len(shares)) as pool:
        checker = Checker(prefix, "cuda", options.limit, Path(cache))
        verdicts = checker.run(large)  # before the pool starts, so that no other process takes GPU memory
        for share_verdicts in pool.map(checker.run, shares):
            verdicts += share_verdicts
    description |= {"tool": f"compute-sanitizer {version}"}
    return report(verdicts, not_run, description, start_time, options.out)


def report(
    verdicts: Sequence[Verdict], not_run: dict[str, str], description: dict[str, str], start_time: float, out: Path
) -> int:
    """Print the errors, write the record, and return the exit status.

    Args:
        verdicts: the results of all jobs.
        not_run: for each job that did not run, the reason.
        description: device, driver, versions, commit, date and tool.
        start_time: the monotonic time at which the run began.
        out: the file of the record.
    """
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
    seconds = time.monotonic() - start_time
    errors = {verdict.name: [*verdict.errors, verdict.wrong] for verdict in bad}
    write(numbers | description | {"seconds": round(seconds, 1), "not_run": not_run, "found": errors}, out)
    print(f"{numbers['variants']} variants, {numbers['errors']} errors, {numbers['wrong']} wrong in {seconds:.1f}s")
    return 1 if bad or not numbers["variants"] else 0


if __name__ == "__main__":
    sys.exit(main())
