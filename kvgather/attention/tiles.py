"""The tile of the direct kernel: how many rows and keys at a time, from shapes alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from ..formats.layout import Geometry

WGMMA_ROWS = 64
"""Rows from which on Triton multiplies with an H100's `wgmma` instructions; below, operands go through registers."""
WIDEST_SWIZZLE = 64
"""Elements of 2 bytes in the 128 bytes of the widest swizzle; an operand with rows as wide or wider has this one."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: `m` rows (token, query head of the group) by `n` keys at a time, keys in `splits` parts."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    splits: int
    registers: int | None = None  # at most so many a thread


def choose_tile(
    rows: int, keys: int, programs: int, k_pad: int, v_pad: int, processors: int, operand_bytes: int = 2,
    layout: str = "NHD",
) -> Tile:  # fmt: skip
    """The tile for a batch, by its bounds alone: the fastest of those in `benchmarks/results/tiles_h100.csv`.

    Args:
        rows: the most rows of a sequence, new tokens × query heads of a group.
        keys: the most keys of a sequence.
        programs: sequences × KV heads.
        k_pad, v_pad: head dims, rounded up to powers of two.
        processors: of the GPU.
        operand_bytes: of an element as it is multiplied: 4 where q or the pool is FP32.
        layout: of the cache.
    """
    wide, narrow = max(k_pad, v_pad), operand_bytes == 2
    registers = None
    if wide > 128:
        # 64 rows of FP32 would take 272 KiB of shared memory, and an H100 has 227.
        m = min(max(16, triton.next_power_of_2(rows)), 64 if narrow else 16)
        n, num_warps, num_stages, resident = 64, 8, 2, 1
    elif rows <= 16:  # tensor cores fed from registers; how many programs fit on a processor decides
        # 128 registers a thread let 8 programs of 64 columns be resident; of 128 columns they would spill 350 bytes.
        m, n, num_warps, num_stages = 16, 64, 2, 2
        registers, resident = (128, 8) if wide <= 64 else (None, 4)
    elif rows <= 64 or (wide > 64 and not narrow):
        # 128 keys of two FP32 operands of 128 would take 256 KiB.
        m, n, num_warps, num_stages, resident = 64, 128 if wide <= 64 or narrow else 64, 4, 2, 2
    elif wide <= 64:
        m, n, num_warps, num_stages, resident = 128, 128 if narrow else 64, 4, 2, 2
    else:  # a third stage makes SHUFFLE's V, which is transposed on chip, 8 % slower and the others 1 to 5 % faster
        m, n, num_warps, num_stages, resident = 128, 64, 4, 2 if layout == "SHUFFLE" else 3, 2
    tiles = programs * -(-rows // m)
    splits = min(max(1, resident * processors // max(tiles, 1)), 128, max(1, keys // (4 * n)))
    if 64 < splits < 128:  # `combine_kernel` loads a power of two
        splits = 64
    return Tile(m, n, num_warps, num_stages, splits, registers)


def alike_operands(tile: Tile, k_pad: int, v_pad: int) -> tuple[Tile, int, int]:
    """Widen a tile for GPUs whose tensor cores read shared memory, until all operands are stored in one way.

    The cause: from compute capability 9.0 on, tensor cores find an operand in shared memory through a 64-bit
    descriptor. Triton computes it as the address of a buffer plus a constant, whose upper half says how the rows are
    stored and depends on their width up to 128 bytes. K and V, converted from FP8, take turns in one buffer, so two
    families of constants are added to one address. ptxas 12.8.93 (the one of Triton 3.5.1, 3.6.0 and 3.7.1) adds the
    second family, where its upper half is the larger, to a register that it never wrote. The PTX is right; the
    machine code reads V anywhere in shared memory, or past its end.

    What was seen: wrong values, or "Invalid __shared__ read" and a lost context, with K and V padded to 64 and 32 or
    to 32 and 16 (H100, H200; Triton 3.6.0). In the machine code also with 128 and 32 and with 64 and 16, for FP8 pools
    of all formats in NHD, HND and SHUFFLE, with one loop and with two; not for 16-bit pools, whose buffers have two
    addresses. With one upper half for all operands the machine code was right in all of 165 kernels that were drawn.
    The same PTX is assembled rightly by ptxas 12.9.86, 13.0.88, 13.1.115, 13.3.33, 13.4.59 and 13.5.37. The shape
    decides here, not the version, which is not known before a kernel is compiled.

    Upstream: triton-lang/triton pull requests 7196 and 7197 work around a fault of ptxas in the arithmetic of
    descriptors, by an `or` in place of an `add`; with `or` throughout, this fault is gone too. Issues 10486, 10573 and
    11366 report illegal addresses on H100 and H20 with operands of 32 columns, Triton 3.6 and 3.7, and none with 3.5;
    fla-org/flash-linear-attention pull request 1262 names ptxas 12.8.93. Whether their cause is this one is not known.

    Args:
        tile: chosen or given.
        k_pad, v_pad: head dims, rounded up to powers of two.

    Returns:
        The tile and both padded head dims. With 64 rows or more, where Triton uses `wgmma`, keys and both dims are at
        least 64: rows of 128 bytes. What lies past a head dim is masked: it costs arithmetic and shared memory, no
        reads of the pool.
    """
    if tile.m < WGMMA_ROWS:
        return tile, k_pad, v_pad
    return replace(tile, n=max(tile.n, WIDEST_SWIZZLE)), max(k_pad, WIDEST_SWIZZLE), max(v_pad, WIDEST_SWIZZLE)


@functools.cache
def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Whether the tensor cores of a GPU read shared memory: NVIDIA's from compute capability 9.0 on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def padded_dims(geometry: Geometry) -> tuple[int, int]:
    """Columns of K's and of V's tile: powers of two, and 16 at least, which tensor cores need."""
    k_dim, v_dim = geometry.head_dim, geometry.v_head_dim
    return max(16, triton.next_power_of_2(k_dim)), max(16, triton.next_power_of_2(v_dim))
