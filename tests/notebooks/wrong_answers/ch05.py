"""Plausible wrong answers of chapter 05, and what the check must say to each."""

ELEMENT = "def element_read(block, head, page_offset, num_heads, page_size):\n    return {}\n"
FENCE = "argument = {!r}\nside = {!r}\n"
KERNEL = """@triton.jit
def lengths_kernel(lengths_ptr, cu_seqlens_ptr, batch, LANES: tl.constexpr):
    i = tl.arange(0, LANES)
    inside = i <= batch
    end = tl.load(cu_seqlens_ptr + i, mask=inside, other=0)
    start = tl.load(cu_seqlens_ptr + i - 1, mask={mask}, other=0)
    tl.store(lengths_ptr + i - 1, end - start, mask={store})
"""

WRONG = {
    "05.1": [
        # the order of an NHD pool, not of the scale
        (
            ELEMENT.format("(block * page_size + page_offset) * num_heads + head"),
            "block 4, head 1, page_offset 3, 2 heads, page 16: expected 147, got 135",
        ),
        # the head forgotten
        (ELEMENT.format("block * num_heads * page_size + page_offset"), "2 heads, page 16: expected 147, got 131"),
        # the slot instead of the page offset
        (
            ELEMENT.format("(block * num_heads + head) * page_size + block * page_size + page_offset"),
            "expected 147, got 211",
        ),
    ],
    "05.2": [
        # the end is guarded by the mask
        (FENCE.format("cu_seqlens_ptr", "after"), "exit 0: the kernel touched nothing after cu_seqlens_ptr"),
        # the store at i - 1 is masked
        (FENCE.format("lengths_ptr", "before"), "exit 0: the kernel touched nothing before lengths_ptr"),
        (FENCE.format("cu_seqlens", "before"), "argument is 'cu_seqlens'; accepted: lengths_ptr, cu_seqlens_ptr"),
    ],
    "05.3": [
        # the other end of the mask lost
        (KERNEL.format(mask="i > 0", store="inside & (i > 0)"), "a load of cu_seqlens_ptr at element 6; it has 6"),
        # one lane too few
        (
            KERNEL.format(mask="inside & (i > 1)", store="inside & (i > 1)"),
            "lengths of the sequences that begin at [0, 3, 3, 7, 8]: answer[0]: expected 3, got -1",
        ),
        # the load is fixed and the store is not
        (KERNEL.format(mask="inside & (i > 0)", store="inside"), "a store of lengths_ptr at element -1; it has 5"),
    ],
}
