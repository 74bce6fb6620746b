"""Plausible wrong answers of chapter 04, and what the check must say to each."""

SLOTS = """@triton.jit
def slots_kernel(
    slots_ptr, token_to_batch_ptr, cu_seqlens_ptr, seq_starts_ptr, block_tables_ptr, stride_table, page_size
):
    token = tl.program_id(0)
    batch = tl.load(token_to_batch_ptr + token)
    {position}
    {block}
    {slot}
    tl.store(slots_ptr + token, slot)
"""
POSITION = "position = token - tl.load(cu_seqlens_ptr + batch) + tl.load(seq_starts_ptr + batch)"
BLOCK = "block = tl.load(block_tables_ptr + batch * stride_table + position // page_size)"
SLOT = "slot = block * page_size + position % page_size"

ROWS = """@triton.jit
def rows_kernel(out_ptr, pool_ptr, slots_ptr, DIM: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots_ptr + token)
    dim = tl.arange(0, LANES)
    inside = {inside}
    row = tl.load(pool_ptr + slot * DIM + dim, mask=inside, other=0.0)
    tl.store(out_ptr + token * DIM + dim, row, mask=inside)
"""

BYTES = """def value_bytes(block, head, page_offset, num_heads, page_size, head_dim):
    return {bytes}
"""

WRONG = {
    "04.1": [
        # seq_starts left out
        (
            SLOTS.format(position="position = token - tl.load(cu_seqlens_ptr + batch)", block=BLOCK, slot=SLOT),
            "seq_starts [3, 0, 6], lengths [5, 0, 6]): answer[0]: expected 31, got 28",
        ),
        # the block's own page forgotten
        (
            SLOTS.format(position=POSITION, block=BLOCK, slot="slot = block + position % page_size"),
            "answer[0]: expected 31, got 10",
        ),
        # the token's row instead of its position
        (
            SLOTS.format(
                position=POSITION,
                block="block = tl.load(block_tables_ptr + batch * stride_table + token // page_size)",
                slot="slot = block * page_size + token % page_size",
            ),
            "expected 31, got 28",
        ),
        # the position used as a column
        (
            SLOTS.format(
                position=POSITION,
                block="block = tl.load(block_tables_ptr + batch * stride_table + position)",
                slot=SLOT,
            ),
            "a load of block_tables_ptr at element",
        ),
    ],
    "04.2": [
        (ROWS.format(inside="dim < LANES"), "a load of pool_ptr at element 144; it has 144"),
        (ROWS.format(inside="dim <= DIM"), "a load of pool_ptr at element 144; it has 144"),
        (ROWS.format(inside="dim < DIM - 1"), "rows: answer[0, 23]"),
        # the first size only
        (ROWS.format(inside="dim < 24"), "DIM 20, LANES 32: program 0: a load of pool_ptr at element 120; it has 120"),
        (ROWS.format(inside="dim < LANES - 8"), "DIM 20, LANES 32: program 0: a load of pool_ptr at element 120"),
    ],
    "04.3": [
        # the formula of NHD
        (
            BYTES.format(
                bytes="[((block * page_size + page_offset) * num_heads + head) * head_dim + d for d in range(head_dim)]"
            ),
            "block 0, head 0, page_offset 0 of 2 heads, page 16, head_dim 32: answer[1]: expected 16, got 1",
        ),
        # the group of the page offset forgotten: right for pages of 16
        (
            BYTES.format(
                bytes="[(block * num_heads + head) * page_size * head_dim + d * 16 + page_offset"
                " for d in range(head_dim)]"
            ),
            "block 1, head 2, page_offset 30 of 3 heads, page 32, head_dim 16: answer[0]",
        ),
        # only the first byte
        (
            BYTES.format(bytes="[(block * num_heads + head) * page_size * head_dim + page_offset]"),
            "expected 32 values, got 1",
        ),
    ],
}
