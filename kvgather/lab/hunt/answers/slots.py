"""The tail of the positions is loaded without a mask."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import slots

BUG = Bug(
    name="slots",
    title="The worker that dies once a week",
    report="Slots come out right, and all tests pass. In one deployment the worker dies in this kernel about once a "
    "week, always with a batch that is no multiple of eight.",
    difficulty=1,
    family="a tail is loaded without a mask",
    threads=(Thread("flagos-ai/FlagGems#5231", "merged"),),
    module=slots,
    launcher="slots_of",
    kernels=("slots_kernel",),
    passes=({"n": 8}, {"n": 16}),
    shows={"n": 21},
    hidden=({"n": 1}, {"n": 7}, {"n": 9, "page_size": 8}, {"n": 24}, {"n": 34, "page_size": 2}),
    tight=True,
    arguments=("positions_ptr",),
    lines=("position = tl.load(positions_ptr + token)",),
    programs=((2,),),
    near={
        "table_ptr": "the table's load has a mask; which load has none?",
        "slots_ptr": "the store has a mask; which access has none?",
    },
    hints=(
        "The results are right, so a comparison of results cannot find it. Ask a tool that watches addresses, in a "
        "geometry with a tail.",
        "21 tokens in programs of 8 leave 3 lanes without a token. Look at each load and store: which of them knows?",
        "`inside` guards the second load and the store. The first load reads 3 positions that do not exist; their "
        "values are never used.",
    ),
    found_by=("report", "strict", "fence"),
    why="The bad lanes are masked before their values count, so every result is right. A trace and a fence look at "
    "addresses.",
    fix="the mask of the store on the first load too",
    wrong_fixes=("clamp the index to n: right results, and still one element too far; n − 1 would be right",),
    lesson="a right result proves nothing about reads: make a tail, and put a fence behind it",
)
