"""The child process of `script`: runs jobs "name/placement/number", and prints an answer after each.

Kernels run in Triton's interpreter without a trace, so that a job may end this process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor

from kvgather.lab.child import leave_no_core
from kvgather.lab.fence import fenced
from kvgather.lab.hunt import BUGS
from kvgather.lab.hunt.differences import difference
from kvgather.lab.hunt.kernels.rows import NoRoom
from kvgather.lab.hunt.script import geometries


def answer(name: str, placement: str, number: int) -> dict[str, Any]:
    bug = BUGS[name]
    try:
        inputs = bug.inputs(geometries(bug)[number])
    except NoRoom as error:
        return {"kind": "refused", "message": str(error)}
    expected = bug.expected(inputs)
    if placement == "fenced":
        inputs = {key: fenced(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    bug.run(inputs)
    found = [difference(tensor, inputs[key], key, bug.tolerance) for key, tensor in expected.items()]
    wrong = [text for text in found if text]
    return {"kind": "wrong", "message": wrong[0]} if wrong else {"kind": "right", "message": ""}


def main() -> None:
    leave_no_core()
    for job in sys.argv[1:]:
        name, placement, number = job.split("/")
        print(json.dumps({"job": job, **answer(name, placement, int(number))}), flush=True)


if __name__ == "__main__":
    main()
