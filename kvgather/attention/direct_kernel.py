"""The kernel of attention straight from the pages: FP8 pages in, attended rows out, no BF16 copy of K and V between.

One program serves a tile of rows of one KV head, a row being one (token, query head of the group), so that the group
of query heads shares every K and V that is read. It walks the keys of its sequence in steps of N, through the block
table, with the running maximum and sum of an online softmax. Keys may be split over programs; `combine_kernel` then
merges their partial states.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..kernels.address import head_offset, scale_offset
from ..kernels.load import as_operand, load_block_ids, load_head_scale, load_key_scale, load_rows, load_shuffled_rows
from ..kernels.merge import divisor_of
from ..kernels.softmax import LN2, LOG2E, add_sink, online_softmax_step, visible
from ..kernels.values import round_to, widen


@dataclass(frozen=True)
class LayerForm:
    """What the kernel is compiled for of a layer and of a call.

    Attributes:
        group: query heads of a KV head.
        window: keys that a query sees at most, itself included; 0 is all.
        rank, ranks: which pages of a sequence are in the pool, see `batch.share`; 0 and 1 are all.
        begins: whether sequences begin at a position of their own.
        state: whether rows go on from a partial state.
        sinks: whether a head has a sink that enters here; where keys are split it enters when parts are merged.
        qk, pv: the dtypes in which Q·K and P·V are multiplied.
        hardware: whether the GPU decodes the pools' FP8 format.
        interpreted: whether Triton's interpreter runs the kernel.
    """

    group: int
    window: int
    rank: int
    ranks: int
    begins: bool
    state: bool
    sinks: bool
    qk: tl.dtype
    pv: tl.dtype
    hardware: bool
    interpreted: bool


@dataclass(frozen=True)
class TileForm:
    """What the kernel is compiled for of a `Tile`, for pools of some head dims and page size.

    Attributes:
        m, n: rows, and keys at a time.
        k_columns, v_columns: head dims of K and V, padded.
        same_page: keys from a multiple of this number on that are sure to be in one page.
        split: whether keys are split over programs.
        stages: steps whose loads are under way together.
    """

    m: int
    n: int
    k_columns: int
    v_columns: int
    same_page: int
    split: bool
    stages: int


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
    K: tl.constexpr, V: tl.constexpr,  # PoolForm
    CODE: tl.constexpr,  # Fp8Format; None for floats
    LAYER: tl.constexpr, TILE: tl.constexpr,  # LayerForm, TileForm
):  # fmt: skip
    """out = softmax(scale · q Kᵀ + mask) V, and its log-sum-exp, of one tile of rows over the pages of a sequence.

    Row i at position p_i sees key j if j ≤ p_i, and with a window if j > p_i − window; mask is 0 there, −∞ elsewhere.
    For each step of N keys, with the state (top, total, acc) of `kernels.softmax`:

        s = scale · log2(e) · q Kᵀ + mask                      [M, N]
        top' = max(top, max_j s)    p = 2^(s − top')           [M], [M, N]
        total' = 2^(top − top') · total + Σ_j p                [M]
        acc' = 2^(top − top') · acc + p V                      [M, V_DIM]

    and at the end out = acc / total. Scales of K and V that are the same for all keys are factors of the rows.

    Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), tiled as in FlashAttention
    (arXiv:2205.14135); keys are split over programs as in Flash-Decoding.
    """
    # Neighbouring programs take the heads of one range of keys: in NHD these are next to each other in memory.
    program = tl.program_id(0)
    kv_head = program % K.num_heads
    split = (program // K.num_heads) % splits
    tile = (program // (K.num_heads * splits)) % tiles
    sequence = program // (K.num_heads * splits * tiles)
    GROUP: tl.constexpr = LAYER.group
    M: tl.constexpr = TILE.m
    N: tl.constexpr = TILE.n
    # Compared here, once for every mask of V's columns: a comparison in the loop made a kernel spill 16 bytes.
    v_in_head = tl.arange(0, TILE.v_columns) < V.dim

    first_q = tl.load(cu_q_ptr + sequence)  # at num_sequences: the end of the last sequence
    spare = sequence == num_sequences  # rows that belong to no sequence: 0
    end_q = tl.load(cu_q_ptr + sequence + 1, mask=sequence < num_sequences, other=0)
    if spare | (end_q - first_q > max_q):  # or more than its tiles have room for: NaN
        end_q = tl.where(spare, total_q, end_q)
        split_row = split * total_q.to(tl.int64)
        _fill_rows(
            out_ptr, lse_ptr, sink_ptr, spare, first_q, end_q, tile, tiles, split_row, kv_head, V, LAYER, TILE
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
    lowest = position  # and with a window from this one on, where it is not computed from `position`

    first_position = len_k - rows // GROUP + (tile * M) // GROUP
    last_position = len_k - rows // GROUP + (tl.minimum(tile * M + M, rows) - 1) // GROUP
    lowest_of_all = first_position - LAYER.window + 1
    if LAYER.ranks > 1:  # from here on positions count this rank's keys alone
        lowest = _held(position - LAYER.window + 1, K, LAYER)
        lowest_of_all = _held(lowest_of_all, K, LAYER)
        position = _held(position + 1, K, LAYER) - 1
        first_position = _held(first_position + 1, K, LAYER) - 1
        last_position = _held(last_position + 1, K, LAYER) - 1
    start, full, end, past_table = _visible_keys(
        begin_ptr, sequence, first_position, last_position, lowest_of_all, len_k, columns, K, LAYER
    )  # fmt: skip
    low, end = _keys_of_split(start, end, split, splits, TILE)

    q_row = (first_q + token).to(tl.int64) * q_strides[0] + q_head.to(tl.int64) * q_strides[1]
    q = _load_queries(q_ptr, q_row, in_use, K, LAYER, TILE)
    k_scale = load_head_scale(k_scale_ptr, kv_head, k_scale_strides, K)
    q, row_scale = _scale_queries(q, scale_log2, k_scale, LAYER, TILE)
    v_scale = load_head_scale(v_scale_ptr, kv_head, v_scale_strides, V)
    out_row = (first_q + token).to(tl.int64) * (K.num_heads * GROUP) + q_head
    top, total, acc = _load_state(state_out_ptr, state_lse_ptr, out_row, in_use, split, v_scale, V, LAYER, TILE)
    worst = tl.zeros([N], tl.int32)  # below zero once a block was bad

    k_pool = _head_of_pool(k_ptr, k_scale_ptr, k_strides, k_scale_strides, kv_head, K)
    v_pool = _head_of_pool(v_ptr, v_scale_ptr, v_strides, v_scale_strides, kv_head, V)
    table_ptr += sequence.to(tl.int64) * columns
    keys, queries, state = (table_ptr, start, end), (q, row_scale, position, lowest), (top, total, acc, worst)
    whole = _end_of_whole_steps(low, start, full, end, LAYER, TILE)
    # First the steps in which every row sees every key, then those with a mask.
    for MASKED in tl.static_range(1 if LAYER.window > 0 else 0, 2):
        first, last = low, whole
        if MASKED:
            first, last = whole, end
        for step in tl.range(first // N, tl.cdiv(last, N), num_stages=TILE.stages):
            state = _attend(state, queries, step * N, keys, k_pool, v_pool, K, V, CODE, LAYER, TILE, MASKED)
    top, total, acc, worst = state
    acc *= v_scale

    if past_table | (tl.min(worst, 0) < 0):  # a key in no block: whoever sees it is NaN
        bad = _sees_bad_block(keys, position, lowest, low, columns, K, LAYER, TILE)
        total = tl.where(bad > 0, float("nan"), total)
    out, lse = _finish(sink_ptr, q_head, in_use, top, total, acc, LAYER)
    if TILE.split:
        out_row += split * total_q.to(tl.int64) * (K.num_heads * GROUP)
    _store_rows(out_ptr, lse_ptr, out, lse, out_row, in_use, v_in_head, V, LAYER, TILE)


@triton.jit
def _visible_keys(
    begin_ptr, sequence, first_position, last_position, lowest, len_k, columns,
    POOL: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """The keys that the rows of a tile see, whose tokens have the positions from the first to the last.

    `lowest` is the first key in the window of the first row.

    Returns:
        start, full, end: some row sees a key in [start, end); every row sees all in [start, full).
        past_table: whether some row sees keys past the block table's last column.
    """
    end = tl.minimum(last_position + 1, len_k)
    past_table = end > columns * POOL.page_size
    end = tl.minimum(end, columns * POOL.page_size)
    start = 0
    if LAYER.begins:
        start = tl.load(begin_ptr + sequence)
    full = tl.minimum(first_position + 1, end)
    if LAYER.window > 0:
        start = tl.maximum(start, lowest)
        full = start
    return start, full, end, past_table


@triton.jit
def _held(tokens, POOL: tl.constexpr, LAYER: tl.constexpr):
    """How many of a sequence's first tokens are in this rank's pool; the twin of `batch.share.Share.held`."""
    PAGE: tl.constexpr = POOL.page_size
    tokens = tl.maximum(tokens, 0)
    rest = tokens % (PAGE * LAYER.ranks) - LAYER.rank * PAGE
    return tokens // (PAGE * LAYER.ranks) * PAGE + tl.minimum(tl.maximum(rest, 0), PAGE)


@triton.jit
def _sees(key, position, lowest, present, LAYER: tl.constexpr):
    """Which of N keys each of M rows sees, `[M, N]`."""
    if LAYER.ranks > 1 and LAYER.window > 0:
        return visible(key, position, present, 0) & (key[None, :] >= lowest[:, None])
    else:
        return visible(key, position, present, LAYER.window)


@triton.jit
def _keys_of_split(start, end, split, splits, TILE: tl.constexpr):
    """The share [low, end) of one split of the keys [start, end); its steps begin at multiples of N from low on."""
    low = (start // TILE.n) * TILE.n
    if TILE.split:
        share = tl.cdiv(tl.cdiv(end - low, TILE.n), splits) * TILE.n
        low += split * share
        end = tl.minimum(end, low + share)
    return low, end


@triton.jit
def _end_of_whole_steps(low, start, full, end, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Where steps from `low` on begin to need a mask: up to there, every row sees every key; `low` if nowhere."""
    whole = low
    if LAYER.window == 0:
        whole = tl.maximum(low, tl.minimum(full, end) // TILE.n * TILE.n)
        if LAYER.begins:
            whole = tl.where(start > low, low, whole)  # the first step has keys before `start`
    return whole


@triton.jit
def _head_of_pool(pool_ptr, scale_ptr, strides, scale_strides, head, POOL: tl.constexpr):
    """One head of a pool and of its scales: pointers and strides, as `_attend` takes them."""
    pool_ptr += head_offset(head.to(tl.int64), strides, POOL)
    scale_ptr += scale_offset(0, head.to(tl.int64), 0, scale_strides)
    return pool_ptr, scale_ptr, strides, scale_strides


@triton.jit
def _load_queries(q_ptr, q_row, in_use, K: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr):
    """The rows of q, `[M, K_DIM]`, whose offsets are `q_row`; 0 past head_dim and in rows that are not in use."""
    dim = tl.arange(0, TILE.k_columns)
    mask = in_use[:, None] & (dim < K.dim)[None, :]
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=mask, other=0.0)
    if LAYER.interpreted:
        q = widen(q, None, False)
    return q


@triton.jit
def _scale_queries(q, scale_log2, k_scale, LAYER: tl.constexpr, TILE: tl.constexpr):
    """q as an operand of a dot, `[M, K_DIM]`, and what its products with K's elements are multiplied by, `[M]`.

    Scores in base 2 are `row_scale * (q · k)`: `row_scale` is the softmax scale times log2 e times the scale of K's
    head, and for FP16 operands times what q was divided by.
    """
    M: tl.constexpr = TILE.m
    row_scale = tl.full([M], 1.0, tl.float32) * scale_log2
    row_scale *= k_scale
    if LAYER.qk == tl.bfloat16:
        return q.to(LAYER.qk), row_scale
    else:
        # Each row is divided by its largest element, so that FP16 holds it whatever its range; and what scores are
        # multiplied by is a power of two, so that the largest less itself is 0 also where the product is fused.
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        row_scale *= largest
        power = (row_scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 1.1754943508222875e-38)
        q = (q.to(tl.float32) / largest[:, None] * (row_scale / power)[:, None]).to(LAYER.qk)
        return q, power


@triton.jit
def _load_state(
    state_out_ptr, state_lse_ptr, out_row, in_use, split, v_scale,
    V: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """top `[M]`, total `[M]` and acc `[M, V_DIM]` before the first key: empty, or for the first split a given state.

    A state's rows are those of keys before `begin`; where its log-sum-exp is −inf its output may be anything. `acc` is
    in units of V's elements: it is multiplied by V's scale at the end.
    """
    M: tl.constexpr = TILE.m
    COLUMNS: tl.constexpr = TILE.v_columns
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, COLUMNS], tl.float32)
    if LAYER.state:
        if split == 0:
            dim = tl.arange(0, COLUMNS)
            lse = tl.load(state_lse_ptr + out_row, mask=in_use, other=float("-inf"))
            seen = lse != float("-inf")
            mask = (in_use & seen)[:, None] & (dim < V.dim)[None, :]
            out = tl.load(state_out_ptr + out_row[:, None] * V.dim + dim[None, :], mask=mask, other=0.0)
            if LAYER.interpreted:
                out = widen(out, None, False)
            acc = out.to(tl.float32) / v_scale
            top = lse * LOG2E
            total = tl.where(seen, 1.0, 0.0)
    return top, total, acc


@triton.jit
def _attend(
    state, queries, first_key, keys, k_pool, v_pool,
    K: tl.constexpr, V: tl.constexpr, CODE: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add N keys to the state of a tile: scores, softmax, values.

    Args:
        state: top `[M]`, total `[M]`, acc `[M, V_DIM]`; worst `[N]`, the least block id so far.
        queries: q `[M, K_DIM]`, the scale of scores `[M]`, positions `[M]`, and with ranks the windows' first `[M]`.
        first_key: a multiple of N.
        keys: the table's row of the sequence, start and end of the keys that some row sees.
        k_pool, v_pool: pointer, scale's pointer, strides and scale's strides of a head.
        MASKED: whether some row does not see some of the keys.

    Returns:
        The state with these keys.
    """
    top, total, acc, worst = state
    q, row_scale, position, lowest = queries
    table_ptr, start, end = keys
    k_ptr, k_scale_ptr, k_strides, k_scale_strides = k_pool
    v_ptr, v_scale_ptr, v_strides, v_scale_strides = v_pool
    N: tl.constexpr = TILE.n
    SAME_PAGE: tl.constexpr = TILE.same_page
    HARDWARE: tl.constexpr = LAYER.hardware

    key = first_key + tl.arange(0, N)
    present = key < end
    block_id = load_block_ids(table_ptr, key, present, K, MASKED)
    worst = tl.minimum(worst, block_id)
    good = block_id >= 0
    if MASKED and (LAYER.begins or LAYER.window > 0):
        present = present & (key >= start)  # nothing is read that no row sees
    block_id = tl.max_constancy(tl.maximum(block_id, 0), [SAME_PAGE])
    page_offset = key % K.page_size

    k = as_operand(
        load_rows(k_ptr, block_id, page_offset, present, k_strides, K, TILE.k_columns, MASKED), CODE, HARDWARE, LAYER.qk
    )
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if K.kind == "per-page-head" or K.kind == "per-token-head":
        k_scale = load_key_scale(k_scale_ptr, block_id, page_offset, present, k_scale_strides, K, MASKED)
        scores *= k_scale[None, :]
    if MASKED:
        scores = tl.where(_sees(key, position, lowest, present, LAYER), scores, float("-inf"))
    p, kept, top, total = online_softmax_step(scores, row_scale, top, total, MASKED)
    acc = acc * kept[:, None]

    if V.kind == "per-page-head" or V.kind == "per-token-head":
        p *= load_key_scale(v_scale_ptr, block_id, page_offset, present, v_scale_strides, V, MASKED)[None, :]
    if V.slots_per_group > 1:
        v = load_shuffled_rows(v_ptr, table_ptr, first_key, end, present, v_strides, V, N, TILE.v_columns, MASKED)
    else:
        v = load_rows(v_ptr, block_id, page_offset, present, v_strides, V, TILE.v_columns, MASKED)
    if MASKED:  # a bad block may hold NaN, and 0 times that would be NaN in rows that do not see it
        v = tl.where(good[:, None], v, tl.zeros_like(v))
    v = as_operand(v, CODE, HARDWARE, LAYER.pv)
    acc = tl.dot(p.to(LAYER.pv), v, acc, input_precision="ieee")
    return top, total, acc, worst


@triton.jit
def _sees_bad_block(
    keys, position, lowest, low, columns, POOL: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Whether each row of a tile sees a key in a bad block, or past the block table: 1 or 0, `[M]`."""
    table_ptr, start, end = keys
    bad = (position >= columns * POOL.page_size).to(tl.int32)
    for step in range(low // TILE.n, tl.cdiv(end, TILE.n)):
        key = step * TILE.n + tl.arange(0, TILE.n)
        present = (key >= start) & (key < end)
        present = present & (load_block_ids(table_ptr, key, present, POOL, True) < 0)
        bad = tl.maximum(bad, tl.max(_sees(key, position, lowest, present, LAYER).to(tl.int32), 1))
    return bad


@triton.jit
def _finish(sink_ptr, q_head, in_use, top, total, acc, LAYER: tl.constexpr):
    """Output `[M, V_DIM]` and natural log-sum-exp `[M]` of rows that saw all their keys: the sink enters, acc / total.

    `kernels.merge.log_sum_exp` would choose −inf for rows that saw no key; here `top` is −inf already.
    """
    if LAYER.sinks:
        sink = tl.load(sink_ptr + q_head, mask=in_use, other=float("-inf")).to(tl.float32)
        unseen = total == 0
        top, total, acc = add_sink(sink, top, total, acc)
    divisor = divisor_of(total)
    out = acc / divisor[:, None]
    lse = top * LN2 + tl.log(divisor)
    if LAYER.sinks:
        lse = tl.where(unseen, sink, lse)  # the sink's own bits, as on the other paths
    return out, lse


@triton.jit
def _store_rows(
    out_ptr, lse_ptr, out, lse, out_row, in_use, in_head, V: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store rows `[M, V_DIM]`, rounded to the output's dtype, and their log-sum-exp `[M]`."""
    dim = tl.arange(0, TILE.v_columns)
    mask = in_use[:, None] & in_head[None, :]
    out = round_to(out, out_ptr.dtype.element_ty, LAYER.interpreted)
    tl.store(out_ptr + out_row[:, None] * V.dim + dim[None, :], out, mask=mask)
    tl.store(lse_ptr + out_row, lse, mask=in_use)


@triton.jit
def _fill_rows(
    out_ptr, lse_ptr, sink_ptr, spare, first_q, end_q, tile, tiles, split_row, kv_head,
    V: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Set a KV head's rows of the tokens [first_q, end_q), every `tiles`-th tile of them from `tile` on.

    Spare rows, which belong to no sequence, become 0, and −inf or the sink; others, of a sequence that has more rows
    than the batch has tiles for, become NaN. `split_row` is the token, int64, at which the rows of the split begin.
    """
    GROUP: tl.constexpr = LAYER.group
    M: tl.constexpr = TILE.m
    COLUMNS: tl.constexpr = TILE.v_columns
    out_value = tl.where(spare, 0.0, float("nan"))
    lse_value = tl.where(spare, float("-inf"), float("nan"))
    dim = tl.arange(0, COLUMNS)
    row = first_q.to(tl.int64) * GROUP + tile * M + tl.arange(0, M)
    end = end_q.to(tl.int64) * GROUP
    while tl.min(row, 0) < end:
        in_use = row < end
        out_row = (split_row + row // GROUP) * (V.num_heads * GROUP) + kv_head * GROUP + row % GROUP
        out = (tl.zeros([M, COLUMNS], tl.float32) + out_value).to(out_ptr.dtype.element_ty)
        mask = in_use[:, None] & (dim < V.dim)[None, :]
        tl.store(out_ptr + out_row[:, None] * V.dim + dim[None, :], out, mask=mask)
        lse = tl.zeros([M], tl.float32) + lse_value
        if LAYER.sinks:
            sink = tl.load(sink_ptr + kv_head * GROUP + row % GROUP, mask=in_use, other=float("-inf")).to(tl.float32)
            lse = tl.where(lse == float("-inf"), sink, lse)
        tl.store(lse_ptr + out_row, lse, mask=in_use)
        row += tiles * M
