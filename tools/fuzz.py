"""Calls every public function with valid and invalid arguments, against an oracle: `make fuzz CALLS=20000 SEED=0`.

`tests/fuzz/` makes the calls and judges them. Each call must return the right result, or raise one of the package's
errors that names an argument, and must not change any tensor that it does not write. Batches of calls run in child
processes. If a process dies or hangs, its current call runs once more alone, and the remaining calls run in another
process. A bad call is printed as a Python script that repeats it. The exit status is 0 if no call was bad.

Call number n of a seed does not depend on the number of calls: `ARGS="--only 1234"` runs one alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gpu_record import ROOT, with_path

CHILD = "tests.fuzz.child"
EVENT = re.compile(r"^fuzz: (\{.*\})$")
BATCH = 1000
"""Calls of one process: the import of torch takes as long as several hundred calls."""
OUTCOMES = ("valid", "refused", "bad")


@dataclass
class Call:
    """One call and its outcome, one of `OUTCOMES`."""

    number: int
    function: str
    outcome: str = ""
    wrong: str = ""
    snippet: str = ""


@dataclass
class Run:
    """The calls of one process; `failure` says how the process ended if its exit status is not 0."""

    calls: list[Call] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Children:
    """Starts the processes that run calls.

    Attributes:
        seed: the seed of all calls.
        limit: seconds without a line of output after which a process is killed.
        child: the module that runs calls.
    """

    seed: int
    limit: float
    child: str = CHILD

    def command(self, first: int, end: int, *options: str) -> list[str]:
        return [sys.executable, "-m", self.child, str(self.seed), str(first), str(end), *options]

    def environment(self) -> dict[str, str]:
        """On the CPU, where a kernel runs in the interpreter, also on a machine with a GPU."""
        return with_path(ROOT) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

    def run(self, first: int, end: int) -> Run:
        """Run the calls `first` to `end` - 1 in one process, until the process ends."""
        run = Run()
        with subprocess.Popen(
            self.command(first, end), cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            last_line = ""
            for line in self._lines(process):
                match = EVENT.match(line)
                if match is None:
                    last_line = line.strip() or last_line
                    continue
                event = json.loads(match[1])
                if "begin" in event:
                    run.calls.append(Call(event["begin"], event["function"]))
                else:
                    call = run.calls[-1]
                    call.outcome, call.wrong = event["outcome"], event.get("wrong", "")
                    call.snippet = event.get("snippet", "")
            status = process.wait()
        if status:
            end_text = (
                f"killed: no answer for {self.limit:g} s" if status == -signal.SIGKILL else f"ended with {status}"
            )
            run.failure = f"the process {end_text}; {last_line[:200]}"
        return run

    def _lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """The process's lines of output; a process that prints no line for `limit` seconds is killed."""
        last_time, finished = time.monotonic(), threading.Event()

        def watch() -> None:
            while not finished.wait(0.2):
                if time.monotonic() - last_time > self.limit:
                    os.killpg(process.pid, signal.SIGKILL)
                    return

        threading.Thread(target=watch, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            last_time = time.monotonic()
            yield line.rstrip("\n")
        finished.set()

    def all_of(self, first: int, end: int) -> Iterator[Call]:
        """Run the calls `first` to `end` - 1, with a new process after each one that dies or finishes its batch."""
        while first < end:
            run = self.run(first, min(end, first + BATCH))
            unfinished = run.calls[-1] if run.calls and not run.calls[-1].outcome else None
            if not run.calls or (run.failure and unfinished is None):
                raise SystemExit(f"the calls from {first} on cannot be run: {run.failure or 'no answer'}")
            if unfinished is not None:
                self.narrow(unfinished, run.failure, first)
            yield from run.calls
            first = run.calls[-1].number + 1

    def narrow(self, call: Call, failure: str, first: int) -> None:
        """Run alone the call in which a process ended, and complete its outcome.

        Args:
            call: the call that has no outcome.
            failure: how the process ended; empty for exit status 0.
            first: the number of the process's first call.
        """
        alone = self.run(call.number, call.number + 1)
        call.outcome, call.wrong = "bad", failure or "the process ended during this call"
        if alone.calls and alone.calls[-1].outcome == "bad":
            call.wrong = alone.calls[-1].wrong
        elif not alone.failure:
            call.wrong += f"; alone it is {alone.calls[-1].outcome}: it takes calls from {first} on before it"
        script = subprocess.run(
            self.command(call.number, call.number + 1, "--show"), cwd=ROOT, env=self.environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        call.snippet = script.stdout


def table(calls: Sequence[Call]) -> str:
    """A table of the number of calls of each function, and of their outcomes."""
    counts: dict[str, Counter[str]] = {}
    for call in calls:
        for name in (call.function, "all"):
            counts.setdefault(name, Counter())[call.outcome] += 1
    width = max(map(len, counts), default=8)
    rows = [f"{'function':<{width}}  {'calls':>7}  {'valid':>7}  {'refused':>7}  {'bad':>5}"]
    for name in [*sorted(set(counts) - {"all"}), *(["all"] if "all" in counts else [])]:
        valid, refused, bad = (counts[name][outcome] for outcome in OUTCOMES)
        rows.append(f"{name:<{width}}  {counts[name].total():>7}  {valid:>7}  {refused:>7}  {bad:>5}")
    return "\n".join(rows)


def told(call: Call) -> str:
    """A bad call with its error, and the script that repeats it."""
    return f"\nBAD call {call.number}, {call.function}: {call.wrong}\n\n{call.snippet}\n"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Call every public function with valid and invalid arguments."
    parser = argparse.ArgumentParser(prog="fuzz.py", description=description)
    parser.add_argument("--calls", type=int, default=20000, help="the number of calls; default: 20000")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all calls; default: 0")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call; default: 0")
    parser.add_argument("--only", type=int, help="run the call of this number alone")
    parser.add_argument("--show", type=int, help="print the call of this number without running it")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which one call is killed; default: 60")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls, and return the exit status."""
    options, start_time = arguments(argv), time.monotonic()
    children = Children(options.seed, options.limit)
    if options.show is not None:
        command = children.command(options.show, options.show + 1, "--show")
        return subprocess.run(command, cwd=ROOT, env=children.environment()).returncode
    first, end = options.first, options.first + options.calls
    if options.only is not None:
        first, end = options.only, options.only + 1
    calls: list[Call] = []
    report_time = start_time
    for call in children.all_of(first, end):
        calls.append(call)
        if call.outcome == "bad":
            print(told(call), flush=True)
        if len(calls) % BATCH == 0 and time.monotonic() - report_time > 20:
            report_time = time.monotonic()
            print(f"{len(calls)} of {end - first} calls, {report_time - start_time:.0f} s", flush=True)
    seconds = time.monotonic() - start_time
    bad = sum(call.outcome == "bad" for call in calls)
    print(table(calls))
    print(f"{len(calls)} calls of seed {options.seed} from {first} on, {bad} bad, in {seconds:.1f} s")
    return 1 if bad or not calls else 0


if __name__ == "__main__":
    sys.exit(main())
