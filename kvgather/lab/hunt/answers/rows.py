"""A product of a block id and a stride passes 2^31."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import rows

BUG = Bug(
    name="rows",
    title="The first hundred requests are perfect",
    report="A larger GPU, the same model: the first hundred requests are perfect, then an illegal address, reported by "
    "a later kernel. On a still larger pool there is no error, only wrong text.",
    difficulty=3,
    family="a product in int32",
    threads=(
        Thread("vllm-project/vllm#47671", "merged"),
        Thread("vllm-project/vllm#50427", "open"),
    ),
    module=rows,
    launcher="gather_rows",
    kernels=("rows_kernel",),
    passes=({"table": [3, 2047], "blocks": 2100},),
    also=({"table": [3, 4099], "blocks": 4200},),
    shows={"table": [3, 2048, 2099], "blocks": 2100},
    hidden=(
        {"table": [2099, 0, 2048, 1, 2050], "blocks": 2100},
        {"table": [4099, 3], "blocks": 4200},
        {"table": [4150, 2], "blocks": 4200, "stride": 2**19},
    ),
    uncopied=("pool",),
    arguments=("pool_ptr",),
    lines=(
        "row = block * stride_block + token % PAGE * DIM",
        "codes = tl.load(pool_ptr + row[:, None] + dim, mask=inside[:, None], other=0)",
    ),
    programs=((0,),),
    near={
        "table_ptr": "the block ids are read right; what is made of them?",
        "block = tl.load(table_ptr + token // PAGE, mask=inside, other=0)": "the ids are right here; the next line "
        "multiplies them",
    },
    hints=(
        "Blocks 3 and 2047 are fine, 2048 is not. What happens between them? A trace says which element is read.",
        "Read −2147483648 as 2³² too little. Of which type are `block` and `stride_block`, and their product?",
        "The product passes 2³¹ and wraps in int32. The block id has to be int64 *before* it is multiplied.",
    ),
    found_by=("oracle", "poison", "report", "strict"),
    why="The wrapped offset is negative, so that a trace sees it; with block 4099 it is positive again, inside the "
    "pool, and only the oracle knows. A fence copies the blocks next to each other, where no product is large.",
    fix="the block id to int64 before the product",
    wrong_fixes=("cast the product, or the token: it has wrapped already",),
    ignored={
        "stride_block: int64": "`tl.int64` in the signature is a fix on a GPU, but the interpreter ignores "
        "annotations, so it cannot be checked here; widen in the body, such as `block.to(tl.int64)`",
    },
    lesson="read a huge negative element as 2³² too little; widen before a product, not after it",
)
