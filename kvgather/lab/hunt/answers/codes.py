"""E4M3FNUZ is decoded as E4M3FN."""

from __future__ import annotations

from ..bug import Bug, Thread
from ..kernels import codes

BUG = Bug(
    name="codes",
    title="Rubbish on one vendor's cards",
    report="On one vendor's cards FP8 answers are rubbish, BF16 is fine; the same formula is right elsewhere. The "
    "scales are equal on both.",
    difficulty=4,
    family="one FP8 format decoded as another",
    threads=(
        Thread("vllm-project/vllm#45720", "merged"),
        Thread("vllm-project/vllm#45562", "closed; its report"),
    ),
    module=codes,
    launcher="decode_codes",
    kernels=("codes_kernel",),
    passes=({"codes": "zeros"},),
    shows={"codes": "small"},
    hidden=({"codes": "all", "scale": 1.0}, {"codes": "all", "scale": 0.125}, {"codes": "part"}),
    arguments=("codes_ptr",),
    lines=(
        "normal = (1 + mantissa) * tl.exp2(exponent.to(tl.float32) - 7)",
        "small = mantissa / 64",
        'value = tl.where((code & 127) == 127, float("nan"), value)',
    ),
    programs=((0,),),
    near={
        "scale_ptr": "the scale is right, and halving it cures only what is typical",
        "tl.store(out_ptr + i, value * tl.load(scale_ptr), mask=inside)": "the value is wrong before it is scaled",
    },
    hints=(
        "Divide what you get by what you should get. Then try all 256 codes, not only typical ones.",
        "Chapter 02 compares E4M3FN and E4M3FNUZ: which bias do they have, and which codes are NaN?",
        "Bias 8 instead of 7, for normal and for subnormal numbers; NaN is 0x80 and nothing else.",
    ),
    found_by=("oracle", "poison"),
    why="The addresses have nothing to do with it. With zeros even the oracle is silent: only 0x00 means the same in "
    "both formats.",
    fix="bias 8 for normals and subnormals, and NaN at 0x80 alone",
    wrong_fixes=(
        "halve the scale: typical codes pass, 0x7F, 0x80 and 0xFF do not",
        "the bias of normal numbers alone: 17 codes are wrong",
    ),
    lesson="with 256 inputs, test 256 inputs",
)
