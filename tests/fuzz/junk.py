"""Expressions that nearly every argument refuses."""

from __future__ import annotations

JUNK = (
    "None", "True", "3", "-1", "2.5", "float('nan')", "'x'", "b'x'", "[]", "()", "{}", "object()", "[1, 2]", "2**70",
    "-10**5000", "torch.float32", "torch.tensor(3)", "torch.zeros(2)", "np.zeros(3)", "np.float32(1)", "np.int64(1)",
    "(lambda: 0)", "kg", "int", "1j", "torch.device('cpu')", "[None]", "[torch.zeros(1)]", "slice(2)",
)  # fmt: skip
NO_TENSORS = tuple(code for code in JUNK if code not in ("torch.tensor(3)", "torch.zeros(2)"))
NO_NUMBERS = (
    "None", "True", "False", "2.5", "1.0", "'3'", "b'3'", "[]", "[3]", "{}", "object()", "torch.tensor(3)", "1j",
    "np.float32(3)", "np.array([3])", "np.bool_(True)", "decimal.Decimal(3)", "fractions.Fraction(3)", "torch.int32",
)  # fmt: skip
EVERYWHERE = frozenset((*JUNK, *NO_NUMBERS))
