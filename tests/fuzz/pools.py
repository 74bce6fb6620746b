"""Pools and scales of drawn sizes, as code."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.fuzz import forms
from tests.fuzz.case import BAD, GOOD, Builder, Draw, Form, bad, either, good

FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")
FLOATS = ("bfloat16", "float16", "float32")
KINDS = ("none", "per-tensor", "per-head", "per-page-head", "per-token-head")


@dataclass
class Sizes:
    """Of a cache."""

    layout: str
    blocks: int
    page: int
    heads: int
    k_dim: int
    v_dim: int
    dtype: str

    @property
    def x(self) -> int:
        return 16 // (1 if self.dtype in FP8 else 4 if self.dtype == "float32" else 2)

    def shape(self, which: str) -> tuple[int, ...]:
        b, p, h, x = self.blocks, self.page, self.heads, self.x
        dim = self.k_dim if which == "key" else self.v_dim
        if self.layout == "NHD":
            return b, p, h, dim
        if self.layout == "HND":
            return b, h, p, dim
        return (b, h, dim // x, p, x) if which == "key" else (b, h, p // x, dim, x)

    def scale_shape(self, kind: str) -> tuple[int, ...]:
        b, p, h = self.blocks, self.page, self.heads
        return {"per-tensor": (1,), "per-head": (h,), "per-page-head": (b, h), "per-token-head": (b, h, p)}[kind]


def sizes(draw: Draw, blocks: int | None = None) -> Sizes:
    """Sizes of a small cache."""
    dtype = draw.one(*FP8, *FP8, *FLOATS)
    layout = draw.one("NHD", "HND", "SHUFFLE")
    of = Sizes(layout, draw.randint(1, 6) if blocks is None else blocks, 0, draw.randint(1, 3), 0, 0, dtype)
    if blocks is None and draw.chance(0.04):
        of.blocks = 0
    if layout == "SHUFFLE":
        of.page, of.k_dim = of.x * draw.one(1, 1, 2), of.x * draw.one(1, 1, 2)
        of.v_dim = draw.one(of.k_dim, of.k_dim, 8, 3)
    else:
        of.page = draw.one(1, 2, 3, 4, 4, 8)
        of.k_dim = draw.one(1, 2, 3, 8, 12, 16)
        of.v_dim = draw.one(of.k_dim, of.k_dim, 1, 5, 16)
    return of


def contents(draw: Draw, dtype: str, finite: bool) -> str:
    """Code of a pool's contents, with SHAPE in it."""
    seed = draw.number()
    if finite:
        return f"normal(SHAPE, seed={seed}).to(torch.{dtype})"
    if dtype in FP8:
        return f"codes(SHAPE, seed={seed}).view(torch.{dtype})"
    inner = f"normal(SHAPE, seed={seed})"
    return f"sparkled({inner}, {seed}).to(torch.{dtype})" if draw.chance(0.5) else f"{inner}.to(torch.{dtype})"


def pool_lines(draw: Draw, of: Sizes, finite: bool = False, overlapping: bool = True) -> list[str]:
    """Lines that make `key_cache` and `value_cache`."""
    makes = contents(draw, of.dtype, finite), contents(draw, of.dtype, finite)
    shapes = of.shape("key"), of.shape("value")
    if draw.chance(0.15) and shapes[0][:-1] == shapes[1][:-1]:  # both in one tensor, side by side
        wide = (*shapes[0][:-1], of.k_dim + of.v_dim) if of.layout != "SHUFFLE" else None
        if wide is not None:
            both = makes[0].replace("SHAPE", ", ".join(map(str, wide)))
            return [f"both = {both}", f"key_cache = both[..., :{of.k_dim}]", f"value_cache = both[..., {of.k_dim}:]"]
    if draw.chance(0.15) and shapes[0] == shapes[1] and of.blocks:  # both in one tensor, block by block
        both = makes[0].replace("SHAPE", ", ".join(map(str, (shapes[0][0], 2, *shapes[0][1:]))))
        return [f"both = {both}", "key_cache, value_cache = both[:, 0], both[:, 1]"]
    codes = [forms.strided(draw, make, shape, overlapping) for make, shape in zip(makes, shapes, strict=True)]
    return [f"key_cache = {codes[0]}", f"value_cache = {codes[1]}"]


def scale_code(draw: Draw, of: Sizes, kind: str, tame: bool = False) -> str:
    """Code of a scale of a kind.

    Args:
        tame: whether products have to stay small.
    """
    seed = draw.number()
    if kind == "none":
        return "None"
    if kind == "per-tensor":
        size = draw.choice(["0.5", "1", "0.75"] if tame else ["0.5", "1", "1e-30", "3e38", "2.0**-126", "7e4"])
        ways = [size, f"torch.tensor({size}, dtype=torch.float32)", f"torch.tensor([{size}], dtype=torch.float32)"]
        return draw.one(*ways, f"torch.full((1, 1, 1), {size}, dtype=torch.float32)", f"np.float64({size})",
                        f"np.float32({size})", "fractions.Fraction(1, 3)",
                        f"torch.full((3,), {size}, dtype=torch.float32)[1:2]")  # fmt: skip
    make = f"scales(SHAPE, seed={seed})"
    several = math.prod(of.scale_shape(kind)) > 1  # one element is per-tensor, whose value is looked at
    if kind != "per-head" and several and not tame and draw.chance(0.3):
        make = f"sparkled(scales(SHAPE, seed={seed}), {seed})"
    return forms.strided(draw, make, of.scale_shape(kind), overlapping=True)


def scale_forms(of: Sizes, name: str, kind: str) -> list[Form]:
    """Other forms of a scale argument, wrong ones most."""
    shape = of.scale_shape(kind) if kind not in ("none", "per-tensor") else ()
    shown = ", ".join(map(str, shape))
    found = forms.number() + forms.bad(
        "'per-tensor'", "object()", "[0.5]", "np.zeros(3)", "torch.zeros(0)", "torch.ones(1).to('meta')",
        "torch.ones(1).double()", "torch.ones(1).bfloat16()", "torch.ones(1, dtype=torch.int32)", "torch.ones(1) > 0",
        "negative(torch.ones(1))", f"torch.ones({of.heads + 1})", f"torch.ones({of.blocks + 2}, {of.heads})",
        f"torch.ones({of.blocks}, {of.heads + 1}, {of.page})", f"torch.ones({of.blocks}, {of.heads}, {of.page + 1})",
        f"torch.ones({of.blocks}, {of.page + 1}, {of.heads + 1}, 1)", "without_memory(torch.ones(1))",
        "torch.tensor([-1.0])", "torch.tensor(float('nan'))", "torch.tensor([[0.0]])", "torch.tensor([float('inf')])",
        "torch.ones(2, 2).to_sparse()",
    )  # fmt: skip
    if kind == "per-head" and of.heads > 1:
        found += bad(f"torch.tensor([1.0] * {of.heads - 1} + [float('nan')])", f"torch.zeros({of.heads})",
                     f"torch.full(({of.heads},), -1.0)")  # fmt: skip
    if shape:
        found += either(f"torch.ones({shown})[None]", f"torch.ones({shown}).to(torch.float32).requires_grad_()")
        found += good(f"torch.nn.Parameter(torch.ones({shown}))", f"torch.ones({shown}).as_strided(({shown},), "
                      f"({', '.join('0' for _ in shape)},))")  # fmt: skip
    return found


def taken_away(build: Builder, of: Sizes, suffix: str = "", outs: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    """At times, after the good call: memory is taken from under a tensor, or a scale loses its value.

    Args:
        suffix: of the names of scales.
        outs: variables of outputs that have elements.

    Returns:
        What has to come of the call then, and the names of which an error has one.
    """
    if not build.draw.chance(0.05):
        return GOOD, ()
    ways = {f"{name}.untyped_storage().resize_(0)": name for name in (*outs, *(("key_cache",) if of.blocks else ()))}
    for side in "kv":
        name = f"{side}_scale{suffix}"
        if any(line.startswith(f"{name} = torch.tensor(") for line in build.lines):
            ways[f"{name}.{build.draw.one('zero_()', 'neg_()', 'fill_(torch.nan)')}"] = name
    if not ways:
        return GOOD, ()
    line = build.draw.choice(list(ways))
    build.late.append(line)
    build.spoils = (1.0,)  # other forms read what is gone
    name = ways[line]
    return BAD, (name, "out", "key", "value", "key_cache", "value_cache") if "resize" in line else (name,)


def kind_forms(given: str) -> list[Form]:
    """Forms of `k_kind` and `v_kind` for a scale whose kind is known; the scale may be what an error names."""
    return forms.word(*KINDS, optional=True) + either(*(repr(kind) for kind in KINDS if kind != given))


def add_pools(build: Builder, of: Sizes) -> None:
    """The arguments `key_cache` and `value_cache`."""
    dtypes = ("float64", "int8", "complex64", "uint8", "int32")
    for name, other in (("key_cache", "value_cache"), ("value_cache", "key_cache")):
        more = forms.tensors(name, *dtypes, names=(other, "layout", "kv_cache_layout", "plan"))
        if of.dtype in FLOATS:
            more += bad(f"{name}.to(torch.float8_e5m2)", names=(other, "k_scales", "key", "out", "out_dtype"))
        if of.dtype == "float32":
            more += bad(f"negative({name})")
        if of.blocks:
            more += bad(f"{name}[1:]", names=(other, "plan", "k_scale", "v_scale", "k_scales", "v_scales"))
        build.arg(name, name, more, forms.flattened(name, names=(other,)))
