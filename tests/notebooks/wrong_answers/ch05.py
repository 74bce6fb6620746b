"""Plausible wrong answers of chapter 05, and what the check must say to each."""

TOKEN = "def token_of(element, num_heads, page_size):\n    return {}\n"
FENCE = """with trace() as found:
    planted.run(lengths, cu_seqlens)


def lay_out(lengths, cu_seqlens):
    return {}
"""
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
            TOKEN.format("element // (num_heads * page_size), element % num_heads, element // num_heads % page_size"),
            "element 147, 2 heads, page 16: answer[2]: expected 3, got 9",
        ),
        # the heads of all blocks counted on
        (
            TOKEN.format("element // (num_heads * page_size), element // page_size, element % page_size"),
            "element 147, 2 heads, page 16: answer[1]: expected 1, got 9",
        ),
        # the place in the block of all heads, not of one
        (
            TOKEN.format(
                "element // (num_heads * page_size), element // page_size % num_heads, "
                "element % (num_heads * page_size)"
            ),
            "element 147, 2 heads, page 16: answer[2]: expected 3, got 19",
        ),
        # a pool's slot, without heads
        (TOKEN.format("element // page_size, 0, element % page_size"), "answer[0]: expected 4, got 9"),
    ],
    "05.2": [
        # the end is guarded by the mask
        (FENCE.format("lengths, fenced(cu_seqlens)"), "exit 0: the kernel touched no fence"),
        # the store at i - 1 is masked
        (FENCE.format('fenced(lengths, side="before"), cu_seqlens'), "exit 0: the kernel touched no fence"),
        # the values are another's
        (
            FENCE.format('lengths, fenced(cu_seqlens + 1, side="before")'),
            "cu_seqlens has another dtype, shape or values",
        ),
        # one tensor instead of the two
        (FENCE.format('fenced(cu_seqlens, side="before")'), "expected two tensors, lengths and cu_seqlens, got Tensor"),
        # a word that fenced does not know
        (FENCE.format('lengths, fenced(cu_seqlens, side="left")'), "your function raised FenceError: side is 'left'"),
        # the fence without the trace
        (
            "found = []\ndef lay_out(lengths, cu_seqlens):\n    return lengths, fenced(cu_seqlens, side='before')\n",
            "found is list; record it",
        ),
        # the trace of nothing
        (
            "with trace() as found:\n    pass\ndef lay_out(lengths, cu_seqlens):\n    return lengths, cu_seqlens\n",
            "found has no access outside cu_seqlens",
        ),
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
