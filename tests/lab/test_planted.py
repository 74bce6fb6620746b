"""The planted bug: right results, and an access outside a tensor that the trace reports."""

from __future__ import annotations

import pytest
import torch

from kvgather.lab.trace import trace

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("lengths", [[4], [3, 0, 4, 1, 2], [1] * 7])
def test_right_lengths_and_one_access_outside(lengths):
    from kvgather.lab import planted

    out = torch.zeros(len(lengths), dtype=torch.int32)
    with trace() as t:
        planted.run(out, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))
    assert out.tolist() == lengths
    assert [(v.argument, v.element, v.kind) for v in t.violations] == [("cu_seqlens_ptr", -1, "load")]
