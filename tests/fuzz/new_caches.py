"""Makers of caches: the constructor of `PagedKVCache` and `from_tensors`."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.case import BAD, EITHER, GOOD, Builder, Case, Draw, Facts, Form, Wrong, bad, either
from tests.fuzz.floats import name_of
from tests.fuzz.pages import check_equal
from tests.fuzz.pools import KINDS, Sizes, add_pools, kind_forms, pool_lines, scale_code, scale_forms, sizes

SIZES = ("num_blocks", "page_size", "num_kv_heads", "head_dim", "v_head_dim")


def constructor(draw: Draw) -> Case:
    of = sizes(draw)
    if draw.chance(0.03):
        return too_large(draw)
    build = Builder(draw, "PagedKVCache", "kg.PagedKVCache", warm=0)
    given = dict(zip(SIZES, (of.blocks, of.page, of.heads, of.k_dim, of.v_dim), strict=True))
    in_shuffle = either("3", "2**31 - 1 - 7") if of.layout == "SHUFFLE" else []
    for name, size in given.items():
        wrong = forms.integer(0 if name == "num_blocks" else 1)
        if name == "v_head_dim":
            wrong = wrong[1:]  # None is head_dim
        same = forms.same_integer(size)
        others = [form for form in in_shuffle if form.code == "3"] if name in ("page_size", "head_dim") else []
        build.arg(name, str(size), wrong, same, others)
    if of.v_dim == of.k_dim and draw.chance(0.5):
        build.args["v_head_dim"] = "None"
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    if draw.chance(0.3):
        kinds = kinds[0], kinds[0]
    say = repr(kinds[0]) if kinds[0] == kinds[1] and draw.chance(0.7) else repr(draw.one(kinds, list(kinds)))
    wrong_kinds = bad("None", "'per-block'", "('none',)", "('none', 'none', 'none')", "('none', None)", "3", "b'none'",
                      "{'k': 'none', 'v': 'none'}", "iter(('none', 'none'))", "('none', 'x' * 3000)",
                      "np.array(['none'] * 2)", "torch.zeros(2)", "''",
                      "[]", "('none', torch.zeros(2))", "{'none', 'per-head'}")  # fmt: skip
    build.arg("layout", repr(of.layout), forms.word("NHD", "HND", "SHUFFLE"))
    build.arg("dtype", f"torch.{of.dtype}", forms.dtype("float8_e8m0fnu", "float8_e5m2fnuz"))
    build.arg("scale", say, wrong_kinds)
    for side, kind in zip("kv", kinds, strict=True):
        code = "None" if draw.chance(0.4) else scale_code(draw, of, kind)
        wrong = [form for form in scale_forms(of, f"{side}_scale", kind) if form.verdict != GOOD]
        if kind != "per-tensor":  # a number, or one element, is of that kind alone
            wrong += bad("0.5", names=("scale",)) + ([] if of.heads == 1 else bad("torch.ones(1)", names=("scale",)))
        build.line(f"{side}_scale = {code}")
        build.arg(f"{side}_scale", f"{side}_scale", [Form(f.code, f.verdict, (*f.names, "scale")) for f in wrong],
                  leave_out=0.3 if code == "None" else 0)  # fmt: skip
    build.arg("device", draw.one("None", "'cpu'"), forms.device(), leave_out=0.5)

    def check(facts: Facts, cache: Any) -> None:
        args = facts.args
        check_geometry(cache, of)
        if not (cache.key_cache.view(torch.uint8) == 0).all() or not (cache.value_cache.view(torch.uint8) == 0).all():
            raise Wrong("the pools are not empty")
        for name, side, kind in zip(("k_scale", "v_scale"), "kv", kinds, strict=True):
            check_scale(name, getattr(cache, name), args.get(name), kind, of, made=True)
            if getattr(cache, f"{side}_kind") != kind:
                raise Wrong(f"{side}_kind is {getattr(cache, f'{side}_kind')}, and should be {kind}")
        if type(repr(cache)) is not str or f"{of.blocks} blocks" not in repr(cache):
            raise Wrong(f"its repr is {cache!r}")

    return build.finish(check)


def too_large(draw: Draw) -> Case:
    """Pools of more bytes than any machine has, and of more than can be counted."""
    build = Builder(draw, "PagedKVCache", "kg.PagedKVCache", warm=0, spoils=(1.0,))
    most, countable = "2**31 - 1", draw.chance(0.5)
    given = (most, "8192", "3", "8") if countable else (most,) * 4
    for name, size in zip(SIZES, given, strict=False):
        build.arg(name, size)
    build.arg("device", "'cpu'")

    def check(facts: Facts, cache: Any) -> None:
        raise Wrong("it has a pool that no memory holds")

    case = build.finish(check, verdict=BAD, names=SIZES[:4])
    case.large = countable
    return case


def check_geometry(cache: Any, of: Sizes) -> None:
    """Raise unless a cache has these sizes."""
    g = cache.geometry
    found = Sizes(g.layout, g.num_blocks, g.page_size, g.num_kv_heads, g.head_dim, g.v_head_dim, name_of(g.dtype))
    shapes = tuple(cache.key_cache.shape), tuple(cache.value_cache.shape)
    if found != of or shapes != (of.shape("key"), of.shape("value")) or cache.num_slots != of.blocks * of.page:
        raise Wrong(f"its geometry is {found} with pools {shapes}, and should be {of}")


def check_scale(name: str, got: Any, given: Any, kind: str, of: Sizes, made: bool = False) -> None:
    """Raise unless a cache's scale is the one that was given, or 1 everywhere.

    Args:
        made: whether None stands for ones.
    """
    if kind == "none" or (given is None and not made):
        if got is not None:
            raise Wrong(f"{name} is a tensor, and should be None")
        return
    if isinstance(given, torch.Tensor):
        if got is not given:
            raise Wrong(f"{name} is another tensor than was given")
        return
    shape = of.scale_shape(kind) if given is None else (1,)
    want = torch.full(shape, 1.0 if given is None else float(given), dtype=torch.float32)
    check_equal(name, got, want)


def from_tensors(draw: Draw) -> Case:
    of = sizes(draw)
    build = Builder(draw, "PagedKVCache.from_tensors", "kg.PagedKVCache.from_tensors")
    build.lines += pool_lines(draw, of)
    add_pools(build, of)
    build.arg("layout", repr(of.layout), forms.word("NHD", "HND", "SHUFFLE"))
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    for side, kind in zip("kv", kinds, strict=True):
        build.line(f"{side}_scale = {scale_code(draw, of, kind)}")
        build.arg(f"{side}_scale", f"{side}_scale", scale_forms(of, f"{side}_scale", kind))
        others = [Form(f.code, EITHER, (f"{side}_scale",)) for f in kind_forms(kind) if f.verdict != BAD]
        build.arg(f"{side}_kind", "None", forms.word(*KINDS, optional=True), others, leave_out=0.5)

    def check(facts: Facts, cache: Any) -> None:
        args = facts.args
        check_geometry(cache, of)
        if cache.key_cache is not args["key_cache"] or cache.value_cache is not args["value_cache"]:
            raise Wrong("its pools are other tensors than were given")
        for name in ("k_scale", "v_scale"):
            given = args.get(name)
            check_scale(name, getattr(cache, name), given, "none" if given is None else "some", of)

    return build.finish(check)
