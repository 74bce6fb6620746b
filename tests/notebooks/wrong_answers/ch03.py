"""Plausible wrong answers of chapter 03, and what the check must say to each."""

from __future__ import annotations

HND = """def hnd_byte(block, head, page_offset, dim, num_heads, page_size, head_dim, itemsize):
    return {}
"""
LOAD = """def elements_of_load(which, page_offset, dim, itemsize):
    x = {x}
    if which == "key":
        return {key}
    return {value}
"""
KEY, VALUE = (
    "[(page_offset, dim // x * x + i) for i in range(x)]",
    "[(page_offset // x * x + i, dim) for i in range(x)]",
)
SHUFFLE = """def shuffle_key(nhd):
    blocks, page, heads, dim = nhd.shape
    x = {x}
    return {result}
"""
UNPACK = """def unpack(packed):
    return {}, {}
"""

WRONG: dict[str, list[tuple[str, str]]] = {
    "03.1": [
        # the formula of NHD
        (
            HND.format("(((block * page_size + page_offset) * num_heads + head) * head_dim + dim) * itemsize"),
            "page_offset 5, dim 0",
        ),
        # elements instead of bytes
        (
            HND.format("((block * num_heads + head) * page_size + page_offset) * head_dim + dim"),
            "expected 14, got 7",
        ),
        # the sizes of two axes exchanged
        (
            HND.format("(((block * page_size + head) * num_heads + page_offset) * head_dim + dim) * itemsize"),
            "head 1, page_offset 0",
        ),
        # the strides of the example, whatever the sizes
        (
            HND.format("(block * 1024 + page_offset * 32 + head * 512 + dim) * itemsize"),
            "3 heads, page 10, head_dim 24",
        ),
        (HND.format("block / 0"), "ZeroDivisionError: division by zero, on line 2 of your cell"),
    ],
    "03.2": [
        # V as if it were K
        (
            LOAD.format(x="16 // itemsize", key=KEY, value=KEY),
            "value, page_offset 5, dim 20, itemsize 1: answer[0][0]:",
        ),
        # always 16 elements
        (LOAD.format(x="16", key=KEY, value=VALUE), "itemsize 2"),
        # begins at the element instead of at a multiple of 16 bytes
        (
            LOAD.format(x="16 // itemsize", key="[(page_offset, dim + i) for i in range(x)]", value=VALUE),
            "key, page_offset 5, dim 20, itemsize 1: answer[0][1]: expected 16, got 20",
        ),
        # (dim, page_offset)
        (
            LOAD.format(x="16 // itemsize", key="[(dim // x * x + i, page_offset) for i in range(x)]", value=VALUE),
            "expected 5, got 16",
        ),
    ],
    "03.3": [
        # the bytes stay where they were
        (
            SHUFFLE.format(x="16 // nhd.element_size()", result="nhd.view(blocks, heads, dim // x, page, x)"),
            "answer[",
        ),
        # no transpose of pieces and page offsets
        (
            SHUFFLE.format(
                x="16 // nhd.element_size()",
                result="nhd.view(blocks, page, heads, dim // x, x).permute(0, 2, 1, 3, 4).contiguous()",
            ),
            "expected shape [3, 2, 2, 16, 16], got [3, 2, 16, 2, 16]",
        ),
        # x of FP8 for every dtype
        (
            SHUFFLE.format(
                x="16", result="nhd.reshape(blocks, page, heads, -1, x).permute(0, 2, 3, 1, 4).contiguous()"
            ),
            "your code raised RuntimeError",
        ),
        # a view that nobody wrote down
        (
            SHUFFLE.format(
                x="16 // nhd.element_size()",
                result="nhd.view(blocks, page, heads, dim // x, x).permute(0, 2, 3, 1, 4)",
            ),
            "the pool must be contiguous",
        ),
    ],
    "03.4": [
        # a view of the wrong axes: K and V of two heads get mixed
        (
            UNPACK.format(*(f"packed.view(3, 2, 2, 16, 32)[:, {i}].transpose(1, 2)" for i in (0, 1))),
            "key_cache: answer[",
        ),
        # HND
        (UNPACK.format("packed[:, :, 0]", "packed[:, :, 1]"), "expected shape [3, 16, 2, 32], got [3, 2, 16, 32]"),
        # a copy
        (
            UNPACK.format(*(f"packed[:, :, {i}].transpose(1, 2).contiguous()" for i in (0, 1))),
            "key_cache has the right values, but is a copy",
        ),
        # V forgotten
        (
            UNPACK.format(*["packed[:, :, 0].transpose(1, 2)"] * 2),
            "value_cache: answer[0, 0, 0, 0]: expected 512, got 0",
        ),
    ],
}
