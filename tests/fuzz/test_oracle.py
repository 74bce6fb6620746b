"""The fuzzer's oracle against numbers worked out by hand, and its judge against functions that are wrong on purpose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.formats.checks import check_int
from tests.fuzz import judge
from tests.fuzz.attend import Row, check_row, softmax_row
from tests.fuzz.case import BAD, EITHER, GOOD, Case, Wrong
from tests.fuzz.floats import decode, encode, quotient, to_bfloat16, to_float16, to_float32
from tests.fuzz.pages import Pool, check_equal, rows_of_plan
from tests.fuzz.prefixes import Checked
from tests.fuzz.snippet import snippet


@pytest.mark.parametrize(
    ("code", "name", "value"),
    [
        (0x38, "float8_e4m3fn", 1.0), (0x7E, "float8_e4m3fn", 448.0), (0x01, "float8_e4m3fn", 2.0**-9),
        (0xB8, "float8_e4m3fn", -1.0), (0x40, "float8_e4m3fnuz", 1.0), (0x7F, "float8_e4m3fnuz", 240.0),
        (0x3C, "float8_e5m2", 1.0), (0x7B, "float8_e5m2", 57344.0), (0x01, "float8_e5m2", 2.0**-16),
        (0xFC, "float8_e5m2", -math.inf),
    ],
)  # fmt: skip
def test_codes_by_hand(code: int, name: str, value: float) -> None:
    assert decode(code, name) == value
    if math.isfinite(value):
        assert encode(value, name) == code


def test_codes_that_are_not_numbers_and_rounding() -> None:
    assert all(math.isnan(decode(code, "float8_e4m3fn")) for code in (0x7F, 0xFF))
    assert math.isnan(decode(0x80, "float8_e4m3fnuz")) and math.isnan(decode(0x7E, "float8_e5m2"))
    assert encode(math.nan, "float8_e5m2") is None
    assert encode(1.0625, "float8_e4m3fn") == 0x38 and encode(1.1875, "float8_e4m3fn") == 0x3A  # ties to even
    assert encode(-1e9, "float8_e4m3fn") == 0xFE and encode(math.inf, "float8_e5m2") == 0x7B
    assert encode(-0.0, "float8_e4m3fn") == 0x80 and encode(-1e-9, "float8_e4m3fnuz") == 0


def test_rounding_by_hand() -> None:
    assert to_bfloat16(1 + 2**-8) == 1.0 and to_bfloat16(1 + 3 * 2**-8) == 1 + 2**-6
    assert to_bfloat16(3.4e38) == math.inf and to_float16(65519.0) == 65504.0 and to_float16(65520.0) == math.inf
    assert to_float32(2.0**-150) == 0.0 and to_float32(1e39) == math.inf
    assert quotient(1.0, 3.0) == 11184811 / 2**25 and quotient(-1.0, 0.0) == -math.inf
    assert math.isnan(quotient(0.0, 0.0)) and math.isnan(quotient(math.inf, math.inf))


def test_elements_of_a_shuffled_pool_by_hand() -> None:
    key = Pool.of(torch.arange(2 * 1 * 2 * 4 * 4).float().view(2, 1, 2, 4, 4), "SHUFFLE", "key")
    assert (key.blocks, key.page, key.heads, key.dim) == (2, 4, 1, 8)
    assert key.stored(1, 3, 0, 5) == 32 + 1 * 16 + 3 * 4 + 1
    value = Pool.of(torch.arange(2 * 1 * 1 * 3 * 4).float().view(2, 1, 1, 3, 4), "SHUFFLE", "value")
    assert (value.page, value.dim) == (4, 3) and value.stored(1, 2, 0, 1) == 12 + 1 * 4 + 2


def test_rows_of_a_plan_by_hand() -> None:
    rows = rows_of_plan([[5, 9], [2, 7]], [0, 3, 4], [1, 2], page=2, blocks=9, total=6)
    assert rows == [(5, 1), "bad", "bad", (7, 0), None, None]
    assert rows_of_plan([[1]], [0, 3], [-1], page=4, blocks=2, total=2) == ["bad", "bad"]


def test_a_batch_by_hand() -> None:
    """Three tokens of which two are new; then one more than `max_q` allows."""
    fits = Checked.of([[4, 6]], 2, [0, 2], [0, 3], 2, 7, 3, 3, None, None, None, None)
    assert fits.slots(3) == [4 * 2 + 1, 6 * 2, -1] and fits.refused == [False] and fits.max_k == 3
    assert Checked.of([[4, 6]], 2, [0, 2], [0, 3], 2, 7, 2, 3, 1, None, None, None).refused == [True]


def test_attention_by_hand() -> None:
    row = softmax_row([1.0], [[0.0], [math.log(3)]], [[4.0], [8.0]], 1.0, None, 1)
    assert row.out == pytest.approx([7.0]) and row.lse == pytest.approx(math.log(4))
    assert softmax_row([1.0], [[0.0]], [[4.0]], 1.0, 0.0, 1).out == [2.0]  # half of it goes to the sink
    check_row("out", [7.0001], math.log(4), row, torch.float32)
    for wrong in ([7.1], [math.nan]):
        with pytest.raises(Wrong, match="should be"):
            check_row("out", wrong, math.log(4), row, torch.float32)
    with pytest.raises(Wrong, match="should be NaN"):
        check_row("out", [0.0], 0.0, Row([math.nan], math.nan), torch.float32)


def test_zeros_of_another_sign_are_not_equal() -> None:
    check_equal("x", torch.tensor([math.nan, 0.0]), torch.tensor([-math.nan, 0.0]))
    with pytest.raises(Wrong, match=r"x\[0\] is -0.0, and should be 0.0"):
        check_equal("x", torch.tensor([-0.0]), torch.tensor([0.0]))


# The judge: each function does something else wrong with `x`, a tensor of ones, and `n`.


def adds(x: Any, n: int) -> int:
    check_int(n, "n")
    return n + 1


def writes(x: Any, n: int) -> int:
    x[0] = 5
    check_int(n, "n")
    return n + 1


def forgets_to_check(x: Any, n: int) -> int:
    return 4


def names_another(x: Any, n: int) -> int:
    check_int(n, "m")
    return n + 1


def lets_python_raise(x: Any, n: int) -> int:
    return int("n" if n is None else n) + 1


def warns(x: Any, n: int) -> int:
    torch.ones(2).numpy().astype(complex).astype(float)
    return n + 1


def is_wrong(x: Any, n: int) -> int:
    check_int(n, "n")
    return n


def verdict(function: Any, n: str = "3", expected: str = GOOD, names: tuple[str, ...] = ()) -> str:
    def check(facts: Any, result: Any) -> None:
        if result != facts.args["n"] + 1:
            raise Wrong(f"gave {result}")

    judge.base()[function.__name__] = function
    case = Case(function.__name__, ["x = torch.ones(2)"], function.__name__, {"x": "x", "n": n}, expected,
                frozenset(names), check)  # fmt: skip
    try:
        return judge.run(case)
    except Wrong as error:
        return str(error)
    finally:
        del judge.base()[function.__name__]


def test_the_judge() -> None:
    assert verdict(adds) == "valid" and verdict(adds, "None", BAD, ("n",)) == "refused"
    assert verdict(adds, "-1", EITHER, ("n",)) == "refused" and verdict(adds, "7", EITHER, ("n",)) == "valid"
    assert verdict(adds, "-1").startswith("refused, and is right: ValueError in checks.py:")
    assert verdict(writes) == "byte 2 of the memory of x changed"
    assert verdict(writes, "None", BAD, ("n",)) == "byte 2 of the memory of x changed"
    assert verdict(forgets_to_check, "None", BAD, ("n",)).startswith("accepted, and should name one of n")
    assert verdict(names_another, "None", BAD, ("n",)).startswith("names none of n: TypeError in checks.py")
    assert verdict(lets_python_raise, "None", BAD, ("n",)).startswith("raised no error of ours: ValueError in test_or")
    assert verdict(warns).startswith("raised no error of ours: ComplexWarning")
    assert verdict(is_wrong) == "gave 3"
    assert verdict(adds, "nowhere").startswith("the lines before it: NameError")


def test_a_snippet_runs_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("cu_seqlens", ["x = scales(2, seed=1)"], "kg.cu_seqlens", {"lengths": "[1, 2]"}, GOOD, frozenset(),
                lambda facts, result: None)  # fmt: skip
    text = snippet(case)
    exec(text, {})
    assert capsys.readouterr().out == f"{kg.cu_seqlens([1, 2])}\n"
    assert "def scales" in text and "def source" in text and "def codes" not in text and "fenced" not in text
