"""The kernel of attention from FP8 pages on Hopper, in Gluon: layouts, barriers and warpgroups are explicit.

A program serves 64 or 128 rows of one KV head, a row being one (token, query head of the group). Producer warpgroups
load pages, 16 bytes at once, convert each code to FP16 once, and store tiles of 128 keys in the swizzle that `wgmma`
reads; mbarriers say for each tile when it is full and when it is empty. Two consumer warpgroups multiply from these
tiles, with the online softmax in between. Each has 64 of 128 rows; or both have the same 64 rows, each has every other
tile, and their partial results are merged at the end. Steps run from the last keys to the first, so that the steps with
a mask come first.

Codes wait for their conversion in registers, or, if reading the pages takes longest, in shared memory (`cp.async`),
where more of them can be on their way. With many rows this is slower: products and tiles already use most of the shared
memory's bandwidth.

The formula is that of `attention.direct_kernel`, which is the specification: out, log-sum-exp, sinks, empty rows and
rows that see a bad block are the same. Requirements are in `plan.runs`.

What machine code (ptxas 12.8 and 13.0) required:

- Pages are loaded as int32 words and converted by one inline assembly a word: codes that are carried around a loop as
  bytes cost 1,336 PRMT and 4.4 KB of spills. P is carried as words for the same reason: as FP16 it cost 64 PRMT.
- ptxas moves `wgmma.wait_group 0` before the softmax, so that P V overlaps with nothing. A branch prevents this: a
  second wait on a barrier that is complete.
- `gl.max` and `gl.sum` along a row are one chain of instructions that wait for each other. Trees, and sums that are
  added across threads only at the end, took 8 % of the time away for dim 64.
- A tile that comes from shared memory is converted in parts. Whole, it spilled 240 bytes with head dim 128.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

N = gl.constexpr(128)
"""Keys of a tile."""
M = gl.constexpr(64)
"""Rows of a consumer."""
PARTS = gl.constexpr(4)
"""Number of parts in which a tile that comes from shared memory is converted."""
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def page_layout(words, rows=128):
    """Layout of `[rows, words]` words of 4 codes: a thread has 16 bytes of a row; swizzled stores have no conflicts."""
    reg, lane = [[0, 1], [0, 2]], [[0, 4], [0, 8], [1, 0]]
    if words == 32:
        lane += [[0, 16], [2, 0]]
        row = 4
    else:
        lane += [[2, 0], [4, 0]]
        row = 8
    warp = [[row, 0], [2 * row, 0]]
    row *= 4
    while row < rows:
        reg.append([row, 0])
        row *= 2
    shape = [rows, words]
    return gl.DistributedLinearLayout(reg_bases=reg, lane_bases=lane, warp_bases=warp, block_bases=[], shape=shape)


@gluon.constexpr_function
def copied_layout(words):
    """Layout of `[128, words]` words in shared memory: 16 bytes of each thread of `page_layout` are side by side."""
    pages = page_layout(words)
    reg, lane, warp = (list(bases) for bases in (pages.reg_bases, pages.lane_bases, pages.warp_bases))
    return gl.SharedLinearLayout(reg[:2] + lane + warp + reg[2:])


@gluon.constexpr_function
def row_layout(dim):
    """Layout of `[rows, dim]` 16-bit elements in memory: a thread has 16 bytes of a row."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def _load_blocks(table_ptr, first, end, LAYER: gl.constexpr, CHECKED: gl.constexpr):
    """Block ids of 128 keys from `first` on, `[128]`; if CHECKED, keys past the end are the last one."""
    key = gl.arange(0, N, gl.SliceLayout(1, page_layout(LAYER.dim // 4)))
    if CHECKED or N % LAYER.page_size != 0:
        key = gl.minimum(first + key, end - 1) if CHECKED else first + key
        return gl.load(table_ptr + key // LAYER.page_size)
    else:
        return gl.load(table_ptr + first // LAYER.page_size + key // LAYER.page_size)


@gluon.jit
def _words_of(pool, block, first, end, LAYER: gl.constexpr, CHECKED: gl.constexpr):
    """Pointers to the words of 128 keys from `first` on, four codes each, `[128, dim / 4]`; block 0 for bad blocks.

    Args:
        pool: pointer to the head's words, and strides of blocks and slots in units of 16 bytes.
        block: the keys' block ids.
        CHECKED: whether keys may be past the end; they are then the last one.
    """
    L: gl.constexpr = page_layout(LAYER.dim // 4)
    pool_ptr, strides = pool
    key = gl.arange(0, N, gl.SliceLayout(1, L))
    if CHECKED or N % LAYER.page_size != 0:
        key = gl.minimum(first + key, end - 1) if CHECKED else first + key
    row = gl.maximum(block, 0).to(gl.int64) * strides[0] * 4 + (key % LAYER.page_size) * strides[1] * 4
    word = gl.arange(0, LAYER.dim // 4, gl.SliceLayout(0, L))
    return pool_ptr + row[:, None] + word[None, :]


@gluon.jit
def _load_pages(pool, block, first, end, LAYER: gl.constexpr, CHECKED: gl.constexpr):
    """Codes of 128 keys from `first` on, four in a word, `[128, dim / 4]`; arguments of `_words_of`.

    If CHECKED, some row may not see some key, and codes of bad blocks are 0: such a block may hold NaN, and 0 times NaN
    would reach rows that do not see it.
    """
    words = _words_of(pool, block, first, end, LAYER, CHECKED)
    if CHECKED:
        return gl.load(words, mask=(block >= 0)[:, None], other=0)
    else:
        return gl.load(words)


@gluon.jit
def _copy_pages(codes, pool, block, first, end, LAYER: gl.constexpr, CHECKED: gl.constexpr):
    """Begin to copy the words of `_words_of` to shared memory, 0 for bad blocks and if `first` is negative."""
    words = _words_of(pool, block, first, end, LAYER, CHECKED)
    used = (block >= 0) & (first >= 0)
    async_copy.async_copy_global_to_shared(codes, words, mask=used[:, None])
    async_copy.commit_group()


@gluon.jit
def _converted(codes, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Codes of some keys as FP16, two in a word, `[ROWS, DIM / 2]`."""
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
        "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.reshape(gl.join(low, high), [ROWS, DIM // 2])


@gluon.jit
def _as_words(tile, DIM: gl.constexpr):
    """A tile of K or V as words of two FP16, `[128, DIM / 2]`, in the same swizzle."""
    W: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    return tile._reinterpret(gl.int32, [N, DIM // 2], W)


@gluon.jit
def _tell(full):
    """Tell the consumers that a tile is full."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _put(codes, tile, full, DIM: gl.constexpr):
    """Convert codes to FP16, store the tile, and tell the consumers."""
    _as_words(tile, DIM).store(_converted(codes, N, DIM))
    _tell(full)


@gluon.jit
def _put_copied(codes, tile, full, DIM: gl.constexpr):
    """`_put` of codes in shared memory: each thread has those there that it has copied."""
    ROWS: gl.constexpr = N // PARTS
    L: gl.constexpr = page_layout(DIM // 4, ROWS)
    words = _as_words(tile, DIM)
    for part in gl.static_range(PARTS):
        some = codes.slice(part * ROWS, ROWS).load(L)
        words.slice(part * ROWS, ROWS).store(_converted(some, ROWS, DIM))
    _tell(full)


@gluon.jit
def _wait_empty(empty, i, STAGES: gl.constexpr):
    """Wait until tile i − STAGES of K is empty; at once for the first tiles.

    Tile i − STAGES − 1 of V is empty then, and if tiles are split between consumers, i − STAGES − 2.
    """
    mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def _bounds(masked, steps, CHECKED: gl.constexpr):
    """The first step and the end of the steps with a mask, if CHECKED, or of those without."""
    if CHECKED:
        return 0, masked
    else:
        return masked, steps


@gluon.jit
def _produce(pool, tiles, full, empty, keys, LATER: gl.constexpr, LAYER: gl.constexpr, FORM: gl.constexpr):
    """Store all tiles of K or of V. Codes are loaded a tile ahead, block ids two.

    Args:
        pool: pointer to the head's words, and strides.
        empty: barriers of the tiles of K.
        keys: the table's row of the sequence, steps, the number of steps with a mask, and the end of the keys.
        LATER: by how many tiles V's tile is emptied later than K's; 0 for K.
    """
    table_ptr, steps, masked, end = keys
    last = (steps - 1) * N
    block = _load_blocks(table_ptr, last, end, LAYER, True)
    codes = _load_pages(pool, block, last, end, LAYER, True)
    block = _load_blocks(table_ptr, gl.maximum(last - N, 0), end, LAYER, True)
    for CHECKED in gl.static_range(1, -1, -1):
        begin_step, end_step = _bounds(masked, steps, CHECKED)
        for i in range(begin_step, end_step):
            s = i % FORM.stages
            ahead = last - (i + 1) * N
            _wait_empty(empty, i + LATER, FORM.stages)
            _put(codes, tiles.index(s), full.index(s), LAYER.dim)
            codes = _load_pages(pool, block, gl.maximum(ahead, 0), end, LAYER, CHECKED == 1)
            block = _load_blocks(table_ptr, gl.maximum(ahead - N, 0), end, LAYER, CHECKED == 1)


@gluon.jit
def _produce_copied(
    pool, copied, tiles, full, empty, keys, LATER: gl.constexpr, LAYER: gl.constexpr, FORM: gl.constexpr
):
    """As `_produce`, with `FORM.copied` tiles of codes on their way to shared memory."""
    COPIED: gl.constexpr = FORM.copied
    table_ptr, steps, masked, end = keys
    last = (steps - 1) * N
    for i in gl.static_range(COPIED):
        first = last - i * N
        block = _load_blocks(table_ptr, gl.maximum(first, 0), end, LAYER, True)
        _copy_pages(copied.index(i), pool, block, first, end, LAYER, True)
    block = _load_blocks(table_ptr, gl.maximum(last - COPIED * N, 0), end, LAYER, True)
    for CHECKED in gl.static_range(1, -1, -1):
        begin_step, end_step = _bounds(masked, steps, CHECKED)
        for i in range(begin_step, end_step):
            s = i % FORM.stages
            ahead = last - (i + COPIED) * N
            codes = copied.index(i % COPIED)
            async_copy.wait_group(COPIED - 1)
            _wait_empty(empty, i + LATER, FORM.stages)
            _put_copied(codes, tiles.index(s), full.index(s), LAYER.dim)
            _copy_pages(codes, pool, block, ahead, end, LAYER, CHECKED == 1)
            block = _load_blocks(table_ptr, gl.maximum(ahead - N, 0), end, LAYER, CHECKED == 1)
    async_copy.wait_group(0)


@gluon.jit
def _produce_both(k_pool, v_pool, k_tiles, v_tiles, barriers, keys, LAYER: gl.constexpr, FORM: gl.constexpr):
    """As `_produce`, all tiles of K and V."""
    k_full, v_full, empty, _ = barriers
    table_ptr, steps, masked, end = keys
    last = (steps - 1) * N
    block = _load_blocks(table_ptr, last, end, LAYER, True)
    k = _load_pages(k_pool, block, last, end, LAYER, True)
    v = _load_pages(v_pool, block, last, end, LAYER, True)
    block = _load_blocks(table_ptr, gl.maximum(last - N, 0), end, LAYER, True)
    for CHECKED in gl.static_range(1, -1, -1):
        begin_step, end_step = _bounds(masked, steps, CHECKED)
        for i in range(begin_step, end_step):
            s = i % FORM.stages
            ahead = last - (i + 1) * N
            first = gl.maximum(ahead, 0)
            _wait_empty(empty, i, FORM.stages)
            _put(k, k_tiles.index(s), k_full.index(s), LAYER.dim)
            k = _load_pages(k_pool, block, first, end, LAYER, CHECKED == 1)
            _wait_empty(empty, i + FORM.apart, FORM.stages)
            _put(v, v_tiles.index(s), v_full.index(s), LAYER.dim)
            v = _load_pages(v_pool, block, first, end, LAYER, CHECKED == 1)
            block = _load_blocks(table_ptr, gl.maximum(ahead - N, 0), end, LAYER, CHECKED == 1)


@gluon.jit
def _halves(x, COLUMNS: gl.constexpr):
    """The left and the right half of the columns of `[rows, COLUMNS]`, 16 or more: both are in the same threads."""
    return gl.split(gl.permute(gl.reshape(x, [M, 2, COLUMNS // 2]), [0, 2, 1]))


@gluon.jit
def _max_by_eights(x):
    """Maxima `[rows, 8]` of the columns of `[rows, 128]` that are in the same thread.

    As a tree, so that few instructions wait for each other: `gl.max` makes one chain for each row of a thread.
    """
    a, b = _halves(x, 128)
    c, d = _halves(a, 64)
    e, f = _halves(b, 64)
    g, h = _halves(gl.maximum(gl.maximum(c, d), gl.maximum(e, f)), 32)
    i, j = _halves(gl.maximum(g, h), 16)
    return gl.maximum(i, j)


@gluon.jit
def _sum_by_eights(x):
    """Sums, as `_max_by_eights`."""
    a, b = _halves(x, 128)
    c, d = _halves(a, 64)
    e, f = _halves(b, 64)
    g, h = _halves((c + d) + (e + f), 32)
    i, j = _halves(g + h, 16)
    return i + j


@gluon.jit
def _packed(p):
    """Two columns of `[rows, 128]` as FP16 in each word."""
    even, odd = gl.split(gl.reshape(p, [M, N // 2, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpacked(words, P: gl.constexpr):
    """The FP16 numbers of `_packed`, as an operand of `wgmma`."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [M, N]), P)


@gluon.jit
def _softmax(s, row_scale, top, position, first, MASKED: gl.constexpr, S: gl.constexpr):
    """`kernels.softmax.online_softmax_step` for keys from `first` on, with the causal mask if MASKED.

    Returns:
        Powers, the factor of what was added before, the new largest score, and sums of the powers, `[rows, 8]`.
    """
    if MASKED:
        key = first + gl.arange(0, N, gl.SliceLayout(0, S))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    largest = gl.convert_layout(gl.max(_max_by_eights(s), 1), gl.SliceLayout(1, S))
    new = gl.maximum(top, largest * row_scale)
    shift = gl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = gl.exp2(s * row_scale[:, None] - shift[:, None])
    kept = gl.exp2(top - shift)
    return p, kept, new, _sum_by_eights(p)


@gluon.jit
def _masked_steps(steps, position):
    """How many of the first steps, of the last keys, have a mask if the first row has this position: 1 at least."""
    whole = (position + 1) // N  # steps in which every row sees every key
    return gl.minimum(gl.maximum(steps - whole, 1), steps)


@gluon.jit
def _attend(work, LAYER: gl.constexpr, FORM: gl.constexpr, WHICH: gl.constexpr):
    """Attend the 64 rows from `first_row + 64 · WHICH` on to all keys, and store out and log-sum-exp.

    If FORM.split, attend the 64 rows from `first_row` on to every other tile of keys; consumer 1 passes its state to
    consumer 0, which stores.

    Args:
        work: queries, tiles, barriers, keys, scales and outputs, as `_attend_tile` groups them.
    """
    DIM: gl.constexpr = LAYER.dim
    GROUP: gl.constexpr = LAYER.group
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    Q: gl.constexpr = row_layout(DIM)
    queries, tiles, barriers, keys, scales, outs = work
    q_ptr, q_strides, first_q, first_row, rows, head = queries
    q_tiles, k_tiles, v_tiles, other_sums = tiles
    k_full, v_full, empty, other_done = barriers
    steps, len_k, table_ptr, end, columns = keys
    scale_log2, v_scale = scales
    APART: gl.constexpr = FORM.apart
    FIRST: gl.constexpr = WHICH if FORM.split else 0
    begin = first_row if FORM.split else first_row + WHICH * M

    # As `direct_kernel._scale_queries`: rows are divided by their largest element, and the factor of the scores is a
    # power of two.
    row = begin + gl.arange(0, M, gl.SliceLayout(1, Q))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, Q))
    q_row = (first_q + row // GROUP).to(gl.int64) * q_strides[0]
    q_row += (head * GROUP + row % GROUP).to(gl.int64) * q_strides[1]
    q = gl.load(q_ptr + q_row[:, None] + dim[None, :], mask=(row < rows)[:, None], other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(q), 1)
    largest = gl.where(largest > 0, largest, 1.0)
    row_scale = largest * scale_log2
    power = (row_scale.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    power = gl.maximum(power, 1.1754943508222875e-38)
    q = q / largest[:, None] * (row_scale / power)[:, None]
    q_tile = q_tiles.index(WHICH)
    q_tile.store(q.to(gl.float16))
    fence_async_shared()
    gl.thread_barrier()
    row_scale = gl.convert_layout(power, gl.SliceLayout(1, S))
    first_bad = _first_bad_key(table_ptr, end, columns, LAYER.page_size)  # while the first tiles are on their way

    row = begin + gl.arange(0, M, gl.SliceLayout(1, S))
    first_position = len_k - rows // GROUP
    position = first_position + row // GROUP
    masked = _masked_steps(steps, first_position + begin // GROUP)
    last = (steps - 1) * N
    top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    acc = gl.full([M, DIM], 0.0, gl.float32, A)
    nothing = gl.full([M, N], 0.0, gl.float32, S)

    mbarrier.wait(k_full.index(FIRST), 0)
    s = warpgroup_mma(q_tile, k_tiles.index(FIRST).permute([1, 0]), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    w, kept, top, total = _softmax(s, row_scale, top, position, last - FIRST * N, True, S)
    T: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    words = _packed(w)
    mbarrier.arrive(empty.index(FIRST), count=1)

    for MASKED in gl.static_range(1, -1, -1):
        begin_step, end_step = gl.maximum(masked, FIRST + APART), steps
        begin_step += (begin_step - FIRST) % APART
        if MASKED:
            begin_step, end_step = FIRST + APART, masked
        for i in range(begin_step, end_step, APART):
            # Q K of this step and P V of the step before are issued together; P V runs during the softmax.
            a = i % FORM.stages
            b = (i - APART) % FORM.stages
            p = _unpacked(words, P)
            mbarrier.wait(k_full.index(a), (i // FORM.stages) & 1)
            s = warpgroup_mma(q_tile, k_tiles.index(a).permute([1, 0]), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(b), ((i - APART) // FORM.stages) & 1)
            o = warpgroup_mma(p, v_tiles.index(b), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            w, kept, top, added = _softmax(s, row_scale, top, position, last - i * N, MASKED == 1, S)
            total = total * gl.convert_layout(kept, T)[:, None] + added
            # Complete already: the branch keeps ptxas from waiting for P V before the softmax.
            mbarrier.wait(v_full.index(b), ((i - APART) // FORM.stages) & 1)
            acc, p, w, total = warpgroup_mma_wait(0, deps=[o, p, w, total])
            mbarrier.arrive(empty.index(a), count=1)
            acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, A))[:, None]
            words = _packed(w)

    i = steps - 1 - (steps - 1 - FIRST) % APART
    b = i % FORM.stages
    mbarrier.wait(v_full.index(b), (i // FORM.stages) & 1)
    p = _unpacked(words, P)
    o = warpgroup_mma(p, v_tiles.index(b), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[o, p])

    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S))
    E: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    if FORM.split and WHICH == 1:  # no tile of K follows this consumer's last one: its memory is free
        k_tiles.index(b)._reinterpret(gl.float32, [M, DIM], E).store(acc)
        other_sums.index(0).store(top)
        other_sums.index(1).store(total)
        gl.thread_barrier()
        mbarrier.arrive(other_done, count=1)
    else:
        if FORM.split:
            if steps > 1:
                mbarrier.wait(other_done, 0)
                other_top = other_sums.index(0).load(gl.SliceLayout(1, S))
                new = gl.maximum(top, other_top)
                shift = gl.where(new == float("-inf"), 0.0, new)
                kept = gl.exp2(top - shift)
                other_kept = gl.exp2(other_top - shift)
                total = total * kept + other_sums.index(1).load(gl.SliceLayout(1, S)) * other_kept
                b = (steps - 1 - steps % 2) % FORM.stages  # of consumer 1's last tile
                other = k_tiles.index(b)._reinterpret(gl.float32, [M, DIM], E).load(A)
                acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, A))[:, None]
                acc += other * gl.convert_layout(other_kept, gl.SliceLayout(1, A))[:, None]
                top = new
        _store_rows(acc, top, total, v_scale, position, first_bad, begin, queries, outs, LAYER, S, A)


@gluon.jit
def _store_rows(
    acc, top, total, v_scale, position, first_bad, begin, queries, outs,
    LAYER: gl.constexpr, S: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Store out and log-sum-exp of the 64 rows from `begin` on, with the sink."""
    DIM: gl.constexpr = LAYER.dim
    GROUP: gl.constexpr = LAYER.group
    _, _, first_q, _, rows, head = queries
    sink_ptr, out_ptr, lse_ptr = outs
    row = begin + gl.arange(0, M, gl.SliceLayout(1, S))
    total = gl.where(position >= first_bad, float("nan"), total)
    factor = v_scale  # of the rows of acc
    if LAYER.sinks:
        sink = gl.load(sink_ptr + head * GROUP + row % GROUP, mask=row < rows, other=0.0).to(gl.float32)
        unseen = total == 0
        new = gl.maximum(top, sink * LOG2E)
        shift = gl.where(new == float("-inf"), 0.0, new)
        kept = gl.exp2(top - shift)
        total = total * kept + gl.exp2(sink * LOG2E - shift)
        factor = kept * v_scale
        top = new
    divisor = gl.where(total == 0, 1.0, total)
    lse = top * LN2 + gl.log(divisor)
    if LAYER.sinks:
        lse = gl.where(unseen, sink, lse)
    acc = acc * gl.convert_layout(factor / divisor, gl.SliceLayout(1, A))[:, None]
    lse_row = (first_q + row // GROUP).to(gl.int64) * (LAYER.heads * GROUP) + head * GROUP + row % GROUP
    gl.store(lse_ptr + lse_row, lse, mask=row < rows)
    row = begin + gl.arange(0, M, gl.SliceLayout(1, A))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, A))
    out_row = (first_q + row // GROUP).to(gl.int64) * (LAYER.heads * GROUP) + head * GROUP + row % GROUP
    out = acc.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + out_row[:, None] * DIM + dim[None, :], out, mask=(row < rows)[:, None])


@gluon.jit
def _consume(work, LAYER: gl.constexpr, FORM: gl.constexpr, WHICH: gl.constexpr):
    """`_attend` if the consumer has rows; the first one has. Without rows it only empties tiles.

    If tiles are split between consumers, both have the same rows, and the second one has a tile if there are two.
    """
    queries, _, barriers, keys, _, _ = work
    if WHICH == 0:
        _attend(work, LAYER, FORM, WHICH)
    elif FORM.split:
        if keys[0] > 1:
            _attend(work, LAYER, FORM, WHICH)
    elif queries[3] + WHICH * M < queries[4]:
        _attend(work, LAYER, FORM, WHICH)
    else:
        k_full, v_full, empty = barriers[0], barriers[1], barriers[2]
        steps = keys[0]
        for i in range(steps):
            s = i % FORM.stages
            mbarrier.wait(k_full.index(s), (i // FORM.stages) & 1)
            if i > 0:
                mbarrier.wait(v_full.index((i - 1) % FORM.stages), ((i - 1) // FORM.stages) & 1)
            gl.thread_barrier()  # no warp may fall behind: one bit distinguishes a barrier's phases
            mbarrier.arrive(empty.index(s), count=1)


@gluon.jit
def _fill_rows(out_ptr, lse_ptr, sink_ptr, empty, first_row, end_row, step, head, LAYER: gl.constexpr):
    """Set a KV head's rows [first_row, end_row), 128 of every `step` of them; rows are counted from the first token.

    Rows are 0, and −inf or the sink, if `empty`; else NaN. A step of 64 sets rows twice.
    """
    DIM: gl.constexpr = LAYER.dim
    GROUP: gl.constexpr = LAYER.group
    L: gl.constexpr = row_layout(DIM)
    out_value = gl.where(empty, 0.0, float("nan"))
    lse_value = gl.where(empty, float("-inf"), float("nan"))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, L))
    while first_row < end_row:
        row = first_row + gl.arange(0, 2 * M, gl.SliceLayout(1, L))
        in_use = row < end_row
        out_row = row // GROUP * (LAYER.heads * GROUP) + head * GROUP + row % GROUP
        out = (gl.full([2 * M, DIM], 0.0, gl.float32, L) + out_value).to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + out_row[:, None] * DIM + dim[None, :], out, mask=in_use[:, None])
        lse = gl.full([2 * M], 0.0, gl.float32, gl.SliceLayout(1, L)) + lse_value
        if LAYER.sinks:
            sink = gl.load(sink_ptr + head * GROUP + row % GROUP, mask=in_use, other=0.0).to(gl.float32)
            lse = gl.where(lse == float("-inf"), sink, lse)
        gl.store(lse_ptr + out_row, lse, mask=in_use)
        first_row += step


@gluon.jit
def _first_bad_key(table_ptr, end, columns, PAGE: gl.constexpr):
    """The first key of the first bad block among the keys before `end`; else the first key past the block table.

    A row that sees it is NaN: without a window, a row sees all keys up to its position.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pages = (end + PAGE - 1) // PAGE
    first_bad = gl.full([1024], 0, gl.int32, L) + columns * PAGE
    for first in range(0, pages, 1024):
        page = first + gl.arange(0, 1024, L)
        block = gl.load(table_ptr + page, mask=page < pages, other=0)
        first_bad = gl.where(block < 0, gl.minimum(first_bad, page * PAGE), first_bad)
    return gl.min(first_bad, 0)


@gluon.jit(do_not_specialize=["num_sequences", "columns", "tiles", "total_q", "max_q"])
def hopper_kernel(
    q_ptr, table_ptr, cu_q_ptr, cu_k_ptr, sink_ptr, out_ptr, lse_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr,
    scale_log2, num_sequences, columns, tiles, total_q, max_q,
    q_strides,  # row, head
    k_strides, v_strides,  # block, slot, head, in units of 16 bytes
    LAYER: gl.constexpr, FORM: gl.constexpr,  # plan.LayerForm, plan.Form
):  # fmt: skip
    """`direct_kernel` for one tile of `FORM.rows` rows of a sequence; pools are int32 words."""
    program = gl.program_id(0)
    head = program % LAYER.heads
    tile = (program // LAYER.heads) % tiles
    sequence = program // (LAYER.heads * tiles)
    GROUP: gl.constexpr = LAYER.group
    first_q = gl.load(cu_q_ptr + sequence)  # at num_sequences: the end of the last sequence
    spare = sequence == num_sequences  # rows that belong to no sequence: 0
    end_q = gl.load(cu_q_ptr + gl.minimum(sequence + 1, num_sequences))
    first_row = tile * FORM.rows
    if spare | (end_q - first_q > max_q):  # or more rows than there are tiles: NaN
        end_q = gl.where(spare, total_q, end_q)
        begin = first_q.to(gl.int64) * GROUP + first_row
        past = end_q.to(gl.int64) * GROUP
        _fill_rows(out_ptr, lse_ptr, sink_ptr, spare, begin, past, tiles * FORM.rows, head, LAYER)
    else:
        rows = (end_q - first_q) * GROUP
        if first_row < rows:
            len_k = gl.load(cu_k_ptr + sequence + 1) - gl.load(cu_k_ptr + sequence)
            last_row = gl.minimum(first_row + FORM.rows, rows) - 1
            end = gl.minimum(len_k - rows // GROUP + last_row // GROUP + 1, columns * LAYER.page_size)
            if end <= 0:  # no row of the tile sees a key
                begin = first_q.to(gl.int64) * GROUP + first_row
                past = first_q.to(gl.int64) * GROUP + last_row + 1
                _fill_rows(out_ptr, lse_ptr, sink_ptr, end <= 0, begin, past, 2 * M, head, LAYER)
            else:
                _attend_tile(
                    q_ptr, q_strides, table_ptr + sequence.to(gl.int64) * columns, sink_ptr, out_ptr, lse_ptr,
                    k_ptr, k_scale_ptr, k_strides, v_ptr, v_scale_ptr, v_strides, scale_log2, columns, first_row, rows,
                    first_q, len_k, end, head, LAYER, FORM,
                )  # fmt: skip


@gluon.jit
def _attend_tile(
    q_ptr, q_strides, table_ptr, sink_ptr, out_ptr, lse_ptr, k_ptr, k_scale_ptr, k_strides, v_ptr, v_scale_ptr,
    v_strides, scale_log2, columns, first_row, rows, first_q, len_k, end, head,
    LAYER: gl.constexpr, FORM: gl.constexpr,
):  # fmt: skip
    """Attend `FORM.rows` rows from `first_row` on, of which some row sees the keys before `end`."""
    DIM: gl.constexpr = LAYER.dim
    STAGES: gl.constexpr = FORM.stages
    APART: gl.constexpr = FORM.apart
    steps = (end + N - 1) // N
    masked = _masked_steps(steps, len_k - rows // LAYER.group + first_row // LAYER.group)
    scale = scale_log2
    if LAYER.k_scaled:
        scale *= gl.load(k_scale_ptr)
    v_scale = scale_log2 * 0 + 1
    if LAYER.v_scaled:
        v_scale = gl.load(v_scale_ptr)
    k_ptr += head.to(gl.int64) * k_strides[2] * 4
    v_ptr += head.to(gl.int64) * v_strides[2] * 4

    W: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(gl.float16, [2, M, DIM], W)
    k_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, N, DIM], W)
    v_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, N, DIM], W)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if FORM.split else 2)
    other_sums = gl.allocate_shared_memory(gl.float32, [2, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    other_done = gl.allocate_shared_memory(gl.int64, [1], B)
    mbarrier.init(other_done, count=1)
    gl.thread_barrier()

    barriers = (k_full, v_full, empty, other_done)
    work = (
        (q_ptr, q_strides, first_q, first_row, rows, head),
        (q_tiles, k_tiles, v_tiles, other_sums),
        barriers,
        (steps, len_k, table_ptr, end, columns),
        (scale, v_scale),
        (sink_ptr, out_ptr, lse_ptr),
    )
    k_pool, v_pool = (k_ptr, k_strides), (v_ptr, v_strides)
    keys = (table_ptr, steps, masked, end)
    if FORM.copied > 0:
        gl.static_assert(FORM.producers == 2)
        C: gl.constexpr = copied_layout(DIM // 4)
        k_copied = gl.allocate_shared_memory(gl.int32, [FORM.copied, N, DIM // 4], C)
        v_copied = gl.allocate_shared_memory(gl.int32, [FORM.copied, N, DIM // 4], C)
        gl.warp_specialize(
            [
                (_consume, (work, LAYER, FORM, 0)),
                (_consume, (work, LAYER, FORM, 1)),
                (_produce_copied, (k_pool, k_copied, k_tiles, k_full, empty, keys, 0, LAYER, FORM)),
                (_produce_copied, (v_pool, v_copied, v_tiles, v_full, empty, keys, APART, LAYER, FORM)),
            ],
            [4, 4, 4], [FORM.consumer_registers, FORM.producer_registers, FORM.producer_registers],
        )  # fmt: skip
    elif FORM.producers == 2:
        gl.warp_specialize(
            [
                (_consume, (work, LAYER, FORM, 0)),
                (_consume, (work, LAYER, FORM, 1)),
                (_produce, (k_pool, k_tiles, k_full, empty, keys, 0, LAYER, FORM)),
                (_produce, (v_pool, v_tiles, v_full, empty, keys, APART, LAYER, FORM)),
            ],
            [4, 4, 4], [FORM.consumer_registers, FORM.producer_registers, FORM.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (work, LAYER, FORM, 0)),
                (_consume, (work, LAYER, FORM, 1)),
                (_produce_both, (k_pool, v_pool, k_tiles, v_tiles, barriers, keys, LAYER, FORM)),
            ],
            [4, 4], [FORM.consumer_registers, FORM.producer_registers],
        )  # fmt: skip
