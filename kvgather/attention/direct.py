"""Attention straight from the paged cache: what `direct_kernel` is compiled for, and its launch.

The kernel and its formula are in `direct_kernel`; `tiles` chooses how the work is cut.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..cache import PagedKVCache
from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..kernels.address import PoolForm, pool_strides
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.merge import combine_kernel
from ..kernels.softmax import LOG2E
from .direct_kernel import LayerForm, TileForm, direct_kernel
from .tiles import Tile, alike_operands, choose_tile, multiplies_from_shared_memory, padded_dims


def direct_attention(
    q: Tensor,
    cache: PagedKVCache,
    batch: CheckedBatch,
    *,
    softmax_scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
    begin: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
    likeness: int | None = None,
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
        likeness: the cache's, if the caller has just asked for it.

    Returns:
        out `[n, q_heads, v_head_dim]` in q's dtype and its natural log-sum-exp `[n, q_heads]` in FP32. Rows that
        belong to no sequence are 0, and −inf or the sink; rows that see a key in a bad block are NaN, and so are those
        of a sequence with more new tokens than `batch.max_q`.
    """
    if sinks is not None and not sinks.is_contiguous():
        sinks = sinks.contiguous()
    if window is not None and window >= batch.max_k:
        window = None
    shape = (*q.shape[:2], cache.geometry.v_head_dim)
    out, lse = q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)
    if shape[0] == 0:
        return out, lse
    interpreted = interpreting()
    if tile is None:
        tile = tile_of(q, cache, batch, window, interpreted)
    call = DirectCall(q, cache, batch, sinks, window, begin, state, tile, interpreted, likeness)
    tensors = call.tensors()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    tiles = call.tiles
    launch = prepared_once("direct attention", call.signature(addresses, tiles), lambda: DirectLaunch(call))
    launch(call, tiles, softmax_scale * LOG2E.value, tensors, addresses, out, lse)
    return out, lse


def tile_of(q: Tensor, cache: PagedKVCache, batch: CheckedBatch, window: int | None, interpreted: bool) -> Tile:
    """The tile for a layer of a batch, chosen once for all that are alike."""
    g, (n, q_heads, _) = cache.geometry, q.shape
    key = (
        "tile", n, q_heads, g.num_kv_heads, g.head_dim, g.v_head_dim, g.layout, q.dtype, g.dtype, window, interpreted,
    )  # fmt: skip

    def choose() -> Tile:
        processors = 1 if interpreted else torch.cuda.get_device_properties(q.device).multi_processor_count
        keys = batch.max_k if window is None else min(batch.max_k, window + batch.max_q)
        rows = min(batch.max_q, n) * (q_heads // g.num_kv_heads)
        operand_bytes = 4 if torch.float32 in (q.dtype, g.dtype) else 2
        programs = batch.num_sequences * g.num_kv_heads
        return choose_tile(rows, keys, programs, *padded_dims(g), processors, operand_bytes, g.layout)

    tile: Tile = batch.decided(key, choose)
    return tile


class DirectCall(NamedTuple):
    """The arguments of `direct_attention`, the tile chosen."""

    q: Tensor
    cache: PagedKVCache
    batch: CheckedBatch
    sinks: Tensor | None
    window: int | None
    begin: Tensor | None
    state: tuple[Tensor, Tensor] | None
    tile: Tile
    interpreted: bool
    likeness: int | None = None  # the cache's, where it is known

    @property
    def tiles(self) -> int:
        """Tiles of rows of the longest sequence; one is there for rows that belong to no sequence."""
        n, q_heads, _ = self.q.shape
        return max(1, -(-min(self.batch.max_q, n) * (q_heads // self.cache.geometry.num_kv_heads) // self.tile.m))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernel reads, in its order."""
        batch, cache = self.batch, self.cache
        return (
            self.q, batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k, self.begin, self.sinks,
            *(self.state or (None, None)), cache.key_cache, cache.k_scale, cache.value_cache, cache.v_scale,
        )  # fmt: skip

    def signature(self, addresses: list[int], tiles: int) -> tuple[object, ...]:
        """Everything that a launch is prepared from; calls with equal ones differ in addresses and numbers alone.

        Triton compiles for 1 and for multiples of 16 apart: of `tiles`; of the splits, which are part of the tile.
        """
        q, state = self.q, self.state
        likeness = self.cache.likeness if self.likeness is None else self.likeness
        return (
            self.tile, self.window, self.interpreted, likeness, q.dtype, q.device, q.shape[1], q.stride(),
            tuple([address & 15 for address in addresses[:8]]), self.begin is None, tiles == 1, tiles & 15 == 0,
            None if state is None else state[0].dtype, None if self.sinks is None else self.sinks.dtype,
        )  # fmt: skip


class DirectLaunch:
    """What is launched for a layer, and all that does not change from one call to the next.

    Attributes:
        constants: of the direct kernel.
    """

    def __init__(self, call: DirectCall) -> None:
        """Prepare the launches for `call` and all that have its signature."""
        cache, tile, g, interpreted = call.cache, call.tile, call.cache.geometry, call.interpreted
        k_pad, v_pad = padded_dims(g)
        qk, pv = _operand_dtypes(call.q.dtype, g.dtype, cache.v_kind, interpreted)
        k_columns, v_columns = k_pad, v_pad
        if qk is not tl.float32 and multiplies_from_shared_memory(call.q.device):
            tile, k_columns, v_columns = alike_operands(tile, k_pad, v_pad)
        self.kv_heads = g.num_kv_heads
        self.tile = tile
        fmt = FORMATS.get(g.dtype)
        k = PoolForm.of(cache.key_cache, g.layout, "key", cache.k_kind)
        v = PoolForm.of(cache.value_cache, g.layout, "value", cache.v_kind)
        layer = LayerForm(
            group=call.q.shape[1] // g.num_kv_heads,
            window=call.window or 0,
            begins=call.begin is not None,
            state=call.state is not None,
            sinks=call.sinks is not None and tile.splits == 1,
            qk=qk,
            pv=pv,
            hardware=not interpreted and (fmt is None or fp8_support(call.q.device)[g.dtype] == "hardware"),
            interpreted=interpreted,
        )
        cut = TileForm(
            m=tile.m,
            n=tile.n,
            k_columns=k_columns,
            v_columns=v_columns,
            same_page=math.gcd(g.page_size, tile.n),
            split=tile.splits > 1,
            stages=tile.num_stages,
        )
        limit = {"maxnreg": tile.registers} if tile.registers and torch.version.cuda and not interpreted else {}
        self.constants: dict[str, Any] = {
            "K": k, "V": v, "CODE": fmt, "LAYER": layer, "TILE": cut, "num_warps": tile.num_warps, **limit,
        }  # fmt: skip
        scales = [(scale.stride_block, scale.stride_head, scale.stride_slot) for scale in cache.scales]
        codes = torch.uint8 if fmt else None
        self._attend = PreparedLaunch(
            direct_kernel, (*(None,) * 10, codes, None, codes, None, None),
            (
                call.q.stride()[:2], pool_strides(cache.key_cache, g.layout, "key", k),
                pool_strides(cache.value_cache, g.layout, "value", v), *scales,
            ),
            self.constants, interpreted,
        )  # fmt: skip
        splits = triton.next_power_of_2(tile.splits)
        self._together = max(1, min(16, 4096 // (splits * v_pad)))
        merged = {
            "Q_HEADS": call.q.shape[1], "V_DIM": g.v_head_dim, "V_PAD": v_pad, "SPLITS": splits, "R": self._together,
            "SINKS": call.sinks is not None, "BY_HAND": interpreted,
        }  # fmt: skip
        self._combine = PreparedLaunch(combine_kernel, (None,) * 5, (), merged, interpreted)

    def __call__(
        self, call: DirectCall, tiles: int, scale_log2: float, tensors: tuple[Tensor | None, ...],
        addresses: list[int], out: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        """Launch: see `direct_attention`; `tiles` are the call's, `out` and `lse` are what it returns."""
        batch, splits = call.batch, self.tile.splits
        n, q_heads, v_dim = out.shape
        sequences, columns = batch.block_table.shape
        max_q = min(batch.max_q, n)
        programs, numbers = (
            (sequences + 1) * tiles * splits * self.kv_heads,
            (sequences, columns, tiles, splits, n, max_q),
        )
        nothing = addresses[2]  # stands in for what is never read
        read = [at or nothing for at in addresses]
        final = out.data_ptr(), lse.data_ptr()
        if splits == 1:
            part, outs = None, final
        else:
            # The parts' rows, then their log-sum-exps, at a multiple of 16 bytes: kernels are compiled for that.
            begin = -(-splits * n * q_heads * v_dim // 4) * 4
            part = lse.new_empty(begin + splits * n * q_heads)
            outs = part.data_ptr(), part.data_ptr() + 4 * begin
        state = read[6:8] if call.state is not None else outs
        order = (*read[:6], *state, *outs, *read[8:], scale_log2)
        sink = read[5]
        combine = (-(-n * q_heads // self._together), (*outs, sink, *final), (n, splits))
        if not self._attend.again(programs, order, numbers):
            views = (out, lse) if part is None else _parts(part, begin, splits, out.shape)
            self._attend(programs, _pointers(tensors, views, scale_log2), order, numbers)
        if part is not None and not self._combine.again(*combine):
            views = _parts(part, begin, splits, out.shape)
            stand_in = batch.cu_seqlens_q if call.sinks is None else call.sinks
            self._combine(combine[0], (*views, stand_in, out, lse), *combine[1:])


def _parts(part: Tensor, begin: int, splits: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The rows and log-sum-exps of each split, of their one allocation."""
    rows = splits * shape[0] * shape[1]
    return part[: rows * shape[2]].view(splits, *shape), part[begin:].view(splits, *shape[:2])


def _pointers(
    tensors: tuple[Tensor | None, ...], outs: tuple[Tensor, Tensor], scale_log2: float
) -> tuple[Tensor | float, ...]:
    """The kernel's pointer arguments as tensors; what it never reads has a stand-in."""
    nothing = tensors[2]
    assert nothing is not None
    read = [nothing if tensor is None else tensor for tensor in tensors]
    state = outs if tensors[6] is None else read[6:8]
    return (*read[:6], *state, *outs, *read[8:], scale_log2)


def _operand_dtypes(q: torch.dtype, pool: torch.dtype, v_kind: str, interpreted: bool) -> tuple[tl.dtype, tl.dtype]:
    """The dtypes in which Q·K and P·V are multiplied; sums are FP32.

    FP16 holds FP8 exactly, and an H100 makes it of FP8 in a third of BF16's instructions. P times a scale that differs
    from key to key can leave FP16's range, not BF16's.
    """
    if interpreted or torch.float32 in (q, pool):
        return tl.float32, tl.float32
    if pool == torch.bfloat16:
        return tl.bfloat16, tl.bfloat16
    return tl.float16, tl.bfloat16 if v_kind in ("per-page-head", "per-token-head") else tl.float16
