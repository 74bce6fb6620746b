"""What runs under the memory checker: `python -m tests.memcheck.child DEVICE FILE`, FILE being a JSON list of names.

`python -m tests.memcheck.child list` prints every job's name, seconds and gigabytes.

Between the checker's own lines it prints one of its own before and after each job, `memcheck: {"begin": name}` and
`memcheck: {"end": name, "wrong": reason}`, the reason being empty if the values are right.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.memcheck.jobs import JOBS


def say(**event: str) -> None:
    print(f"memcheck: {json.dumps(event)}", flush=True)


def run(names: list[str], device: str) -> None:
    """Run the jobs in this order; end the process once the GPU takes no more work."""
    jobs = {job.name: job for job in JOBS}
    for name in names:
        say(begin=name)
        wrong = ""
        try:
            jobs[name].run(device)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:400]
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                say(end=name, wrong=wrong or str(error).splitlines()[0])
                os._exit(0)  # to free memory in a context that is broken would abort, and hide the checker's status
        say(end=name, wrong=wrong)


if __name__ == "__main__":
    if sys.argv[1] == "list":
        print(json.dumps([[job.name, job.seconds, job.gigabytes] for job in JOBS]))
    else:
        torch.manual_seed(0)
        run(json.loads(Path(sys.argv[2]).read_text()), sys.argv[1])
