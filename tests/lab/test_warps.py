"""Loads of warps: layouts computed by hand, and the kernels of chapter 07 compiled for an H100."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvgather.cases import Case, build
from kvgather.lab import steps, warps
from kvgather.lab.assembly import AssemblyError
from kvgather.lab.trace import Access, trace

ROWS = warps.Layout(per_lane=(1, 2), lanes=(2, 2), warps=(2, 1), order=(1, 0))
CASE = Case(layout="SHUFFLE", num_heads=2, k_dim=64, v_dim=64, lengths=(16, 3), starts=(), num_blocks=6)
H100 = "cuda:90"


def access(addresses, mask=None) -> Access:
    offsets = np.asarray(addresses, np.int64)
    enabled = np.ones(offsets.shape, bool) if mask is None else np.asarray(mask)
    outside = np.zeros(offsets.shape, bool)
    return Access("k", 0, (0,), "load", "v_ptr", "f.py", 1, offsets, 1, offsets, enabled, outside, 64)


def test_a_layout_distributes_a_tile_over_warps_and_lanes():
    # 4 × 4 elements: two rows for each warp, two lanes for each row, two contiguous elements for each lane
    assert ROWS.elements((4, 4)).tolist() == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11], [12, 13], [14, 15]],
    ]


def test_a_tile_larger_than_the_layout_repeats_it():
    assert ROWS.elements((4, 8))[0, 1].tolist() == [2, 3, 6, 7]


def test_a_tile_smaller_than_the_layout_is_replicated():
    row = warps.Layout(per_lane=(1,), lanes=(4,), warps=(2,), order=(0,))
    assert row.elements((4,)).tolist() == [[[0], [1], [2], [3]]] * 2


def test_the_first_axis_of_the_order_varies_fastest():
    columns = warps.Layout(per_lane=(1, 1), lanes=(2, 2), warps=(1, 1), order=(0, 1))
    assert columns.elements((2, 2)).ravel().tolist() == [0, 2, 1, 3]


def test_loads_of_warps_have_the_width_of_their_instruction():
    offsets = np.arange(16).reshape(4, 4) * 10
    narrow, wide = (warps.TileLoad((4, 4), ROWS, width).of_warps(access(offsets)) for width in (1, 2))
    assert narrow.shape == (4, 4, 1)
    assert narrow[0, :, 0].tolist() == [0, 20, 40, 60]
    assert wide.shape == (2, 4, 2)
    assert wide[1].tolist() == [[80, 90], [100, 110], [120, 130], [140, 150]]


def test_disabled_lanes_read_nothing():
    offsets = np.arange(16).reshape(4, 4) * 32
    loads = warps.TileLoad((4, 4), ROWS, 2).of_warps(access(offsets, offsets < 96))
    assert loads[0].tolist() == [[0, 32], [64, -1], [-1, -1], [-1, -1]]
    assert [warps.sectors(load) for load in loads] == [3, 0]


def test_an_access_of_another_shape_is_rejected():
    with pytest.raises(ValueError, match=r"access has shape \(2,\) of 1 bytes; accepted: \(4, 4\) of 1"):
        warps.TileLoad((4, 4), ROWS, 2).of_warps(access([0, 1]))


def test_sectors_are_counted_once():
    assert warps.sectors(np.array([[0, 31], [32, 95], [-1, 64]])) == 3


@pytest.mark.triton
def test_an_unknown_target_is_rejected():
    with pytest.raises(AssemblyError, match="target is 'cuda:1'; accepted: cuda:80"):
        list(warps.compile_steps([("2 tile", CASE, "cuda:1")]))


@pytest.mark.triton
def test_the_loads_of_each_step_match_chapter_07():
    names = ["0 token per program", *(step.name for step in steps.STEPS), "5 kvgather", "not\nPython"]
    kernels = list(warps.compile_steps([(name, CASE, H100) for name in names]))
    assert [kernel.name for kernel in kernels] == names
    assert kernels.pop().error.startswith("SyntaxError")
    assert [kernel.error for kernel in kernels] == [""] * 6
    widths = [[tile.width for tile in kernel.tiles()] for kernel in kernels]
    assert widths == [[1, 1], [1, 1], [16, 1], [16, 16], [16, 16], [16, 16]]
    assert kernels[3].loads == {"ld.global.v4.b32": 2}
    assert set(kernels[3].stores) == {"st.global.v4.b32"}

    built = build(CASE, values="normal")
    out = (torch.empty(19, 2, 64, dtype=torch.bfloat16), torch.empty(19, 2, 64, dtype=torch.bfloat16))
    with trace() as masked:
        steps.gather(steps.STEPS[1], built.cache, built.plan, out)
    with trace() as whole:
        steps.gather(steps.STEPS[2], built.cache, built.plan, out)
    # Two heads, 64 dims in two groups of 32 lanes, 16 + 3 slots: one load each, of single bytes 16 apart.
    assert warps.reads(masked, kernels[2]) == warps.Reads(4, 24, 2 * 2 * 19, 16 * 2 * 2 * 19, 2 * 19 * 64)
    # Two whole pages: 2 heads, 2 pages, 2 warps, 512 contiguous bytes for each.
    assert warps.reads(whole, kernels[3]) == warps.Reads(4, 24, 8, 8 * 16, 2 * 2 * 1024)


def test_assembly_whose_loads_do_not_match_the_layouts_is_rejected():
    text = "#blocked = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>\n"
    kernel = warps.Compiled("k", H100, "", text + "%k = tt.load %p : tensor<64x!tt.ptr<i8>, #blocked>")
    with pytest.raises(AssemblyError, match="k for cuda:90 has fewer loads than tiles"):
        kernel.tiles()
    mixed = warps.Compiled("k", H100, "ld.global.b8 ld.global.b16", kernel.layouts.replace("[1]", "[3]"))
    with pytest.raises(AssemblyError, match="loads a tile in pieces"):
        mixed.tiles()
