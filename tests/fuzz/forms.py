"""Wrong and unusual forms of an argument, by what it is."""

from __future__ import annotations

from tests.fuzz.case import Draw, Form, bad, either, good
from tests.fuzz.junk import NO_NUMBERS, NO_TENSORS


def tensors(name: str, *dtypes: str, optional: bool = False, names: tuple[str, ...] = ()) -> list[Form]:
    """Forms that no tensor argument takes.

    Args:
        name: the variable that has it.
        dtypes: that it does not take either.
        optional: whether it may be None.
        names: of arguments that an error may name beside it.
    """
    junk = [code for code in NO_TENSORS if not (optional and code == "None")]
    forms = bad(*junk, names=names)
    forms += bad(
        f"{name}[None]", f"{name}.to('meta')", "torch.zeros(2, 3).to_sparse()", f"{name}.float().numpy()",
        f"{name}.tolist()", "torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])",
        "torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)", f"{name}.float().to(torch.complex64)",
        f"{name}.float() > 0", f"({name},)", names=names,
    )  # fmt: skip
    forms += either(f"without_memory({name})", names=names)  # a tensor of no elements needs none
    forms += bad(*(f"{name}.to(torch.{dtype})" for dtype in dtypes), names=names)
    forms += either(f"of_subclass({name})", names=names)
    return forms + good(f"torch.nn.Parameter({name}, requires_grad=False)")


def flattened(name: str, names: tuple[str, ...] = ()) -> list[Form]:
    return bad(f"{name}.flatten()", f"{name}.new_zeros(())", f"{name}.new_zeros(3, 3)", names=names)


def integer(minimum: int = 0, maximum: int = 2**31 - 1, names: tuple[str, ...] = ()) -> list[Form]:
    """Forms that no integer argument takes."""
    past = (minimum - 1, maximum + 1, -(2**31), -(2**63), 2**63, 2**70)
    codes = [f"{number}" for number in past if not minimum <= number <= maximum]
    return bad(*NO_NUMBERS, *codes, "10**5000", "-10**5000", names=names)


def same_integer(number: int) -> list[Form]:
    """The same number in other types."""
    forms = good(f"np.int64({number})", f"np.array({number})", f"enum.IntEnum('E', {{'a': {number}}}).a")
    return forms + (good(f"np.uint8({number})") if 0 <= number < 256 else [])


def word(*accepted: str, optional: bool = False, names: tuple[str, ...] = ()) -> list[Form]:
    """Forms that no argument takes that is one of a few words."""
    forms = bad("''", "'nhd '", "b'NHD'", "3", "True", "['NHD']", "('NHD',)", "object()", "float('nan')", names=names)
    forms += bad(*(repr(text.swapcase()) for text in accepted if text.swapcase() != text), names=names)
    forms += bad("np.zeros(2)", "torch.zeros(2)", "'x' * 10000", "'\\0'", "'\\ud800'", "{}", names=names)
    return forms + ([] if optional else bad("None", names=names))


def number(names: tuple[str, ...] = ()) -> list[Form]:
    """Forms that no finite number above 0 takes."""
    return bad(
        "True", "'1'", "float('nan')", "float('inf')", "-float('inf')", "0", "0.0", "-0.0", "-1.5", "1e-46", "1e39",
        "10**400", "-10**400", "1j", "[1.0]", "np.float64('nan')", "np.float32(0)", "np.array([1.0])", "b'1'", "{}",
        "decimal.Decimal(1)", "np.bool_(True)", "fractions.Fraction(-1, 3)", "10**5000", names=names,
    )  # fmt: skip


def dtype(*wrong: str) -> list[Form]:
    others = (*wrong, "float64", "int8", "int32", "bool", "complex64", "uint8")
    junk = ("None", "'bfloat16'", "np.float32", "float", "3", "torch.zeros(1)", "[]", "{}", "np.dtype('float32')")
    return bad(*junk, *(f"torch.{name}" for name in others))


def device() -> list[Form]:
    forms = bad("'gpu'", "3", "True", "b'cpu'", "''", "'cpu:x'", "'meta'", "torch.device('meta')", "'cuda:7'", "'xpu'",
                "'cuda:-1'", "[]", "object()", "torch.float32", "'mps'", "'hpu'", "'x' * 300", "'fpga:0'")  # fmt: skip
    return forms + good("'cpu'", "torch.device('cpu')", "'cpu:0'")


def strided(draw: Draw, make: str, shape: tuple[int, ...], overlapping: bool = False) -> str:
    """Code of a tensor of some shape, with strides of some kind.

    Args:
        make: code of contiguous contents, where `SHAPE` is put in the place of the shape.
        overlapping: whether its elements may share addresses.
    """

    def contents(*sizes: int) -> str:
        return make.replace("SHAPE", ", ".join(map(str, sizes)))

    ways = ["plain", "plain", "plain", "offset"]
    if shape:
        ways += ["inner", "step", "wider", "outer"]
    if len(shape) > 1:
        ways += ["permuted", "between"]
    if overlapping and shape and shape[0] > 0:
        ways += ["expanded"]
    way = draw.one(*ways)
    if way == "offset":
        return f"{contents(2, *shape)}[1]"
    if way == "inner":
        return f"{contents(*shape[:-1], shape[-1] + 3)}[..., 1:{shape[-1] + 1}]"
    if way == "step":
        return f"{contents(*shape[:-1], shape[-1] * 2)}[..., ::2]"
    if way == "wider":
        return f"{contents(shape[0] + 2, *shape[1:])}[1:{shape[0] + 1}]"
    if way == "outer":
        return f"{contents(shape[0] * 2, *shape[1:])}[::2]"
    if way == "between":
        return f"{contents(shape[0], 2, *shape[1:])}[:, 1]"
    if way == "permuted":
        one, two = draw.sample(range(len(shape)), 2)
        sizes = list(shape)
        sizes[one], sizes[two] = sizes[two], sizes[one]
        return f"{contents(*sizes)}.transpose({one}, {two})"
    if way == "expanded":
        return f"{contents(1, *shape[1:])}.expand({', '.join(map(str, shape))})"
    return contents(*shape)


def whole_numbers(draw: Draw, rows: list[list[int]] | list[int], dtype: str, columns: int = 0) -> str:
    """Code of an integer tensor, with strides of some kind.

    Args:
        columns: of a table, for one without rows.
    """
    if (rows and isinstance(rows[0], int)) or not (rows or columns):
        way = draw.one("plain", "plain", "step", "offset")
        if way == "step":
            spread = [n for row in rows for n in (row, -7)]
            return f"torch.tensor({spread}, dtype=torch.{dtype})[::2]"
        if way == "offset":
            return f"torch.tensor({[-7, *rows, 99]}, dtype=torch.{dtype})[1:-1]"
        return f"torch.tensor({rows}, dtype=torch.{dtype})"
    if not rows:
        return f"torch.zeros(0, {columns}, dtype=torch.{dtype})"
    width = len(rows[0])  # type: ignore[arg-type]
    way = draw.one("plain", "plain", "inner", "turned", "step")
    if way == "inner":
        wide = [[-7, *row, 99] for row in rows]  # type: ignore[misc]
        return f"torch.tensor({wide}, dtype=torch.{dtype})[:, 1:-1]"
    if way == "step":
        spread = [n for row in rows for n in (row, [-9] * width)]
        return f"torch.tensor({spread}, dtype=torch.{dtype}).view({len(rows) * 2}, {width})[::2]"
    turned = "" if way == "plain" or not width else ".t().contiguous().t()"
    return f"torch.tensor({rows}, dtype=torch.{dtype}).view({len(rows)}, {width}){turned}"
