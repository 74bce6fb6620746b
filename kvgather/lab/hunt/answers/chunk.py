"""A chunk that begins late runs past its row of the block table."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import chunk

NAN = float("nan")

BUG = Bug(
    name="chunk",
    title="Somebody else's prompt",
    report="With long cached prefixes a request sometimes continues with text from somebody else's prompt. Rarely the "
    "worker dies instead, and then the affected request is the last of its batch.",
    difficulty=2,
    family="a start beyond the row of the block table",
    threads=(
        Thread("vllm-project/vllm#45380", "open"),
        Thread("vllm-project/vllm#45462", "open"),
        Thread("vllm-project/vllm#49427", "merged; restores the guard"),
    ),
    module=chunk,
    launcher="gather_chunks",
    kernels=("chunk_kernel",),
    passes=({"lengths": [6, 5, 6], "starts": [0, 0, 0]},),
    also=({"lengths": [6, 5, 4], "starts": [4, 2, 4]},),
    shows={"lengths": [6, 5, 6], "starts": [4, 2, 4]},
    hidden=(
        {"lengths": [6, 5, 4], "starts": [4, 2, 4]},
        {"lengths": [3, 8, 1], "starts": [9, 0, 7]},
        {"lengths": [5], "starts": [40]},
        {"lengths": [9, 12], "starts": [4, 3], "width": 3},
        {"lengths": [0, 4], "starts": [8, 5]},
        {"lengths": [6, 5, 6], "starts": [4, 2, 4], "rest": NAN},
    ),
    poisoned={"lengths": [6, 5, 6], "starts": [4, 2, 4], "rest": NAN},
    tight=True,
    uncopied=("k",),
    arguments=("table_ptr",),
    lines=(
        "block = tl.load(table_ptr + request * width + column)",
        "column = position // PAGE",
    ),
    programs=((0, 4),),
    near={
        "k_ptr": "K is read where the block id says; is the block id one of this request?",
        "k = tl.load(k_ptr + slot * DIM + dim)": "that load may crash, but its block id is wrong already",
        (2, 4): "program (2, 4) is the first that leaves the table; an earlier one reads the row of another request",
        (2, 5): "program (2, 5) leaves the table, and it is not the first that reads a wrong entry",
    },
    hints=(
        "Start with the result: which row is the first that is wrong, and of which request is it? Then ask the trace, "
        "and compare.",
        "A table of 2 columns and pages of 4 slots covers positions 0 to 7. Which positions does request 0 have?",
        "`column` is never compared with `width`. Column 2 of request 0 is column 0 of request 1; of the last request "
        "it lies behind the table. By contract such rows are zero.",
    ),
    found_by=("oracle", "poison", "report", "strict", "fence"),
    why="Rows of a tensor have no fence between them: for request 0 only the oracle is right to complain. The trace "
    "and the fence see the last request, whose next row does not exist.",
    fix="`column < width` masks both loads, so that the row is zero",
    wrong_fixes=("clamp the column to width − 1: an empty report, and tokens repeated",),
    lesson="the line that crashes is not always the line that is wrong, and the first report is not the first fault",
)
