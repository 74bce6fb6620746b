"""The block stride is rebuilt from the page size, and the pool is interleaved."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import pages

NAN = float("nan")

BUG = Bug(
    name="pages",
    title="Fluent nonsense after a change of the allocation",
    report="We moved K and V into one allocation. Since then hybrid models produce fluent nonsense; nothing crashes. "
    "Requests whose pages are all block 0 are fine.",
    difficulty=2,
    family="the block stride is rebuilt, not taken from the tensor",
    threads=(Thread("ROCm/aiter#3498", "merged"),),
    module=pages,
    launcher="copy_pages",
    kernels=("pages_kernel",),
    passes=({"table": [4, 1, 3], "planes": 1}, {"table": [0]}),
    shows={"table": [4, 1, 3]},
    hidden=(
        {"table": [4, 2]},
        {"table": [5, 0, 3], "planes": 1},
        {"table": [4, 1, 3], "planes": 2, "plane": 1},
        {"table": [3, 4, 1], "planes": 3, "plane": 1},
        {"table": [2, 5], "planes": 2, "gap": 8},
        {"table": [4, 1, 3], "rest": NAN},
    ),
    poisoned={"table": [4, 1, 3], "rest": NAN},
    uncopied=("k",),
    arguments=("k_ptr",),
    lines=(
        "first = block * PAGE * stride_k_slot",
        "rows = tl.load(k_ptr + first + row * stride_k_slot + dim)",
    ),
    programs=((0,),),
    near={
        (1,): "program (1,) is the first that leaves K; an earlier one reads K of the wrong block",
        (2,): "program (2,) is neither the first that leaves K, nor the first with a wrong row",
        "pages_kernel[(len(table),)](out, k, table, k.stride(1), PAGE=page_size, DIM=dim)": "the launcher passes too "
        "little; name the line of the kernel that relies on it",
        "table_ptr": "the block ids are read right; what is made of them?",
    },
    hints=(
        "What does a trace say, and is its first program the first with a wrong row? Compare with the oracle, page by "
        "page.",
        "Print `k.stride()` for both pools of the script. Which of these numbers does the launcher pass?",
        "The kernel takes the next block to be `PAGE * stride_k_slot` further. In an interleaved pool V lies between: "
        "the launcher has to pass `k.stride(0)`.",
    ),
    found_by=("oracle", "poison", "strict"),
    why="Every address lies between the first and the last element of K, so that only a strict report sees it: odd "
    "blocks land in V. Even blocks land in K of block b / 2, where no report helps. A fence copies K to contiguous "
    "memory, where the kernel is right.",
    fix="pass `k.stride(0)` and use it",
    wrong_fixes=(
        "a factor of 2 in the kernel: a contiguous K is read outside, and three planes are wrong in silence",
        "`.contiguous()` in the launcher: right, and copies the whole pool at each call",
    ),
    lesson="inside the span is not inside the tensor; an empty strict report is necessary, and not sufficient",
)
