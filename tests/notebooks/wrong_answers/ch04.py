"""Plausible wrong answers of chapter 04, and what the check must say to each."""

ROWS = """@triton.jit
def rows_kernel(out_ptr, pool_ptr, slots_ptr, DIM: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0)
    slot = {slot}
    dim = tl.arange(0, LANES)
    inside = {inside}
    numbers = tl.load(pool_ptr + slot * DIM + dim, mask=inside, other=0.0)
    tl.store(out_ptr + row * DIM + dim, numbers, mask=inside)
"""
ROW_SLOT = "tl.load(slots_ptr + row)"

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

GATHER = """@triton.jit
def my_gather_kernel(
    out_ptr, pool_ptr, scale_ptr, block_table_ptr, cu_seqlens_ptr, token_to_batch_ptr,
    stride_table, num_heads, PAGE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    batch = tl.load(token_to_batch_ptr + token)
    position = token - tl.load(cu_seqlens_ptr + batch)
    block = tl.load(block_table_ptr + batch * stride_table + position // PAGE)
    page_offset = position % PAGE
    dim = tl.arange(0, LANES)
    inside = dim < DIM
    row = (block * PAGE + page_offset) * num_heads + head
    codes = tl.load(pool_ptr + row * DIM + dim, mask=inside, other=0.0)
    values = codes.to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + (token * num_heads + head) * DIM + dim, values, mask=inside)
"""
FIRST = "page 16, heads 2, dim 32, lengths [19, 5]: "
SECOND = "page 5, heads 3, dim 12, lengths [7, 0, 11, 1]: "
PAST_THE_END = "cell:16 in my_gather_kernel(): store out_ptr, elements 684–687 of 684, first program (18, 2)"

BYTES = """def value_bytes(block, head, page_offset, num_heads, page_size, head_dim):
    return {bytes}
"""


def gather(old: str, new: str) -> str:
    """The solution of 04.3 with one part replaced."""
    assert old in GATHER
    return GATHER.replace(old, new)


WRONG = {
    "04.1": [
        (
            ROWS.format(slot=ROW_SLOT, inside="dim < LANES"),
            "load pool_ptr, elements 144–151 of 144, first program",
        ),
        (ROWS.format(slot=ROW_SLOT, inside="dim <= DIM"), "cell:7 in rows_kernel(): load pool_ptr, element 144 of 144"),
        (ROWS.format(slot=ROW_SLOT, inside="dim < DIM - 1"), "rows: answer[0, 23]"),
        # the first size only
        (
            ROWS.format(slot=ROW_SLOT, inside="dim < 24"),
            "DIM 20, LANES 32: cell:7 in rows_kernel(): load pool_ptr, elements 120–123 of 120, first program (0,)",
        ),
        (
            ROWS.format(slot=ROW_SLOT, inside="dim < LANES - 8"),
            "DIM 20, LANES 32: cell:7 in rows_kernel(): load pool_ptr, elements 120–123 of 120",
        ),
        # no index
        (ROWS.format(slot="row", inside="dim < DIM"), "row 0 has the numbers of slot 0; expected those of slot 5"),
        # the index without a load: an address in place of a number
        (
            ROWS.format(slot="slots_ptr + row", inside="dim < DIM"),
            "your cell: numbers = tl.load(pool_ptr + slot * DIM + dim, mask=inside, other=0.0) → a pointer takes",
        ),
    ],
    "04.2": [
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
            "cell:8 in slots_kernel(): load block_tables_ptr, elements 12–17 of 9, first program (5,)",
        ),
        # the page size or the width of the table right for the first batch only
        (
            SLOTS.format(
                position=POSITION,
                block="block = tl.load(block_tables_ptr + batch * 3 + position // 4)",
                slot=SLOT,
            ),
            "slots (page 5, seq_starts [4, 11], lengths [3, 6]): answer[0]",
        ),
        (
            SLOTS.format(position=POSITION, block=BLOCK.replace("stride_table", "3"), slot=SLOT),
            "slots (page 5, seq_starts [4, 11], lengths [3, 6]): answer[3]",
        ),
        (
            SLOTS.format(position=POSITION, block=BLOCK.replace("page_size", "4"), slot=SLOT),
            "cell:8 in slots_kernel(): load block_tables_ptr, element 8 of 8, first program (8,)",
        ),
    ],
    "04.3": [
        # the scale forgotten
        (gather(" * tl.load(scale_ptr)", ""), f"{FIRST}these are the numbers of the codes; the scale, 0.5, is missing"),
        # page_offset and block swapped
        (
            gather("(block * PAGE + page_offset)", "(page_offset * PAGE + block)"),
            f"{FIRST}cell:14 in my_gather_kernel(): load pool_ptr, elements 5184–5247",
        ),
        # no mask at the store, none at the load, none at all
        (gather("values, mask=inside", "values"), f"{SECOND}{PAST_THE_END}"),
        (gather("dim, mask=inside, other=0.0", "dim"), f"{SECOND}program 0, 0: a load of pool_ptr has 16 active lanes"),
        (gather("dim < DIM", "dim < LANES"), f"{SECOND}{PAST_THE_END}"),
        # right for the first size only
        (gather("dim < DIM", "dim < 32"), f"{SECOND}{PAST_THE_END}"),
        (gather("batch * stride_table", "batch * 3"), f"{SECOND}token 7, head 0 has numbers of a slot that no"),
        # the token in place of its position
        (gather(" - tl.load(cu_seqlens_ptr + batch)", ""), f"{FIRST}token 19, head 0 has "),
        # the head forgotten in the pool, and in the output
        (gather("num_heads + head\n", "num_heads\n"), f"{FIRST}token 0, head 1 has the numbers of block "),
        (gather("(token * num_heads + head)", "token"), f"{FIRST}token 0, head 0 has the numbers of block "),
        # HND in place of NHD
        (
            gather(
                "(block * PAGE + page_offset) * num_heads + head",
                "block * num_heads * PAGE + head * PAGE + page_offset",
            ),
            f"{FIRST}token 0, head 1 has the numbers of block ",
        ),
        # errors of Triton: the line and the cause
        (
            gather("position // PAGE)", "position / PAGE)"),
            "on line 9 of your cell: block = tl.load(block_table_ptr + batch * stride_table + position / PAGE) → an",
        ),
        (
            gather("tl.float32", "torch.float32"),
            "on line 15 of your cell: values = codes.to(torch.float32) * tl.load(scale_ptr) → a kernel's dtypes",
        ),
        (gather("@triton.jit\n", ""), "my_gather_kernel cannot be launched: the line @triton.jit above it is missing"),
    ],
    "04.4": [
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
