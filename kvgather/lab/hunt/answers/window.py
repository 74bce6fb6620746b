"""The window begins one key late."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import window

BUG = Bug(
    name="window",
    title="Slightly worse than two other backends",
    report="A model with sliding-window layers scores slightly worse on this backend than on two others, only for "
    "prompts longer than the window. No errors, no NaN.",
    difficulty=2,
    family="a window that is one key short",
    threads=(
        Thread("sgl-project/sglang#32087", "closed"),
        Thread("lightseekorg/tokenspeed#578", "merged"),
    ),
    module=window,
    launcher="window_attention",
    kernels=("window_kernel",),
    passes=({"lengths": [7, 3, 5]},),
    shows={"lengths": [12, 3, 8]},
    unpoisoned={"lengths": [12, 3, 8], "rest": 0.0},
    hidden=(
        {"lengths": [12, 3, 8], "marked": True},
        {"lengths": [7, 3, 5], "marked": True},
        {"lengths": [8, 8, 8], "marked": True},
        {"lengths": [9, 1, 6], "window_left": 0, "marked": True},
        {"lengths": [16, 5, 4], "window_left": 4, "tokens": 16, "marked": True},
    ),
    tolerance=1e-5,
    arguments=("k_ptr", "v_ptr"),
    lines=("first = tl.maximum(length - left, 0)",),
    programs=((0,),),
    near={
        "lengths_ptr": "the lengths are read right; of which argument is a row missing?",
        (1,): "request 1 has 3 tokens, fewer than the window",
        (2,): "program (2,) is wrong too, and not the first",
    },
    hints=(
        "All addresses are good, so no report will help. Choose K and V so that the result says which rows were read: "
        "`inputs(lengths, marked=True)` does.",
        'Count the rows of K that program (0,) touches: `t.bytes_touched("k_ptr", (0,))`, at lengths 7, 8 and 12.',
        "`window_left` counts the keys *before* the query's own key. The last key is `length - 1`, so the first is "
        "`length - 1 - left`; short requests still begin at 0.",
    ),
    found_by=("oracle", "poison"),
    why="The kernel reads too little, and everything that it reads is its own. A tool that judges addresses says "
    "nothing of a row that is not read.",
    fix="subtract 1 before clamping at 0",
    wrong_fixes=("subtract 1 after the clamp, or without it: short requests read before their first key",),
    lesson="make inputs that say which rows were read, and test at window − 1, window and window + 1",
)
