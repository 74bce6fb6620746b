"""Plausible wrong answers of chapter 07, and what the check must say to each."""

SECTORS = """def sectors_of(addresses, width):
    return {answer}
"""

IN_FLIGHT = """def in_flight(codes, warps):
    return {answer}
"""

PLACE = """def place(lane):
    return {answer}
"""

COPY = """@triton.jit
def copy_page_kernel(out_ptr, k_ptr, block, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):
    page_offset = tl.arange(0, PAGE)[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None]
    dim = {dim}
    at = (block * HEADS + head) * (PAGE * DIM) + (dim // 16) * (PAGE * 16) + page_offset * 16 + dim % 16
    codes = tl.load(k_ptr + at)
    tl.store(out_ptr + {to}, codes)
"""

LOOP = """@triton.jit
def copy_page_kernel(out_ptr, k_ptr, block, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):
    page_offset = tl.arange(0, PAGE)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    for head in range(HEADS):
        at = (block * HEADS + head) * (PAGE * DIM) + (dim // 16) * (PAGE * 16) + page_offset * 16 + dim % 16
        tl.store(out_ptr + (page_offset * HEADS + head) * DIM + dim, tl.load(k_ptr + at))
"""

HELPER = """@triton.jit
def byte_of(block, head, page_offset, dim, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):
    return (block * HEADS + head) * (PAGE * DIM) + (dim // 16) * (PAGE * 16) + page_offset * 16 + dim % 16


@triton.jit
def copy_page_kernel(out_ptr, k_ptr, block, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):
    page_offset = tl.arange(0, PAGE)[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None]
    dim = tl.arange(0, DIM)[None, None, :]
    codes = tl.load(k_ptr + byte_of(block, head, page_offset, dim, HEADS, PAGE, DIM))
    tl.store(out_ptr + (page_offset * HEADS + head) * DIM + dim, codes)
"""

WRONG = {
    "07.1": [
        # the first byte of each lane alone
        (
            SECTORS.format(answer="len({address // 32 for address in addresses})"),
            "one lane, 16 bytes, from byte 24: expected 2, got 1",
        ),
        # as many as the bytes would fill
        (SECTORS.format(answer="len(addresses) * width // 32"), "from byte 72: expected 2, got 1"),
        # from the first to the last
        (
            SECTORS.format(answer="(max(addresses) + width - 1) // 32 - min(addresses) // 32 + 1"),
            "256 apart: expected 32, got 249",
        ),
    ],
    "07.2": [
        # the limit of 32 programs forgotten
        (IN_FLIGHT.format(answer="64 // warps * codes"), "programs of 1 warps that load 2048 bytes each: expected"),
        # the limit of 64 warps forgotten
        (IN_FLIGHT.format(answer="32 * codes"), "expected 2048, got 4096"),
        # programs are whole
        (IN_FLIGHT.format(answer="min(64 / warps, 32) * codes"), "expected 3600, got 3840"),
    ],
    "07.3": [
        # one token, all dims: what the kernel of chapter 04 does
        (PLACE.format(answer="0, lane"), "the byte that lane 1 reads: expected 1, got 16"),
        # the right numbers, the wrong way round
        (PLACE.format(answer="lane // 16, lane % 16"), "the byte that lane 1 reads: expected 1, got 16"),
        # a page of 32 tokens
        (PLACE.format(answer="lane, 0"), "lane 16: page_offset 16, dim 0 is not in a page of 16, 64 dims"),
        # no integers
        (PLACE.format(answer="lane % 16, lane / 16"), "lane 0: expected two ints, page_offset and dim, got (0, 0.0)"),
        # one number
        (PLACE.format(answer="lane"), "lane 0: expected two ints, page_offset and dim, got 0"),
        (
            PLACE.format(answer="(lane % 16, lane // 16, 0)"),
            "lane 0: expected two ints, page_offset and dim, got (0, 0, 0)",
        ),
    ],
    "07.4": [
        # rows without their heads
        (
            COPY.format(dim="tl.arange(0, DIM)[None, None, :]", to="page_offset * DIM + head * DIM + dim"),
            "the page [page_offset, head, dim]",
        ),
        # heads outside tokens
        (
            COPY.format(dim="tl.arange(0, DIM)[None, None, :]", to="(head * PAGE + page_offset) * DIM + dim"),
            "the page [page_offset, head, dim]",
        ),
        # dims from the last to the first: the right values, and no run of bytes
        (
            COPY.format(
                dim="DIM - 1 - tl.arange(0, DIM)[None, None, :]", to="(page_offset * HEADS + head) * DIM + dim"
            ),
            "right values, but",
        ),
        # a loop over the heads: two codes for each lane
        (
            LOOP,
            "right values, but 8 × ld.global.b16: 2 byte(s) a lane; 16 codes for each lane of 16 warps are the whole",
        ),
        # a part of the kernel in a function of its own
        (HELPER, "right values, but your kernel calls byte_of; the check compiles one function: put it inside"),
        # a name of the notebook
        (
            "NO_DIM = 0\n\n\n"
            + COPY.format(
                dim="tl.arange(0, DIM)[None, None, :] + NO_DIM", to="(page_offset * HEADS + head) * DIM + dim"
            ),
            "NameError('NO_DIM is not defined'); keep the kernel in one function",
        ),
        # the decorator lost
        ("def copy_page_kernel(*arguments):\n    pass", "expected a Triton kernel, got function"),
    ],
}
