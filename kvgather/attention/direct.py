"""Attention straight from the paged cache; the launcher of `direct_kernel`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache import PagedKVCache
from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..kernels.launch import LoadStrides, launching
from .direct_kernel import combine_kernel, direct_kernel

if TYPE_CHECKING:
    from .batch import PrefixBatch

LOG2E = 1.4426950408889634
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


def choose_tile(rows: int, keys: int, programs: int, k_pad: int, v_pad: int, processors: int) -> Tile:
    """The tile for a batch, by its bounds alone.

    Args:
        rows: the most rows of a sequence, new tokens × query heads of a group.
        keys: the most keys of a sequence.
        programs: sequences × KV heads.
        k_pad, v_pad: head dims, rounded up to powers of two.
        processors: of the GPU.
    """
    wide = max(k_pad, v_pad)
    if wide > 128:
        m, n, num_warps, num_stages, registers, resident = (
            min(max(16, triton.next_power_of_2(rows)), 64),
            64,
            8,
            2,
            None,
            1,
        )
    elif rows <= 16:  # tensor cores fed from registers; how many programs fit on a processor decides
        m, n, num_warps, num_stages, registers, resident = 16, 64, 2, 3, 128, 8
    elif rows <= 64 or wide > 64:
        m, n, num_warps, num_stages, registers, resident = 64, 128, 4, 3 if wide <= 64 else 2, None, 2
    else:
        m, n, num_warps, num_stages, registers, resident = 128, 64, 4, 3, None, 2
    tiles = programs * -(-rows // m)
    splits = min(max(1, resident * processors // max(tiles, 1)), 64, max(1, keys // (4 * n)))
    return Tile(m, n, num_warps, num_stages, splits, registers)


def alike_operands(tile: Tile, k_pad: int, v_pad: int) -> tuple[Tile, int, int]:
    """Widen a tile for GPUs whose tensor cores read shared memory, until all operands are stored in one way.

    From compute capability 9.0 on, tensor cores find an operand in shared memory through a 64-bit descriptor. Triton
    computes it as the address of the buffer plus a constant; the constant's upper half says how the rows are stored,
    and depends on their width up to 128 bytes. K and V, converted from FP8, take turns in one buffer. So with rows of
    different widths two families of constants are added to one address, and ptxas 12.8.93 (in Triton 3.5 to 3.7)
    compiles that wrongly: for the family with the larger upper half it adds the constants to a register that it never
    wrote. The PTX is right, and the `wgmma` instructions for V read at stale addresses: values were silently wrong, or
    the context was lost, with K and V padded to 64 and 32 or to 32 and 16 (H100, H200; compute-sanitizer: "Invalid
    __shared__ read"). With one family the fault does not occur, whatever the version.

    The instances known upstream: triton-lang/triton issues 11366 and 10486 (kernels with a 32-column operand), and
    the workaround for Triton's own use of such sums in pull request 7196. The same PTX is compiled correctly by
    ptxas 12.9.86, 13.0.88, 13.1.115, 13.3.33, 13.4.59 and 13.5.37, but the shape decides here, not the version: a
    kernel may be compiled by another ptxas than the one that is found at run time.

    Args:
        tile: chosen or given.
        k_pad, v_pad: head dims, rounded up to powers of two.

    Returns:
        The tile and both padded head dims, of at least 64 keys, columns and columns if `wgmma` reads them: rows of
        128 bytes. Columns past a head dim are masked: they cost arithmetic and shared memory, no reads of the pool.
    """
    if tile.m < WGMMA_ROWS:
        return tile, k_pad, v_pad
    return replace(tile, n=max(tile.n, WIDEST_SWIZZLE)), max(k_pad, WIDEST_SWIZZLE), max(v_pad, WIDEST_SWIZZLE)


@functools.cache
def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Whether the tensor cores of a GPU read shared memory: NVIDIA's from compute capability 9.0 on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def direct_attention(
    q: Tensor,
    cache: PagedKVCache,
    batch: PrefixBatch,
    *,
    softmax_scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
    begin: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys and values in the cache, the new tokens' included; everything was checked by the caller.

    Args:
        q: `[n, q_heads, head_dim]`, new tokens of all sequences; head dims contiguous.
        cache: holds every key, new tokens' included.
        batch: whose block table and offsets say where.
        softmax_scale: what scores are multiplied by; above 0.
        sinks: `[q_heads]`, a logit for each head that counts in the denominator alone.
        window: keys that a query sees at most, itself included; None is all.
        begin: `[batch]` int32: keys before this position are left out.
        state: out `[n, q_heads, v_head_dim]` and log-sum-exp `[n, q_heads]` of the keys before `begin`, to go on from;
            both contiguous, and without the sink.
        tile: how to cut the work; None chooses. Results do not depend on it beyond rounding.

    Returns:
        out `[n, q_heads, v_head_dim]` in q's dtype and its natural log-sum-exp `[n, q_heads]` in FP32. Rows that
        belong to no sequence are 0, and −inf or the sink; rows that see a key in a bad block are NaN, and no others.
    """
    g = cache.geometry
    n, q_heads, _ = q.shape
    out = torch.empty((n, q_heads, g.v_head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, q_heads), dtype=torch.float32, device=q.device)
    if n == 0:
        return out, lse
    interpreted = interpreting()
    group = q_heads // g.num_kv_heads
    k_pad, v_pad = max(16, triton.next_power_of_2(g.head_dim)), max(16, triton.next_power_of_2(g.v_head_dim))
    sequences = len(batch.cu_seqlens_q) - 1
    rows = min(batch.max_q, n) * group
    if window is not None and window >= batch.max_k:
        window = None
    if sinks is not None:
        sinks = sinks.contiguous()
    if tile is None:
        processors = 1 if interpreted else torch.cuda.get_device_properties(q.device).multi_processor_count
        keys = batch.max_k if window is None else min(batch.max_k, window + batch.max_q)
        tile = choose_tile(rows, keys, sequences * g.num_kv_heads, k_pad, v_pad, processors)
    k_columns, v_columns = k_pad, v_pad
    if not interpreted and multiplies_from_shared_memory(q.device):
        tile, k_columns, v_columns = alike_operands(tile, k_pad, v_pad)
    tiles = max(1, -(-rows // tile.m))  # one is there for rows that belong to no sequence
    fmt = FORMATS.get(g.dtype)
    pools = [pool.view(torch.uint8) if fmt else pool for pool in (cache.key_cache, cache.value_cache)]
    k, v = LoadStrides.of(cache.key_cache, g.layout, "key"), LoadStrides.of(cache.value_cache, g.layout, "value")
    k_scale, v_scale = cache.scales
    split = tile.splits > 1
    part, part_lse = out, lse
    if split:
        part = torch.empty((tile.splits, n, q_heads, g.v_head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((tile.splits, n, q_heads), dtype=torch.float32, device=q.device)
    state_out, state_lse = state if state is not None else (out, lse)
    nothing = batch.cu_seqlens_q  # stands in for what is never read
    hardware = not interpreted and (fmt is None or fp8_support(q.device)[g.dtype] == "hardware")
    qk, pv = _operand_dtypes(q.dtype, g.dtype, v_scale.kind, interpreted)
    limit = {"maxnreg": tile.registers} if tile.registers and torch.version.cuda and not interpreted else {}
    with launching(q, interpreted):
        direct_kernel[((sequences + 1) * tiles * tile.splits * g.num_kv_heads,)](
            q, batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k,
            nothing if begin is None else begin, nothing if sinks is None else sinks,
            state_out, state_lse, part, part_lse,
            pools[0], nothing if k_scale.tensor is None else k_scale.tensor,
            pools[1], nothing if v_scale.tensor is None else v_scale.tensor,
            sequences, batch.block_table.shape[1], tiles, tile.splits, n, softmax_scale * LOG2E,
            q.stride(0), q.stride(1),
            *k.strides, *v.strides,
            k_scale.stride_block, k_scale.stride_head, k_scale.stride_slot,
            v_scale.stride_block, v_scale.stride_head, v_scale.stride_slot,
            PAGE=g.page_size, KV_HEADS=g.num_kv_heads, GROUP=group,
            K_DIM=g.head_dim, V_DIM=g.v_head_dim, K_PAD=k_columns, V_PAD=v_columns,
            M=tile.m, N=tile.n, SAME_PAGE=math.gcd(g.page_size, tile.n), SPLIT=split, WINDOW=window or 0,
            BEGINS=begin is not None, STATE=state is not None, SINKS=sinks is not None,
            V_SLOTS_PER_GROUP=v.slots_per_group, K_DIMS_PER_GROUP=k.dims_per_group,
            K_ALIGN=k.align, V_ALIGN=v.align, K_WIDE=k.extent >= 2**31, V_WIDE=v.extent >= 2**31,
            K_KIND=k_scale.kind, V_KIND=v_scale.kind,
            FORMAT="" if fmt is None else fmt.name, BIAS=0 if fmt is None else fmt.bias,
            HARDWARE=hardware,
            QK=qk, PV=pv, INTERPRETED=interpreted, STAGES=tile.num_stages,
            num_warps=tile.num_warps, **limit,
        )  # fmt: skip
        if split:
            splits = triton.next_power_of_2(tile.splits)
            together = max(1, min(16, 4096 // (splits * v_pad)))
            combine_kernel[(triton.cdiv(n * q_heads, together),)](
                part, part_lse, nothing if sinks is None else sinks, out, lse, n * q_heads, tile.splits,
                Q_HEADS=q_heads, V_DIM=g.v_head_dim, V_PAD=v_pad, SPLITS=splits, R=together,
                SINKS=sinks is not None, BY_HAND=interpreted,
            )  # fmt: skip
    return out, lse


def _operand_dtypes(q: torch.dtype, pool: torch.dtype, v_kind: str, interpreted: bool) -> tuple[object, object]:
    """The dtypes in which Q·K and P·V are multiplied; sums are FP32.

    FP16 holds FP8 exactly, and an H100 makes it of FP8 in a third of BF16's instructions. P times a scale that differs
    from key to key can leave FP16's range, not BF16's.
    """
    if interpreted or torch.float32 in (q, pool):
        return tl.float32, tl.float32
    if pool == torch.bfloat16:
        return tl.bfloat16, tl.bfloat16
    return tl.float16, tl.bfloat16 if v_kind in ("per-page-head", "per-token-head") else tl.float16
