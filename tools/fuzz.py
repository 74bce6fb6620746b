"""Every public function with valid and invalid arguments, against an oracle: `make fuzz CALLS=20000 SEED=0`.

`tests/fuzz/` makes the calls and judges them: each has to give the right result, or an error of ours that names an
argument, and to leave alone what it does not write. Batches of calls run in child processes. A process that dies or
hangs costs the call that it was at, which is run once more alone, and the next ones run in another process. A bad call
is printed as a Python script that repeats it. The exit status is 0 if no call was bad.

Call number n of a seed is the same however many there are: `ARGS="--only 1234"` runs one alone.
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
"""Calls of one process: importing torch costs as much as some hundred calls."""
OUTCOMES = ("valid", "refused", "bad")


@dataclass
class Call:
    """What became of a call."""

    number: int
    function: str
    outcome: str = ""
    wrong: str = ""
    snippet: str = ""


@dataclass
class Run:
    """One process's answers, and how it ended if not by itself."""

    calls: list[Call] = field(default_factory=list)
    ended: str = ""


@dataclass(frozen=True)
class Children:
    """How processes are run.

    Attributes:
        seed: of all calls.
        limit: seconds without a line of output, after which a process is killed.
        child: the module that runs calls.
    """

    seed: int
    limit: float
    child: str = CHILD

    def command(self, first: int, end: int, *more: str) -> list[str]:
        return [sys.executable, "-m", self.child, str(self.seed), str(first), str(end), *more]

    def environment(self) -> dict[str, str]:
        """On the CPU, where a kernel runs in the interpreter, also on a machine with a GPU."""
        return with_path(ROOT) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

    def run(self, first: int, end: int) -> Run:
        """Calls `first` to `end` - 1 in one process, as far as it gets."""
        run = Run()
        with subprocess.Popen(
            self.command(first, end), cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            last, others = "", self._lines(process)
            for line in others:
                event = EVENT.match(line)
                if event is None:
                    last = line.strip() or last
                    continue
                told = json.loads(event[1])
                if "begin" in told:
                    run.calls.append(Call(told["begin"], told["function"]))
                else:
                    call = run.calls[-1]
                    call.outcome, call.wrong = told["outcome"], told.get("wrong", "")
                    call.snippet = told.get("snippet", "")
            status = process.wait()
        if status:
            how = f"killed: no answer for {self.limit:g} s" if status == -signal.SIGKILL else f"ended with {status}"
            run.ended = f"the process {how}; {last[:200]}"
        return run

    def _lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """Lines as they come; the process is killed when none comes for too long."""
        heard, over = time.monotonic(), threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                if time.monotonic() - heard > self.limit:
                    os.killpg(process.pid, signal.SIGKILL)
                    return

        threading.Thread(target=watch, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            heard = time.monotonic()
            yield line.rstrip("\n")
        over.set()

    def all_of(self, first: int, end: int) -> Iterator[Call]:
        """Calls `first` to `end` - 1, in as many processes as it takes."""
        while first < end:
            run = self.run(first, min(end, first + BATCH))
            unfinished = run.calls[-1] if run.calls and not run.calls[-1].outcome else None
            if not run.calls or (run.ended and unfinished is None):
                raise SystemExit(f"the calls from {first} on cannot be run: {run.ended or 'no answer'}")
            if unfinished is not None:
                self.narrow(unfinished, run.ended, first)
            yield from run.calls
            first = run.calls[-1].number + 1

    def narrow(self, call: Call, ended: str, first: int) -> None:
        """Run a call alone that a process did not get over, and write down what came of it."""
        alone = self.run(call.number, call.number + 1)
        call.outcome, call.wrong = "bad", ended or "the process ended in it"
        if alone.calls and alone.calls[-1].outcome == "bad":
            call.wrong = alone.calls[-1].wrong
        elif not alone.ended:
            call.wrong += f"; alone it is {alone.calls[-1].outcome}: it takes calls from {first} on before it"
        shown = subprocess.run(
            self.command(call.number, call.number + 1, "--show"), cwd=ROOT, env=self.environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        call.snippet = shown.stdout


def table(calls: Sequence[Call]) -> str:
    """How often each function was called, and what came of it."""
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
    """A bad call for the reader."""
    return f"\nBAD call {call.number}, {call.function}: {call.wrong}\n\n{call.snippet}\n"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz.py", description="Call every public function, rightly and wrongly.")
    parser.add_argument("--calls", type=int, default=20000, help="how many calls; default: 20000")
    parser.add_argument("--seed", type=int, default=0, help="of all of them; default: 0")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call; default: 0")
    parser.add_argument("--only", type=int, help="run the call of this number alone")
    parser.add_argument("--show", type=int, help="print the call of this number, and run nothing")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one call, after which it is killed")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the calls; the exit status."""
    options, begun = arguments(given), time.monotonic()
    children = Children(options.seed, options.limit)
    if options.show is not None:
        command = children.command(options.show, options.show + 1, "--show")
        return subprocess.run(command, cwd=ROOT, env=children.environment()).returncode
    first, end = options.first, options.first + options.calls
    if options.only is not None:
        first, end = options.only, options.only + 1
    calls: list[Call] = []
    reported = begun
    for call in children.all_of(first, end):
        calls.append(call)
        if call.outcome == "bad":
            print(told(call), flush=True)
        if len(calls) % BATCH == 0 and time.monotonic() - reported > 20:
            reported = time.monotonic()
            print(f"{len(calls)} of {end - first} calls, {reported - begun:.0f} s", flush=True)
    seconds = time.monotonic() - begun
    bad = sum(call.outcome == "bad" for call in calls)
    print(table(calls))
    print(f"{len(calls)} calls of seed {options.seed} from {first} on, {bad} bad, in {seconds:.1f} s")
    return 1 if bad or not calls else 0


if __name__ == "__main__":
    sys.exit(main())
