"""Attention straight from the paged cache: FP8 pages in, attended rows out, no BF16 copy of K and V in between.

One program serves a tile of rows of one KV head, a row being one (token, query head of the group), so that the group
of query heads shares every K and V that is read. It walks the keys of its sequence in steps of N, through the block
table, with the running maximum and sum of an online softmax. Keys may be split over programs; `combine_kernel` then
merges their partial states.
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
from ..kernels.launch import LoadStrides, PreparedLaunch, prepared_once
from ..kernels.load import as_operand, load_key_scale, load_rows, load_shuffled_rows
from ..kernels.values import round_to, widen
from .tiles import Tile, alike_operands, choose_tile, multiplies_from_shared_memory, padded_dims

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _fill_rows(
    out_ptr, lse_ptr, sink_ptr, first, end, step, split_row, kv_head, out_value, lse_value,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr, M: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Set the rows first, …, first + M − 1 of a KV head, then those `step` on, as far as `end`; a row is one (token,
    query head of the group), all int64. `split_row` is the token at which the split's own rows begin. With SINKS a
    log-sum-exp of −inf becomes the sink."""
    dim = tl.arange(0, V_PAD)
    row = first + tl.arange(0, M)
    while tl.min(row, 0) < end:
        mine = row < end
        at = (split_row + row // GROUP) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
        tl.store(
            out_ptr + at[:, None] * V_DIM + dim[None, :],
            (tl.zeros([M, V_PAD], tl.float32) + out_value).to(out_ptr.dtype.element_ty),
            mask=mine[:, None] & (dim < V_DIM)[None, :],
        )
        lse = tl.zeros([M], tl.float32) + lse_value
        if SINKS:
            sink = tl.load(sink_ptr + kv_head * GROUP + row % GROUP, mask=mine, other=float("-inf")).to(tl.float32)
            lse = tl.where(lse == float("-inf"), sink, lse)
        tl.store(lse_ptr + at, lse, mask=mine)
        row += step


# One compiled kernel serves every batch, but for the classes of `tiles` and `splits` (1, or a multiple of 16): without
# them the decode kernel spills 20 bytes, and is 2 to 3 % slower (H100).
@triton.jit(do_not_specialize=["num_sequences", "columns", "total_q", "max_q"])
def direct_kernel(
    q_ptr, table_ptr, cu_q_ptr, cu_k_ptr, begin_ptr, sink_ptr, state_out_ptr, state_lse_ptr, out_ptr, lse_ptr,
    k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, scale_log2,
    num_sequences, columns, tiles, splits, total_q, max_q,
    q_strides,  # row, head
    k_strides, v_strides,  # block, head, slot group, slot, dim group, dim
    k_scale_strides, v_scale_strides,  # block, head, slot
    PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SAME_PAGE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    BEGINS: tl.constexpr, STATE: tl.constexpr, SINKS: tl.constexpr,
    V_SLOTS_PER_GROUP: tl.constexpr, K_DIMS_PER_GROUP: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, K_WIDE: tl.constexpr, V_WIDE: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the heads of one range of keys: in NHD these lie side by side in memory.
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    split = (program // KV_HEADS) % splits
    tile = (program // (KV_HEADS * splits)) % tiles
    sequence = program // (KV_HEADS * splits * tiles)
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP
    dim_v = tl.arange(0, V_PAD)
    dims_v = dim_v < V_DIM

    first_q = tl.load(cu_q_ptr + sequence)  # at num_sequences: the end of the last sequence
    spare = sequence == num_sequences  # rows that belong to no sequence: 0
    end_q = tl.load(cu_q_ptr + sequence + 1, mask=sequence < num_sequences, other=0)
    if spare | (end_q - first_q > max_q):  # or more than its tiles have room for: NaN
        _fill_rows(
            out_ptr, lse_ptr, sink_ptr,
            first_q.to(tl.int64) * GROUP + tile * M, tl.where(spare, total_q, end_q).to(tl.int64) * GROUP, tiles * M,
            split * total_q.to(tl.int64), kv_head,
            tl.where(spare, 0.0, float("nan")), tl.where(spare, float("-inf"), float("nan")),
            KV_HEADS, GROUP, V_DIM, V_PAD, M, SINKS and not SPLIT,
        )  # fmt: skip
        return
    rows = (end_q - first_q) * GROUP
    if tile * M >= rows:
        return
    len_k = tl.load(cu_k_ptr + sequence + 1) - tl.load(cu_k_ptr + sequence)
    row = tile * M + tl.arange(0, M)
    token = row // GROUP
    q_head = kv_head * GROUP + row % GROUP
    in_use = row < rows
    position = len_k - rows // GROUP + token  # [M]: a query sees keys up to its own position

    # The keys [start, end) that some row of the tile sees; below `full` every row sees all of them.
    first_position = len_k - rows // GROUP + (tile * M) // GROUP
    last_row = tl.minimum(tile * M + M, rows) - 1
    end = tl.minimum(len_k - rows // GROUP + last_row // GROUP + 1, len_k)
    past_table = end > columns * PAGE
    end = tl.minimum(end, columns * PAGE)
    start = 0
    if BEGINS:
        start = tl.load(begin_ptr + sequence)
    full = tl.minimum(first_position + 1, end)
    if WINDOW > 0:
        start = tl.maximum(start, first_position - WINDOW + 1)
        full = start
    low = (start // N) * N
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - low, N), splits) * N
        low += split * share
        end = tl.minimum(end, low + share)

    dim = tl.arange(0, K_PAD)
    dims = dim < K_DIM
    q_at = (first_q + token).to(tl.int64) * q_strides[0] + q_head.to(tl.int64) * q_strides[1]
    q = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=in_use[:, None] & dims[None, :], other=0.0)
    if INTERPRETED:
        q = widen(q, None, False)
    row_scale = tl.full([M], 1.0, tl.float32) * scale_log2
    if K_KIND == "per-tensor":
        row_scale *= tl.load(k_scale_ptr)
    elif K_KIND == "per-head":
        row_scale *= tl.load(k_scale_ptr + kv_head.to(tl.int64) * k_scale_strides[1])
    if QK == tl.bfloat16:
        q = q.to(QK)
    else:
        # Each row is divided by its largest element, so that FP16 holds it whatever its range; and what scores are
        # multiplied by is a power of two, so that the largest less itself is 0 also where the product is fused.
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        row_scale *= largest
        power = (row_scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 1.1754943508222875e-38)
        q = (q.to(tl.float32) / largest[:, None] * (row_scale / power)[:, None]).to(QK)
        row_scale = power
    v_scale = 1.0
    if V_KIND == "per-tensor":
        v_scale = tl.load(v_scale_ptr)
    elif V_KIND == "per-head":
        v_scale = tl.load(v_scale_ptr + kv_head.to(tl.int64) * v_scale_strides[1])

    out_at = (first_q + token).to(tl.int64) * Q_HEADS + q_head
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V_PAD], tl.float32)
    if STATE:
        if split == 0:
            lse = tl.load(state_lse_ptr + out_at, mask=in_use, other=float("-inf"))
            held = tl.load(
                state_out_ptr + out_at[:, None] * V_DIM + dim_v[None, :],
                mask=(in_use & (lse != float("-inf")))[:, None] & dims_v[None, :],
                other=0.0,
            )
            if INTERPRETED:
                held = widen(held, None, False)
            acc = held.to(tl.float32) / v_scale
            top = lse * LOG2E
            total = tl.where(lse != float("-inf"), 1.0, 0.0)

    k_ptr += kv_head.to(tl.int64) * k_strides[1] * K_ALIGN
    v_ptr += kv_head.to(tl.int64) * v_strides[1] * V_ALIGN
    k_scale_ptr += kv_head.to(tl.int64) * k_scale_strides[1]
    v_scale_ptr += kv_head.to(tl.int64) * v_scale_strides[1]
    table_ptr += sequence.to(tl.int64) * columns
    worst = tl.zeros([N], tl.int32)  # below zero once a block was bad

    # First the steps in which every row sees every key, then those with a mask.
    whole = low
    if WINDOW == 0:
        whole = tl.maximum(low, tl.minimum(full, end) // N * N)
        if BEGINS:
            whole = tl.where(start > low, low, whole)  # the first step has keys before `start`
    for MASKED in tl.static_range(1 if WINDOW > 0 else 0, 2):
        for step in tl.range((whole if MASKED else low) // N, tl.cdiv(end if MASKED else whole, N), num_stages=STAGES):
            key = step * N + tl.arange(0, N)
            present = key < end
            if MASKED:
                ids = tl.load(table_ptr + key // PAGE, mask=present, other=0)
            else:
                ids = tl.load(table_ptr + key // PAGE)
            worst = tl.minimum(worst, ids)
            good = ids >= 0
            if MASKED and (BEGINS or WINDOW > 0):
                present = present & (key >= start)  # nothing is read that no row sees
            ids = tl.max_constancy(tl.maximum(ids, 0), [SAME_PAGE])
            slot = key % PAGE
            k = load_rows(
                k_ptr, ids, key, dim, present, dims, k_strides,
                PAGE, K_DIMS_PER_GROUP, K_ALIGN, K_WIDE, MASKED, K_PAD > K_DIM, CODE is not None,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(as_operand(k, CODE, HARDWARE, QK)), input_precision="ieee")
            if K_KIND == "per-page-head" or K_KIND == "per-token-head":
                k_scale = load_key_scale(k_scale_ptr, ids, slot, present, k_scale_strides, K_KIND, MASKED)
                scores *= k_scale[None, :]
            if MASKED:
                seen = present[None, :] & (key[None, :] <= position[:, None])
                if WINDOW > 0:
                    seen = seen & (key[None, :] > position[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * row_scale)
            if MASKED:
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may have seen no key yet
            else:
                shift = new_top
            p = tl.exp2(scores * row_scale[:, None] - shift[:, None])
            kept = tl.exp2(top - shift)
            total = total * kept + tl.sum(p, 1)
            acc = acc * kept[:, None]
            if V_KIND == "per-page-head" or V_KIND == "per-token-head":
                key_scale = load_key_scale(v_scale_ptr, ids, slot, present, v_scale_strides, V_KIND, MASKED)
                p *= key_scale[None, :]
            if V_SLOTS_PER_GROUP > 1:
                v = load_shuffled_rows(
                    v_ptr, table_ptr, step * N, end, dim_v, present, dims_v, v_strides,
                    PAGE, N, V_SLOTS_PER_GROUP, V_ALIGN, V_WIDE, MASKED, V_PAD > V_DIM, CODE is not None,
                )  # fmt: skip
            else:
                v = load_rows(
                    v_ptr, ids, key, dim_v, present, dims_v, v_strides,
                    PAGE, 1, V_ALIGN, V_WIDE, MASKED, V_PAD > V_DIM, CODE is not None,
                )  # fmt: skip
            if MASKED:  # a bad block may hold NaN, and 0 times that would be NaN in rows that do not see it
                v = tl.where(good[:, None], v, tl.zeros_like(v))
            v = as_operand(v, CODE, HARDWARE, PV)
            acc = tl.dot(p.to(PV), v, acc, input_precision="ieee")
            top = new_top

    acc *= v_scale
    if past_table | (tl.min(worst, 0) < 0):  # a key in no block: whoever sees it is NaN
        bad = (position >= columns * PAGE).to(tl.int32)
        for step in range(low // N, tl.cdiv(end, N)):
            key = step * N + tl.arange(0, N)
            present = (key >= start) & (key < end)
            present = present & (tl.load(table_ptr + key // PAGE, mask=present, other=0) < 0)
            seen = present[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            bad = tl.maximum(bad, tl.max(seen.to(tl.int32), 1))
        total = tl.where(bad > 0, float("nan"), total)
    if SINKS and not SPLIT:
        sink = tl.load(sink_ptr + q_head, mask=in_use, other=float("-inf")).to(tl.float32)
        blind = total == 0
        new_top = tl.maximum(top, sink * LOG2E)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        kept = tl.exp2(top - shift)
        total = total * kept + tl.exp2(sink * LOG2E - shift)
        acc *= kept[:, None]
        top = new_top
    total = tl.where(total == 0, 1.0, total)  # no key was seen: 0, and −inf, which is `top`
    out = acc / total[:, None]
    lse = top * LN2 + tl.log(total)
    if SINKS and not SPLIT:
        lse = tl.where(blind, sink, lse)  # the very number, as on the other paths
    if SPLIT:
        out_at += split * total_q.to(tl.int64) * Q_HEADS
    out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + out_at[:, None] * V_DIM + dim_v[None, :], out, mask=in_use[:, None] & dims_v[None, :])
    tl.store(lse_ptr + out_at, lse, mask=in_use)


@triton.jit(do_not_specialize=["total_q", "splits"])
def combine_kernel(
    part_ptr, part_lse_ptr, sink_ptr, out_ptr, lse_ptr, total_q, splits,
    Q_HEADS: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Merge the parts that splits found, `[splits, total_q, Q_HEADS, V_DIM]`; the sink enters here, once.

    All of a row's parts are loaded together: one wait for memory, not one for each part.
    """
    rows = total_q.to(tl.int64) * Q_HEADS
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, V_PAD)
    in_use = row < rows
    at = split[None, :].to(tl.int64) * rows + row[:, None]  # [R, SPLITS]
    here = in_use[:, None] & (split < splits)[None, :]
    part_lse = tl.load(part_lse_ptr + at, mask=here, other=float("-inf"))
    mask = here[:, :, None] & (dim < V_DIM)[None, None, :]
    part = tl.load(part_ptr + at[:, :, None] * V_DIM + dim[None, None, :], mask=mask, other=0.0)
    top = tl.max(part_lse, 1)
    if SINKS:
        sink = tl.load(sink_ptr + row % Q_HEADS, mask=in_use, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_lse - top[:, None])
    total = tl.sum(weight, 1)
    if SINKS:
        total += tl.exp(sink - top)
    acc = tl.sum(tl.where((part_lse > float("-inf"))[:, :, None], weight[:, :, None] * part, 0.0), 1)
    lse = tl.where(total == 0, float("-inf"), top + tl.log(tl.where(total == 0, 1.0, total)))
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    mask = in_use[:, None] & (dim < V_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * V_DIM + dim[None, :], round_to(out, out_ptr.dtype.element_ty, BY_HAND), mask=mask)
    tl.store(lse_ptr + row, lse, mask=in_use)


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
        group = call.q.shape[1] // g.num_kv_heads
        self.kv_heads = g.num_kv_heads
        self.tile = tile
        fmt = FORMATS.get(g.dtype)
        k, v = LoadStrides.of(cache.key_cache, g.layout, "key"), LoadStrides.of(cache.value_cache, g.layout, "value")
        limit = {"maxnreg": tile.registers} if tile.registers and torch.version.cuda and not interpreted else {}
        self.constants: dict[str, Any] = {
            "PAGE": g.page_size, "KV_HEADS": g.num_kv_heads, "GROUP": group,
            "K_DIM": g.head_dim, "V_DIM": g.v_head_dim, "K_PAD": k_columns, "V_PAD": v_columns,
            "M": tile.m, "N": tile.n, "SAME_PAGE": math.gcd(g.page_size, tile.n), "SPLIT": tile.splits > 1,
            "WINDOW": call.window or 0,
            "BEGINS": call.begin is not None, "STATE": call.state is not None, "SINKS": call.sinks is not None,
            "V_SLOTS_PER_GROUP": v.slots_per_group, "K_DIMS_PER_GROUP": k.dims_per_group,
            "K_ALIGN": k.align, "V_ALIGN": v.align, "K_WIDE": k.extent >= 2**31, "V_WIDE": v.extent >= 2**31,
            "K_KIND": cache.k_kind, "V_KIND": cache.v_kind,
            "CODE": fmt,
            "HARDWARE": not interpreted and (fmt is None or fp8_support(call.q.device)[g.dtype] == "hardware"),
            "QK": qk, "PV": pv, "INTERPRETED": interpreted, "STAGES": tile.num_stages,
            "num_warps": tile.num_warps, **limit,
        }  # fmt: skip
        scales = [(scale.stride_block, scale.stride_head, scale.stride_slot) for scale in cache.scales]
        codes = torch.uint8 if fmt else None
        self._attend = PreparedLaunch(
            direct_kernel, (*(None,) * 10, codes, None, codes, None, None),
            (call.q.stride()[:2], k.strides, v.strides, *scales), self.constants, interpreted,
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
