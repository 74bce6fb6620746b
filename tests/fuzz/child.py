"""Runs calls by number: `python -m tests.fuzz.child SEED FIRST END [--show]`.

It prints a line before and after each: `fuzz: {"begin": number, "function": name}` and
`fuzz: {"end": number, "outcome": "valid", "refused" or "bad", "wrong": reason, "snippet": code}`, the last two of a bad
one alone. With `--show` it prints calls and runs none.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch

from tests.fuzz.calls import case_of
from tests.fuzz.case import Wrong
from tests.fuzz.judge import run
from tests.fuzz.snippet import snippet

ADDRESS_SPACE = 12 << 30
"""Bytes; what a call requests by mistake fails then, and the machine goes on."""


def say(**event: object) -> None:
    print(f"fuzz: {json.dumps(event)}", flush=True)


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def main(seed: int, first: int, end: int) -> None:
    torch.set_num_threads(1)
    limit_memory()
    for number in range(first, end):
        case = case_of(seed, number)
        say(begin=number, function=case.function)
        wrong = ""
        try:
            outcome = run(case)
        except Wrong as error:
            outcome, wrong = "bad", str(error)
        except Exception:
            outcome, wrong = "bad", f"the oracle failed: {traceback.format_exc(limit=-3)}"
        say(end=number, outcome=outcome, **({"wrong": wrong, "snippet": snippet(case)} if wrong else {}))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:4]]
    if sys.argv[4:] == ["--show"]:
        for shown in range(*numbers[1:]):
            print(snippet(case_of(numbers[0], shown)))
    else:
        main(*numbers)
