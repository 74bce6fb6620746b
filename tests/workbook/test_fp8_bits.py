"""The switches of chapter 02: every code is read as the formats define it."""

from __future__ import annotations

import re
import time

import pytest

from kvgather.formats.fp8 import FORMATS, decode_table
from kvgather.workbook.widgets.fp8_bits import bits_of, bits_picture, code_of, fp8_bits, reading


def test_bits_and_codes_are_inverse() -> None:
    assert bits_of(0x45) == [0, 1, 0, 0, 0, 1, 0, 1]
    assert [code_of(bits_of(code)) for code in range(256)] == list(range(256))
    with pytest.raises(ValueError, match="code is 256; accepted: 0 to 255"):
        bits_of(256)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_the_product_is_the_value_of_every_code(fmt) -> None:
    """The text's left side, computed, is the value that the format's table has."""
    for code, value in enumerate(decode_table(fmt.dtype).tolist()):
        text = reading(code, fmt)
        if value != value:
            assert text == "NaN"
        elif abs(value) == float("inf"):
            assert text == ("−infinity" if value < 0 else "+infinity")
        else:
            left, right = text.split(" = ")
            product = left.replace("−", "-").replace("·", "*").replace("^", "**")
            assert re.fullmatch(r"[-\d ()*+/.]+", product)
            assert eval(product) == value
            assert float(right.replace("−", "-")) == pytest.approx(value, rel=1e-5)
            assert right.startswith("−") == (code >= 128)


def test_special_codes() -> None:
    said = {code: [reading(code, fmt) for fmt in FORMATS.values()] for code in (0x80, 0x7F, 0x7C)}
    assert said[0x80] == ["−2^(−6) · 0/8 = −0", "NaN", "−2^(−14) · 0/4 = −0"]
    assert said[0x7F][0] == "NaN" and said[0x7F][1].endswith(" = 240")
    assert said[0x7C][2] == "+infinity"


def test_the_picture_has_the_parts_of_each_format() -> None:
    (axes,) = bits_picture(0x38).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:24] == [str(bit) for bit in bits_of(0x38)] * 3
    assert {"e4m3fn", "e4m3fnuz", "e5m2", "code 0x38 = 56", "2^(7 − 7) · (1 + 0/8) = 1"} <= set(texts)


def test_switches_change_the_byte_and_the_picture() -> None:
    bits, picture = fp8_bits(0x38).children
    switches = bits.children
    assert [switch.description for switch in switches] == list("00111000")
    seen = [bytes(picture.value)]
    switches[0].value = True
    seen.append(bytes(picture.value))
    switches[7].value = True
    seen.append(bytes(picture.value))
    assert [switch.description for switch in switches] == list("10111001")
    assert all(value.startswith(b"\x89PNG") for value in seen) and len(set(seen)) == 3


def test_a_redraw_is_quick() -> None:
    switches = fp8_bits().children[0].children
    start = time.perf_counter()
    for switch in switches:
        switch.value = not switch.value
    assert (time.perf_counter() - start) / 8 < 1.0  # 0.1 s on two quiet cores
