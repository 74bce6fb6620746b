"""The tile of the direct kernel: what shapes decide, and what each choice may take of a GPU."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvgather.device import triton_available
from kvgather.formats.layout import LAYOUTS, Geometry

pytestmark = pytest.mark.triton
if triton_available():
    from kvgather.attention.direct import Tile, alike_operands, choose_tile, padded_dims

H100 = 132  # processors
SHARED_BYTES = 227 * 1024  # of one of them
PADS = st.sampled_from([16, 32, 64, 128, 256])


def test_only_tiles_that_are_read_from_shared_memory_are_widened() -> None:
    small, large = Tile(16, 32, 2, 3, 4, 128), Tile(64, 32, 4, 3, 1)
    assert alike_operands(small, 16, 32) == (small, 16, 32)
    assert alike_operands(large, 16, 32) == (large._replace(n=64), 64, 64)
    for tile in (Tile(64, 128, 4, 3, 1), Tile(128, 64, 4, 3, 2), Tile(64, 64, 8, 2, 1)):
        for pads in ((64, 64), (64, 128), (128, 128), (256, 128)):
            assert alike_operands(tile, *pads) == (tile, *pads), "heads of 64 and 128 are compiled as before"


@pytest.mark.parametrize(
    ("rows", "dim", "cut"),
    [
        (1, 64, (16, 64, 2, 2)),  # decode
        (16, 128, (16, 64, 2, 2)),
        (17, 64, (64, 128, 4, 2)),
        (64, 128, (64, 128, 4, 2)),
        (65, 64, (128, 128, 4, 2)),
        (4096, 128, (128, 64, 4, 3)),
        (1, 256, (16, 64, 8, 2)),
        (33, 256, (64, 64, 8, 2)),
    ],
)
def test_rows_and_head_dims_decide_the_tile(rows: int, dim: int, cut: tuple[int, ...]) -> None:
    tile = choose_tile(rows, 8192, 128, dim, dim, H100)
    assert (tile.m, tile.n, tile.num_warps, tile.num_stages) == cut


def test_v_of_shuffle_has_one_stage_less() -> None:
    stages = {layout: choose_tile(4096, 8192, 128, 128, 128, H100, layout=layout).num_stages for layout in LAYOUTS}
    assert stages == {"NHD": 3, "HND": 3, "SHUFFLE": 2}


@pytest.mark.parametrize(
    ("keys", "programs", "splits"),
    [
        (100_000, 1, 128),  # one sequence: as many parts as one combine can merge
        (2048, 1, 8),  # a part has 4 steps of 64 keys or more
        (100, 1, 1),
        (8192, 128, 8),  # 8 programs on each of 132 processors
        (8192, 100_000, 1),  # the sequences alone fill the GPU
        (100_000, 10, 64),  # 105 would fit, which is no power of two
    ],
)
def test_keys_are_split_until_the_gpu_is_full(keys: int, programs: int, splits: int) -> None:
    assert choose_tile(1, keys, programs, 64, 64, H100).splits == splits


@given(
    rows=st.integers(0, 2**13), keys=st.integers(0, 2**20), programs=st.integers(0, 2**14), pads=st.tuples(PADS, PADS),
    processors=st.sampled_from([1, 20, 108, H100, 304]), operand_bytes=st.sampled_from([2, 4]),
    layout=st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_every_tile_fits(
    rows: int, keys: int, programs: int, pads: tuple[int, int], processors: int, operand_bytes: int, layout: str
) -> None:
    """Powers of two where the kernel needs them, and q with one stage of K and V in an H100's shared memory."""
    chosen = choose_tile(rows, keys, programs, *pads, processors, operand_bytes, layout)
    for tile, k_pad, v_pad in ((chosen, *pads), alike_operands(chosen, *pads)):
        for size in (tile.m, tile.n, tile.num_warps):
            assert size & size - 1 == 0
        assert tile.m >= 16 and tile.n >= 16, "tensor cores need 16"
        assert 1 <= tile.splits <= 128 and (tile.splits <= 64 or tile.splits == 128)
        assert (tile.m * k_pad + tile.n * (k_pad + v_pad)) * operand_bytes <= SHARED_BYTES


@pytest.mark.parametrize(("dims", "pads"), [((1, 5), (16, 16)), ((16, 17), (16, 32)), ((192, 128), (256, 128))])
def test_padded_dims(dims: tuple[int, int], pads: tuple[int, int]) -> None:
    assert padded_dims(Geometry("NHD", 1, 16, 1, *dims, torch.bfloat16, torch.device("cpu"))) == pads
