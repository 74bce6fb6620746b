"""The logarithms have base 2, the merge uses base e."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import merge

BUG = Bug(
    name="merge",
    title="The newest turn is overlooked",
    report="Answers drift after a prefix-cache hit: the model seems to overlook the newest turn. The cold run of the "
    "same prompt is fine, and the caches compare equal byte for byte.",
    difficulty=3,
    family="the base of a log-sum-exp",
    threads=(
        Thread("vllm-project/vllm#52796", "merged"),
        Thread("sgl-project/sglang#40903", "open; the same mismatch"),
        Thread("flashinfer-ai/flashinfer#2113", "about the convention"),
    ),
    module=merge,
    launcher="attend_in_two",
    kernels=("partial_kernel", "merge_kernel"),
    passes=({"cached": 8, "new": 8, "alike": True},),
    shows={"cached": 13, "new": 2},
    hidden=({"cached": 8, "new": 8}, {"cached": 1, "new": 14}, {"cached": 14, "new": 1}),
    tolerance=1e-5,
    arguments=("a_sums_ptr", "b_sums_ptr", "sums_ptr"),
    lines=(
        "a_weight, b_weight = tl.exp(a_sum - top), tl.exp(b_sum - top)",
        "tl.store(sums_ptr + head, top + tl.log2(total))",
    ),
    programs=((0,),),
    near={
        "q = tl.load(q_ptr + head * DIM + dim) * 1.4426950408889634": "log2 e makes exp2 of the scores right; follow "
        "the logarithm that leaves this kernel",
    },
    hints=(
        "Both partial results are right. Compute the weights that they should have, from the softmax over all keys, "
        "and compare them with those of the merge.",
        "What is the unit of `sums`? The docstring of the launcher says it. Which kernel keeps to it?",
        "The sums are logarithms to base 2, as the docstring says, and the merge raises e to them. Change the base in "
        "the merge, where the weights are computed. (`tl.log` in the partial kernel would add a natural logarithm to "
        "a maximum in base 2.)",
    ),
    found_by=("oracle", "poison"),
    why="Every address is right and every partial result too. Only the weights are wrong, and where both parts weigh "
    "the same, not even they.",
    fix="`exp2` in the merge, or a factor of ln 2 once where the sums leave the partial kernel",
    wrong_fixes=("natural log of the total while the maximum stays in base 2: a sum in two units",),
    lesson="the unit is a part of a tensor's contract; compare the weights before the outputs",
)
