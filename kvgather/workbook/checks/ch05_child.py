"""The child process of exercise 05.2: runs the planted kernel on the tensors that the reader's function lays out.

python -m kvgather.workbook.checks.ch05_child NAME SOURCE
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from kvgather.lab import planted
from kvgather.lab.child import leave_no_core
from kvgather.lab.fence import fenced

LENGTHS, CU_SEQLENS = [5, 0, 4], [0, 5, 5, 9]


def fail(message: str) -> None:
    """Report why the tensors are not what the exercise asks for, and exit."""
    print(json.dumps({"kind": "failed", "message": message}), flush=True)
    sys.exit(1)


def main() -> None:
    leave_no_core()
    name, source = sys.argv[1:]
    names: dict[str, Any] = {"torch": torch, "fenced": fenced, "planted": planted}
    lengths, cu_seqlens = torch.zeros(3, dtype=torch.int32), torch.tensor(CU_SEQLENS, dtype=torch.int32)
    try:
        exec(source, names)
        answer = names[name](lengths, cu_seqlens)
    except Exception as error:
        return fail(f"your function raised {type(error).__name__}: {str(error).splitlines()[0]}")
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return fail(f"expected two tensors, lengths and cu_seqlens, got {type(answer).__name__}")
    for got, given, argument in zip(answer, (lengths, cu_seqlens), ("lengths", "cu_seqlens"), strict=True):
        if not isinstance(got, torch.Tensor) or got.dtype != given.dtype or not torch.equal(got, given):
            return fail(f"{argument} has another dtype, shape or values than the given tensor")
    planted.run(*answer)
    if answer[0].tolist() != LENGTHS:
        fail(f"the lengths came out as {answer[0].tolist()}")


if __name__ == "__main__":
    main()
