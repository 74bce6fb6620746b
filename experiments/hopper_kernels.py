"""Experiment: attention from FP8 pages on Hopper with explicit layouts (Gluon). One warpgroup (or two) loads pages,
converts them to FP16 once and stores them in shared memory; two or three warpgroups of 64 rows each multiply from there.

NHD pools, one scale per tensor, e4m3. Steps run from the last keys to the first: those that need a mask come first.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def page_layout(N, W, WARPS):
    """[N, W] words of 4 codes: 16 bytes of a row in a thread; 8 lanes are 4 chunks of 2 rows: swizzled stores without
    conflicts."""
    reg = [[0, 1], [0, 2]]
    lane = [[0, 4], [0, 8], [1, 0]]
    row = 2
    if W == 32:
        lane += [[0, 16], [2, 0]]
        row = 4
    else:
        lane += [[2, 0], [4, 0]]
        row = 8
    warp = []
    while 2 ** len(warp) < WARPS:
        warp.append([row, 0])
        row *= 2
    while row < N:
        reg.append([row, 0])
        row *= 2
    return gl.DistributedLinearLayout(reg_bases=reg, lane_bases=lane, warp_bases=warp, block_bases=[], shape=[N, W])


@gluon.jit
def _pages(pool_ptr, table_ptr, first, end, head, D: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
           HEADS: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Codes of N keys from `first` on, four in a word, `[N, D / 4]`; keys past the end are the last one."""
    key = gl.minimum(first + gl.arange(0, N, gl.SliceLayout(1, L)), end - 1)
    block = gl.load(table_ptr + key // PAGE)
    row = block.to(gl.int64) * (PAGE * HEADS * D // 4) + ((key % PAGE) * (HEADS * D // 4) + head * (D // 4))
    dim = gl.arange(0, D // 4, gl.SliceLayout(0, L))
    return gl.load(pool_ptr + row[:, None] + dim[None, :])


@gluon.jit
def _put(codes, smem, full, D: gl.constexpr, N: gl.constexpr):
    """Convert to FP16, store, and tell the consumers."""
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
        "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    words = gl.reshape(gl.join(low, high), [N, D // 2])
    W: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    smem._reinterpret(gl.int32, [N, D // 2], W).store(words)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _produce_both(k_ptr, v_ptr, table_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, steps, end, head,
                  D: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """K and V by one warpgroup; each tile's load is under way while the other's is converted."""
    L: gl.constexpr = page_layout(N, D // 4, 4)
    last = (steps - 1) * N
    k = _pages(k_ptr, table_ptr, last, end, head, D, N, PAGE, HEADS, L)
    v = _pages(v_ptr, table_ptr, last, end, head, D, N, PAGE, HEADS, L)
    for i in range(steps):
        s = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        ahead = gl.maximum(last - (i + 1) * N, 0)
        mbarrier.wait(k_empty.index(s), phase)
        _put(k, k_smem.index(s), k_full.index(s), D, N)
        k = _pages(k_ptr, table_ptr, ahead, end, head, D, N, PAGE, HEADS, L)
        mbarrier.wait(v_empty.index(s), phase)
        _put(v, v_smem.index(s), v_full.index(s), D, N)
        v = _pages(v_ptr, table_ptr, ahead, end, head, D, N, PAGE, HEADS, L)


@gluon.jit
def _produce(pool_ptr, table_ptr, smem, full, empty, steps, end, head,
             D: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
             DEPTH: gl.constexpr):  # fmt: skip
    """K or V by a warpgroup of its own; the loads of the next DEPTH tiles are under way."""
    L: gl.constexpr = page_layout(N, D // 4, 4)
    last = (steps - 1) * N
    codes = _pages(pool_ptr, table_ptr, last, end, head, D, N, PAGE, HEADS, L)
    if DEPTH == 2:
        later = _pages(pool_ptr, table_ptr, gl.maximum(last - N, 0), end, head, D, N, PAGE, HEADS, L)
    for i in range(steps):
        s = i % STAGES
        mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
        _put(codes, smem.index(s), full.index(s), D, N)
        if DEPTH == 2:
            codes = later
            later = _pages(pool_ptr, table_ptr, gl.maximum(last - (i + 2) * N, 0), end, head, D, N, PAGE, HEADS, L)
        else:
            codes = _pages(pool_ptr, table_ptr, gl.maximum(last - (i + 1) * N, 0), end, head, D, N, PAGE, HEADS, L)


@gluon.constexpr_function
def exp2_code(SHARE):
    """Four powers of two for arguments that are at most 0, `SHARE` of them by a polynomial (relative error 1e-4)."""
    code = "{ .reg .f32 x, f, r, p; .reg .b32 n, b; "
    for i in range(4):
        if i < 4 - SHARE:
            code += f"ex2.approx.ftz.f32 ${i}, ${i + 4}; "
        else:  # 2^x = 2^n 2^r, n the nearest integer, r in [-0.5, 0.5]
            code += (
                f"max.ftz.f32 x, ${i + 4}, 0fC2FA0000; add.ftz.f32 f, x, 0f4B400000; mov.b32 n, f; "
                "sub.ftz.f32 f, f, 0f4B400000; sub.ftz.f32 r, x, f; "
                "fma.rn.ftz.f32 p, r, 0f3D634570, 0f3E77CFD7; fma.rn.ftz.f32 p, p, r, 0f3F3171D2; "
                "fma.rn.ftz.f32 p, p, r, 0f3F800000; "
                f"mov.b32 b, p; shl.b32 n, n, 23; add.s32 b, b, n; mov.b32 ${i}, b; "
            )
    return code + "}"


@gluon.jit
def _softmax(s, row_scale, top, total, position, first, MASKED: gl.constexpr, N: gl.constexpr, S: gl.constexpr,
             POLY: gl.constexpr):  # fmt: skip
    if MASKED:
        key = first + gl.arange(0, N, gl.SliceLayout(0, S))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    new = gl.maximum(top, gl.max(s, 1) * row_scale)
    shift = gl.where(new == float("-inf"), 0.0, new) if MASKED else new
    if POLY > 0 and not MASKED:
        p = gl.inline_asm_elementwise(
            exp2_code(POLY), "=f,=f,=f,=f,f,f,f,f", [s * row_scale[:, None] - shift[:, None]], dtype=gl.float32,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        p = gl.exp2(s * row_scale[:, None] - shift[:, None])
    kept = gl.exp2(top - shift)
    total = total * kept + gl.sum(p, 1)
    return p, kept, new, total


@gluon.jit
def _attend(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row, rows,
             first_q, len_k, v_scale, scale_log2, head,
             WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr,
             GROUP: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, OVERLAP: gl.constexpr, POLY: gl.constexpr, CARRY: gl.constexpr,
             Q_IN_REGISTERS: gl.constexpr):  # fmt: skip
    """Attend 64 rows, from `first_row + 64 · WHICH` on, to all keys."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    q_heads: gl.constexpr = HEADS * GROUP
    begin = first_row + WHICH * 64

    row = begin + gl.arange(0, 64, gl.SliceLayout(1, QL))
    dim = gl.arange(0, D, gl.SliceLayout(0, QL))
    q_row = ((first_q + row // GROUP) * q_heads + head * GROUP + row % GROUP) * D
    q = gl.load(q_ptr + q_row[:, None] + dim[None, :], mask=(row < rows)[:, None], other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(q), 1)
    largest = gl.where(largest > 0, largest, 1.0)
    row_scale = largest * scale_log2
    power = (row_scale.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    power = gl.maximum(power, 1.1754943508222875e-38)
    q = q * ((row_scale / power) / largest)[:, None]
    mine = q_smem.index(WHICH)
    mine.store(q.to(gl.float16))
    fence_async_shared()
    gl.thread_barrier()
    if Q_IN_REGISTERS:
        mine = mine.load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=2))
    row_scale = gl.convert_layout(power, gl.SliceLayout(1, S))

    row = begin + gl.arange(0, 64, gl.SliceLayout(1, S))
    position = len_k - rows // GROUP + row // GROUP
    whole = (len_k - rows // GROUP + begin // GROUP + 1) // N  # steps in which every row sees every key
    masked = gl.minimum(gl.maximum(steps - whole, 1), steps)
    last = (steps - 1) * N
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, S))
    acc = gl.full([64, D], 0.0, gl.float32, O)
    nothing = gl.full([64, N], 0.0, gl.float32, S)

    mbarrier.wait(k_full.index(0), 0)
    if PINGPONG:
        mbarrier.wait(turn.index(WHICH), 0)
    s = warpgroup_mma(mine, k_smem.index(0).permute([1, 0]), nothing, use_acc=False, is_async=True)
    if PINGPONG:
        mbarrier.arrive(turn.index((WHICH + 1) % CONSUMERS), count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    w, kept, top, total = _softmax(s, row_scale, top, total, position, last, True, N, S, POLY)
    p = gl.convert_layout(w.to(gl.float16), P)

    for MASKED in gl.static_range(1, -1, -1):
        begin_step, end_step = masked, steps
        if MASKED:
            begin_step, end_step = 1, masked
        for i in range(begin_step, end_step):
            a = i % STAGES
            b = (i - 1) % STAGES
            if CARRY:  # p itself, carried around the loop, is taken to pieces: 2 PRMT for each register
                p = gl.convert_layout(w.to(gl.float16), P)
            mbarrier.wait(k_full.index(a), (i // STAGES) & 1)
            if PINGPONG:
                mbarrier.wait(turn.index(WHICH), i & 1)
            s = warpgroup_mma(mine, k_smem.index(a).permute([1, 0]), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(b), ((i - 1) // STAGES) & 1)
            o = warpgroup_mma(p, v_smem.index(b), acc, is_async=True)
            if PINGPONG:
                mbarrier.arrive(turn.index((WHICH + 1) % CONSUMERS), count=1)
            if OVERLAP:
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(a), count=1)
            else:
                s, acc, p = warpgroup_mma_wait(0, deps=[s, o, p])
                mbarrier.arrive(k_empty.index(a), count=1)
                mbarrier.arrive(v_empty.index(b), count=1)
            w, kept, top, total = _softmax(s, row_scale, top, total, position, last - i * N, MASKED == 1, N, S, POLY)
            if OVERLAP:
                # True already: a branch that keeps ptxas from waiting for P V before the softmax.
                mbarrier.wait(v_full.index(b), ((i - 1) // STAGES) & 1)
                acc, p, w, total = warpgroup_mma_wait(0, deps=[o, p, w, total])
                mbarrier.arrive(v_empty.index(b), count=1)
            acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, O))[:, None]
            if not CARRY:
                p = gl.convert_layout(w.to(gl.float16), P)

    b = (steps - 1) % STAGES
    mbarrier.wait(v_full.index(b), ((steps - 1) // STAGES) & 1)
    if CARRY:
        p = gl.convert_layout(w.to(gl.float16), P)
    o = warpgroup_mma(p, v_smem.index(b), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[o, p])
    inverse = v_scale / total
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O))[:, None]
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, O))
    dim = gl.arange(0, D, gl.SliceLayout(0, O))
    out_row = ((first_q + row // GROUP) * q_heads + head * GROUP + row % GROUP) * D
    gl.store(out_ptr + out_row[:, None] + dim[None, :], acc.to(gl.bfloat16), mask=(row < rows)[:, None])


@gluon.jit
def _consume(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row, rows,
             first_q, len_k, v_scale, scale_log2, head,
             WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr,
             GROUP: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, OVERLAP: gl.constexpr, POLY: gl.constexpr, CARRY: gl.constexpr,
             Q_IN_REGISTERS: gl.constexpr):  # fmt: skip
    """Attend 64 rows if there are any, else only give the tiles back."""
    if WHICH == 0:
        _attend(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row, rows,
                first_q, len_k, v_scale, scale_log2, head, WHICH, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG,
                OVERLAP, POLY, CARRY, Q_IN_REGISTERS)  # fmt: skip
    elif first_row + WHICH * 64 < rows:
        _attend(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row, rows,
                first_q, len_k, v_scale, scale_log2, head, WHICH, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG,
                OVERLAP, POLY, CARRY, Q_IN_REGISTERS)  # fmt: skip
    else:
        for i in range(steps):
            s = i % STAGES
            phase = (i // STAGES) & 1
            if PINGPONG:
                mbarrier.wait(turn.index(WHICH), i & 1)
                mbarrier.arrive(turn.index((WHICH + 1) % CONSUMERS), count=1)
            mbarrier.wait(k_full.index(s), phase)
            mbarrier.arrive(k_empty.index(s), count=1)
            mbarrier.wait(v_full.index(s), phase)
            gl.thread_barrier()  # no warp may be left behind: a barrier's phases are told apart by one bit
            mbarrier.arrive(v_empty.index(s), count=1)


@gluon.jit(do_not_specialize=["columns", "tiles"])
def hopper_kernel(q_ptr, k_ptr, v_ptr, table_ptr, cu_q_ptr, cu_k_ptr, out_ptr, k_scale_ptr, v_scale_ptr,
                  scale_log2, columns, tiles,
                  D: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
                  CONSUMERS: gl.constexpr, PRODUCERS: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr,
                  OVERLAP: gl.constexpr, POLY: gl.constexpr, CARRY: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
                  DEPTH: gl.constexpr, C_REGS: gl.constexpr, P_REGS: gl.constexpr):  # fmt: skip
    M: gl.constexpr = 64 * CONSUMERS
    program = gl.program_id(0)
    head = program % HEADS
    tile = (program // HEADS) % tiles
    sequence = program // (HEADS * tiles)
    first_q = gl.load(cu_q_ptr + sequence)
    rows = (gl.load(cu_q_ptr + sequence + 1) - first_q) * GROUP
    len_k = gl.load(cu_k_ptr + sequence + 1) - gl.load(cu_k_ptr + sequence)
    first_row = tile * M
    if first_row < rows:
        end = len_k - rows // GROUP + (gl.minimum(first_row + M, rows) - 1) // GROUP + 1
        steps = (end + N - 1) // N
        k_scale = gl.load(k_scale_ptr)
        v_scale = gl.load(v_scale_ptr)
        scale = scale_log2 * k_scale
        table_ptr += sequence.to(gl.int64) * columns

        W: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        B: gl.constexpr = mbarrier.MBarrierLayout()
        q_smem = gl.allocate_shared_memory(gl.float16, [CONSUMERS, 64, D], W)
        k_smem = gl.allocate_shared_memory(gl.float16, [STAGES, N, D], W)
        v_smem = gl.allocate_shared_memory(gl.float16, [STAGES, N, D], W)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
        turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], B)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=CONSUMERS)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(v_empty.index(i), count=CONSUMERS)
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turn.index(i), count=1)
        gl.thread_barrier()
        if PINGPONG:
            mbarrier.arrive(turn.index(0), count=1)

        if CONSUMERS == 2 and PRODUCERS == 1:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 1, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce_both, (k_ptr, v_ptr, table_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, steps, end, head,
                             D, N, PAGE, HEADS, STAGES)),
                ],
                [4, 4], [C_REGS, P_REGS],
            )
        elif CONSUMERS == 3 and PRODUCERS == 1:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 1, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 2, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce_both, (k_ptr, v_ptr, table_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, steps, end, head,
                             D, N, PAGE, HEADS, STAGES)),
                ],
                [4, 4, 4], [C_REGS, C_REGS, P_REGS],
            )
        elif CONSUMERS == 2 and PRODUCERS == 2:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 1, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce, (k_ptr, table_ptr, k_smem, k_full, k_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                    (_produce, (v_ptr, table_ptr, v_smem, v_full, v_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                ],
                [4, 4, 4], [C_REGS, P_REGS, P_REGS],
            )
        elif CONSUMERS == 3 and PRODUCERS == 2:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 1, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 2, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce, (k_ptr, table_ptr, k_smem, k_full, k_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                    (_produce, (v_ptr, table_ptr, v_smem, v_full, v_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                ],
                [4, 4, 4, 4], [C_REGS, C_REGS, P_REGS, P_REGS],
            )
        elif CONSUMERS == 1 and PRODUCERS == 1:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce_both, (k_ptr, v_ptr, table_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, steps, end, head,
                             D, N, PAGE, HEADS, STAGES)),
                ],
                [4], [P_REGS],
            )
        elif CONSUMERS == 1 and PRODUCERS == 2:
            gl.warp_specialize(
                [
                    (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, steps, first_row,
                       rows, first_q, len_k, v_scale, scale, head, 0, CONSUMERS, D, N, HEADS, GROUP, STAGES, PINGPONG, OVERLAP, POLY, CARRY, Q_IN_REGISTERS)),
                    (_produce, (k_ptr, table_ptr, k_smem, k_full, k_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                    (_produce, (v_ptr, table_ptr, v_smem, v_full, v_empty, steps, end, head, D, N, PAGE, HEADS, STAGES, DEPTH)),
                ],
                [4, 4], [P_REGS, P_REGS],
            )
