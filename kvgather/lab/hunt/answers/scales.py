"""The scale has another order of axes than the codes."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import scales

NAN = float("nan")

BUG = Bug(
    name="scales",
    title="Fine with one scale for all",
    report="Quality drops as soon as scales are per token and head; with one scale for all it is fine. Models with one "
    "KV head are not affected.",
    difficulty=3,
    family="the order of a scale's axes",
    threads=(
        Thread("sgl-project/sgl-kernel-npu#709", "open"),
        Thread("vllm-project/vllm#49716", "about KV scales"),
    ),
    module=scales,
    launcher="scaled_rows",
    kernels=("scales_kernel",),
    passes=({"table": [4, 1, 3], "equal": True}, {"table": [4, 1, 3], "heads": 1}),
    shows={"table": [4, 1, 3]},
    hidden=(
        {"table": [5, 0], "heads": 4},
        {"table": [2, 5, 0], "heads": 3, "page_size": 8},
        {"table": [5], "heads": 1, "page_size": 2},
        {"table": [1, 4], "heads": 8, "page_size": 2},
        {"table": [4, 1, 3], "rest": NAN},
    ),
    poisoned={"table": [4, 1, 3], "rest": NAN},
    uncopied=("codes", "scale"),
    arguments=("scale_ptr",),
    lines=("scale = tl.load(scale_ptr + row)",),
    programs=((0, 0),),
    near={
        "row = (block * PAGE + page_offset) * HEADS + head": "that row is right for the codes; who else uses it?",
        "codes_ptr": "the codes are [block, page_offset, head], as the kernel reads them",
        (0, 1): "program (0, 1) is wrong too; program (0, 0) is right for its first token only",
    },
    hints=(
        "A permutation stays inside, so reports are empty. Compare the elements that one program reads with those that "
        'belong to it: `t.select("scale_ptr", program=(0, 0))`.',
        "Which elements of `scale` [block, head, page_offset] belong to block 4, head 0? Which are read?",
        "`row` is the row of the codes, [block, page_offset, head]. The scale needs "
        "`(block * HEADS + head) * PAGE + page_offset`.",
    ),
    found_by=("oracle", "poison"),
    why="The kernel reads each scale of the block once, in another order: every address is inside, also for strict. "
    "With equal scales, or one head, the order does not matter.",
    fix="`(block * HEADS + head) * PAGE + page_offset` for the scale",
    wrong_fixes=(
        "`scale.transpose(1, 2)` in the launcher: the same pointer, so that nothing changes",
        "half a swap, `(block * HEADS + page_offset) * PAGE + head`: outside, but not where HEADS equals PAGE",
    ),
    lesson="a permutation stays inside: compare the elements of a program with those that it owns",
)
