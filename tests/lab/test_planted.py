"""The planted mistake: results that no test of results can fault, and the access that the trace finds."""

from __future__ import annotations

import pytest
import torch

from kvgather.lab.trace import trace

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("lengths", [[4], [3, 0, 4, 1, 2], [1] * 7])
def test_right_lengths_and_one_access_outside(lengths):
    from kvgather.lab import planted

    got = torch.zeros(len(lengths), dtype=torch.int32)
    with trace() as t:
        planted.run(got, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))
    assert got.tolist() == lengths
    assert [(v.argument, v.element, v.kind) for v in t.violations] == [("cu_seqlens_ptr", -1, "load")]
