"""Plausible wrong answers of chapter 02, and what the check must say to each."""

from __future__ import annotations

DECODE = """def decode_code(code):
    sign = -1.0 if code >= 128 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    {nan}
    {zero}
    return sign * 2.0 ** (exponent - {bias}) * (1 + mantissa / 8)
"""
NAN = "if exponent == 15 and mantissa == 7: return float('nan')"
ZERO = "if exponent == 0: return sign * 2.0**-6 * mantissa / 8"
FNUZ = """def to_fnuz(codes, scale):
    converted = {start}
    {steps}
    return converted, {scale}
"""
MINUS_ZERO, NANS = "converted[codes == 0x80] = 0x00", "converted[(codes & 0x7F) == 0x7F] = 0x80"
SCALES = """def head_scales(k, limit):
    return {}
"""
STORE = """def store(x, scales, fmt):
    return {}
"""

WRONG: dict[str, list[tuple[str, str]]] = {
    "02.1": [
        # no subnormal numbers
        (DECODE.format(nan=NAN, zero="pass", bias=7), "code 0x00: expected 0, got 0.0078125"),
        # no NaN
        (DECODE.format(nan="pass", zero=ZERO, bias=7), "code 0x7f: expected nan, got 480"),
        # an infinity, as in formats that have one
        (
            DECODE.format(nan="if exponent == 15: return sign * float('inf')", zero=ZERO, bias=7),
            "code 0x78: expected 256",
        ),
        # the bias of the other flavour
        (DECODE.format(nan=NAN, zero=ZERO, bias=8), "code 0x08: expected 0.015625, got 0.0078125"),
        # the sign bit taken for a part of the exponent
        (
            DECODE.replace(">> 3 & 15", ">> 3").format(nan=NAN, zero=ZERO, bias=7),
            "code 0x80",
        ),
    ],
    "02.2": [
        # only the scale
        (FNUZ.format(start="codes.clone()", steps="pass", scale="scale * 2"), "the value of 0x7f"),
        # −0 only: a NaN becomes a number
        (FNUZ.format(start="codes.clone()", steps=MINUS_ZERO, scale="scale * 2"), "0x7f: expected nan, got 240"),
        # NaN first and −0 after it, on the converted codes
        (
            FNUZ.format(
                start="codes.clone()",
                steps=f"{NANS}; {MINUS_ZERO.replace('codes ==', 'converted ==')}",
                scale="scale * 2",
            ),
            "the value of 0x7f, which became 0x00: expected nan, got 0",
        ),
        # the scale forgotten, halved
        (FNUZ.format(start="codes.clone()", steps=f"{MINUS_ZERO}; {NANS}", scale="scale"), "the value of 0x01"),
        (FNUZ.format(start="codes.clone()", steps=f"{MINUS_ZERO}; {NANS}", scale="scale / 2"), "the value of 0x01"),
        # the codes used as indices
        (
            FNUZ.format(
                start="codes.clone()",
                steps="converted[128] = 0; converted[127] = 0x80; converted[255] = 0x80",
                scale="scale * 2",
            ),
            "your code raised IndexError: index 128 is out of bounds for dimension 0 with size 16, on line 3",
        ),
        # the scale right for the notebook's 0.5 only
        *(
            (
                FNUZ.format(start="codes.clone()", steps=f"{MINUS_ZERO}; {NANS}", scale=scale),
                "scale 0.3: the value of 0xfe, which became 0xfe: expected -134.4, got -",
            )
            for scale in ("1.0", "scale + 0.5", "0.5 / scale", "4 * scale * scale")
        ),
        # the given codes overwritten
        (
            FNUZ.format(
                start="codes",
                steps="nan = (codes & 0x7F) == 0x7F; codes[codes == 0x80] = 0; codes[nan] = 0x80",
                scale="scale * 2",
            ),
            "the argument, which must not change",
        ),
    ],
    "02.3": [
        # the largest number instead of the largest magnitude
        (SCALES.format("k.amax((0, 2)) / limit"), "answer[1]"),
        # one for all heads
        (SCALES.format("k.abs().amax() / limit"), "expected shape [4], got []"),
        # the wrong axis
        (SCALES.format("k.abs().amax((0, 1)) / limit"), "expected shape [4], got [16]"),
        # upside down
        (SCALES.format("limit / k.abs().amax((0, 2))"), "answer[0]"),
        # one for each token
        (SCALES.format("k.abs().amax(2) / limit"), "expected shape [4], got [20, 4]"),
        # errors that only small scales show
        (SCALES.format("k.float().abs().amax((0, 2)) / limit + 9e-7"), "scales divided by the right ones: answer["),
        (
            SCALES.format("(s := k.float().abs().amax((0, 2)) / limit).where(s >= 1e-6, 0)"),
            "limit 57344, scales divided by the right ones: answer[2]: expected 1, got 0",
        ),
        # computed in BF16, if K is BF16
        (
            SCALES.format("k.abs().amax((0, 2)) / limit"),
            "in bfloat16, limit 448: expected dtype torch.float32, got torch.bfloat16",
        ),
    ],
    "02.4": [
        # the scales along dim
        (STORE.format("(x / scales).clamp(-fmt.max, fmt.max).to(fmt.dtype)"), "x [5, 4, 4] in e4m3fn"),
        # no clamping; PyTorch may clamp by itself in e4m3fn
        (STORE.format("(x / scales[:, None]).to(fmt.dtype)"), "got nan"),
        # clamped before the division
        (STORE.format("(x.clamp(-fmt.max, fmt.max) / scales[:, None]).to(fmt.dtype)"), "differ)"),
        # multiplied
        (STORE.format("(x * scales[:, None]).clamp(-fmt.max, fmt.max).to(fmt.dtype)"), "x [5, 4, 4] in e4m3fn"),
        # always the same format
        (
            STORE.format("(x / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)"),
            "expected dtype torch.float8_e4m3fnuz, got torch.float8_e4m3fn",
        ),
    ],
}
