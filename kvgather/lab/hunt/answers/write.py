"""Padding is written to the last slot of the pool."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import write

BUG = Bug(
    name="write",
    title="The owner of the last slot",
    report="Under full load one request in some thousands is corrupt from its first new token. It owns the last slot "
    "of the pool every time. With captured graphs off it never happens.",
    difficulty=4,
    family="padding sent to a slot that somebody owns",
    threads=(
        Thread("sgl-project/sglang#36880", "found by an audit; fixed by #36885, merged"),
        Thread("vllm-project/vllm#43810", "closed; the same in another engine"),
    ),
    module=write,
    launcher="write_rows",
    kernels=("write_kernel",),
    passes=({"slots": [3, 7, 9]}, {"slots": [-1, 3, 15]}),
    shows={"slots": [3, 15, 9, -1]},
    hidden=(
        {"slots": [3, 7, 9, -1]},
        {"slots": [-1, 3, 15]},
        {"slots": [5, -1, -1, 8], "num_slots": 9},
        {"slots": [-1, -1]},
        {"slots": [6, 1, -1, 2], "padding": float("nan")},
    ),
    uncopied=("pool",),
    arguments=("pool_ptr", "slots_ptr"),
    lines=(
        "slot = tl.where(slot < 0, num_slots - 1, slot)",
        "tl.store(pool_ptr + slot * DIM + dim, row)",
    ),
    programs=((3,),),
    near={
        (1,): "program (1,) writes what belongs there, before somebody else does",
        "new_ptr": "the new rows are read right; where does the last one go?",
    },
    hints=(
        "Compare the whole pool, not only the rows of real tokens. Then ask which programs store to the row that is "
        "wrong.",
        "Programs (1,) and (3,) store to the same row. Which of them has a token?",
        "Slot −1 is padding, and goes to no slot: a mask on the store. Slot 0 is reserved and must stay as it is.",
    ),
    found_by=("oracle", "poison", "writers"),
    why="The last slot is inside the pool. The interpreter runs programs in order: with the real token last, even the "
    "result is right. Two programs with one address are a fault whoever wins.",
    fix="a mask on the store, `slot >= 0`",
    wrong_fixes=(
        "send padding to slot 0: the reserved row changes",
        "delete the mapping: the store goes to row −1, before the pool",
    ),
    lesson="compare the whole pool; two programs with one address are a fault even when the right one wins",
)
