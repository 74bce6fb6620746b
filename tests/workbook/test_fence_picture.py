"""The picture of a fence is drawn from where the tensor is and what the trace saw."""

from __future__ import annotations

import sys

import pytest
import torch

from kvgather.lab.fence import fenced

pytestmark = [pytest.mark.triton, pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")]


def test_one_box_a_load_in_its_place_and_color():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    from kvgather.lab import planted
    from kvgather.lab.trace import trace
    from kvgather.workbook.fence_picture import fence_picture
    from kvgather.workbook.figures import BAD, GOOD

    tensor = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    with trace() as t:
        planted.run(torch.zeros(3, dtype=torch.int32), tensor)
    drawing = fence_picture(fenced(tensor[:2]), {"lengths": (t, "cu_seqlens_ptr")})
    drawn = {
        (patch.get_x(), to_hex(patch.get_facecolor()).upper())
        for patch in drawing.axes[0].patches
        if patch.get_width() == 4
    }
    assert drawn == {(-4, BAD), (0, GOOD), (4, GOOD), (8, BAD), (12, BAD)}
    with pytest.raises(ValueError, match="tensor does not end with its page"):
        fence_picture(fenced(tensor, side="before"), {"lengths": (t, "cu_seqlens_ptr")})
