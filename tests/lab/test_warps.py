"""Lanes laid over a trace: hand-worked layouts, and the kernels of chapter 07 as they are compiled for an H100."""

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
    at = np.asarray(addresses, np.int64)
    on = np.ones(at.shape, bool) if mask is None else np.asarray(mask)
    return Access("k", 0, (0,), "load", "v_ptr", "f.py", 1, at, 1, at, on, np.zeros(at.shape, bool), 64)


def test_a_layout_deals_the_elements_out():
    # 4 × 4 elements: a warp has two rows, two lanes share a row, each holds two neighbours
    assert ROWS.elements((4, 4)).tolist() == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11], [12, 13], [14, 15]],
    ]


def test_a_tile_larger_than_the_program_is_dealt_out_again():
    assert ROWS.elements((4, 8))[0, 1].tolist() == [2, 3, 6, 7]


def test_a_tile_smaller_than_the_program_is_held_twice():
    row = warps.Layout(per_lane=(1,), lanes=(4,), warps=(2,), order=(0,))
    assert row.elements((4,)).tolist() == [[[0], [1], [2], [3]]] * 2


def test_the_first_axis_of_the_order_is_walked_by_neighbours():
    down = warps.Layout(per_lane=(1, 1), lanes=(2, 2), warps=(1, 1), order=(0, 1))
    assert down.elements((2, 2)).ravel().tolist() == [0, 2, 1, 3]


def test_loads_of_warps_are_as_wide_as_their_instruction():
    at = np.arange(16).reshape(4, 4) * 10
    narrow, wide = (warps.TileLoad((4, 4), ROWS, width).of_warps(access(at)) for width in (1, 2))
    assert narrow.shape == (4, 4, 1)
    assert narrow[0, :, 0].tolist() == [0, 20, 40, 60]
    assert wide.shape == (2, 4, 2)
    assert wide[1].tolist() == [[80, 90], [100, 110], [120, 130], [140, 150]]


def test_lanes_that_are_off_read_nothing():
    at = np.arange(16).reshape(4, 4) * 32
    load = warps.TileLoad((4, 4), ROWS, 2).of_warps(access(at, at < 96))
    assert load[0].tolist() == [[0, 32], [64, -1], [-1, -1], [-1, -1]]
    assert [warps.sectors(one) for one in load] == [3, 0]


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"access has shape \(2,\) of 1 bytes; accepted: \(4, 4\) of 1"):
        warps.TileLoad((4, 4), ROWS, 2).of_warps(access([0, 1]))


def test_sectors_are_counted_once():
    assert warps.sectors(np.array([[0, 31], [32, 95], [-1, 64]])) == 3


@pytest.mark.triton
def test_a_target_that_is_not_there_is_refused():
    with pytest.raises(AssemblyError, match="target is 'cuda:1'; accepted: cuda:80"):
        list(warps.compile_steps([("2 tile", CASE, "cuda:1")]))


@pytest.mark.triton
def test_the_steps_compile_as_the_chapter_says():
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
    # Two heads, 32 lanes for 64 dims: a load for each of 16 and of 3 slots, of single bytes 16 apart.
    assert warps.reads(masked, kernels[2]) == warps.Reads(4, 24, 2 * 2 * 19, 16 * 2 * 2 * 19, 2 * 19 * 64)
    # Both pages whole: 2 heads, 2 pages, 2 warps, each 512 bytes side by side.
    assert warps.reads(whole, kernels[3]) == warps.Reads(4, 24, 8, 8 * 16, 2 * 2 * 1024)


def test_no_ptx_has_no_tiles():
    text = "#blocked = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>\n"
    kernel = warps.Compiled("k", H100, "", text + "%k = tt.load %p : tensor<64x!tt.ptr<i8>, #blocked>")
    with pytest.raises(AssemblyError, match="k for cuda:90 has fewer loads than tiles"):
        kernel.tiles()
    mixed = warps.Compiled("k", H100, "ld.global.b8 ld.global.b16", kernel.layouts.replace("[1]", "[3]"))
    with pytest.raises(AssemblyError, match="loads a tile in pieces"):
        mixed.tiles()
