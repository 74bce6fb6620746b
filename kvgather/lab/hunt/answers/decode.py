"""V behind the last token is multiplied by 0, and 0 times NaN is NaN."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import decode

NAN, INF = float("nan"), float("inf")

BUG = Bug(
    name="decode",
    title="A row of exclamation marks",
    report="Now and then one answer is a row of exclamation marks. It never happens on a fresh server, and a restart "
    "cures it for hours.",
    difficulty=3,
    family="0 · NaN behind the last token",
    threads=(
        Thread("vllm-project/vllm#47305", "merged"),
        Thread("huggingface/transformers#46765", "the same in another engine"),
    ),
    module=decode,
    launcher="decode_attention",
    kernels=("decode_kernel",),
    passes=({"lengths": [8, 10]}, {"lengths": [8, 12], "rest": NAN}),
    shows={"lengths": [8, 10], "rest": NAN},
    unpoisoned={"lengths": [8, 10]},
    hidden=(
        {"lengths": [8, 10], "rest": INF},
        {"lengths": [1, 7, 4], "rest": NAN},
        {"lengths": [5, 2], "rest": NAN, "rest_of_k": 1e6},
        {"lengths": [11, 3], "rest": -INF, "rest_of_k": NAN},
    ),
    tolerance=1e-5,
    uncopied=("k", "v"),
    arguments=("v_ptr",),
    lines=(
        "v = tl.load(v_ptr + at)",
        "values = values * old + tl.sum(weight[:, None] * v, 0)",
    ),
    programs=((1,),),
    near={
        "k_ptr": "`tl.where` replaces the scores of these keys, whatever they are; what meets the weight 0?",
        "k = tl.load(k_ptr + at)": "`tl.where` replaces these scores, whatever they are; what meets the weight 0?",
        (0,): "request 0 has 8 tokens: its last page is full",
    },
    hints=(
        "A fresh server has zeros in its pool. Fill what no token owns with something worse, and compare again.",
        "Which rows of V does program (1,) read that are not of its 10 tokens? What is their weight?",
        "Their weight is 0, and 0 · NaN is NaN: the load of V needs the mask `inside`, with `other=0.0`.",
    ),
    found_by=("poison",),
    why="The rows behind the last token are inside the pool, so every report is empty, and with finite numbers in them "
    "a weight of 0 hides them. Only an oracle on a poisoned pool sees them.",
    fix="load V (and K) with the mask, and 0 for the others",
    wrong_fixes=(
        "mask K alone: the scores were never the problem",
        "replace NaN in the output by 0: the row is lost all the same",
        "zero the pool at the start: slots are reused, so that it only delays the day",
    ),
    lesson="poison what nobody owns before you believe an oracle",
)
