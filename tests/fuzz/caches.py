"""Calls of a cache's methods, `write`, `gather` and `check`, and what has to come of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.case import BAD, EITHER, GOOD, Builder, Case, Draw, Facts, Wrong, bad, good
from tests.fuzz.gathers import add_out, add_plan, check_pair, rows_of
from tests.fuzz.pages import Pool, Scales, check_equal, check_pool, check_rows, write_row
from tests.fuzz.pools import FLOATS, KINDS, Sizes, pool_lines, scale_code, sizes


def cache_lines(
    draw: Draw, of: Sizes, kinds: tuple[str, str], overlapping: bool, tame: bool = False, finite: bool = False
) -> list[str]:
    """Lines that make `cache`."""
    if draw.chance(0.3) and "none" not in kinds:
        v_dim = f", v_head_dim={of.v_dim}"
        first = f"{of.blocks}, {of.page}, {of.heads}, {of.k_dim}{v_dim}, layout={of.layout!r}"
        return [f"cache = kg.PagedKVCache({first}, dtype=torch.{of.dtype}, scale={kinds!r}, device='cpu')"]
    lines = pool_lines(draw, of, finite, overlapping)
    given = []
    for side, kind in zip("kv", kinds, strict=True):
        lines.append(f"{side}_scale = {_own_memory(draw, of, kind, tame)}")
        given.append(f"{side}_scale={side}_scale")
        if kind not in ("none", "per-tensor") and math.prod(of.scale_shape(kind)) == 1:
            given.append(f"{side}_kind={kind!r}")
    pools = f"key_cache, value_cache, layout={of.layout!r}"
    return [*lines, f"cache = kg.PagedKVCache.from_tensors({pools}, {', '.join(given)})"]


def _own_memory(draw: Draw, of: Sizes, kind: str, tame: bool) -> str:
    """A scale whose elements do not overlap where a write sets them."""
    if kind != "per-token-head":
        return scale_code(draw, of, kind, tame)
    return forms.strided(draw, f"scales(SHAPE, seed={draw.number()})", of.scale_shape(kind))


def write(draw: Draw) -> Case:
    triton = draw.chance(0.12)
    of = sizes(draw)
    build = Builder(draw, "PagedKVCache.write (triton)" if triton else "PagedKVCache.write", "cache.write")
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    overlapping = draw.chance(0.15)
    if triton:
        build.trace()
        build.warm = 0.6
    build.lines += cache_lines(draw, of, kinds, overlapping)
    slots_there = of.blocks * of.page
    tokens = min(draw.choice([0, 1, 2, draw.randint(1, 8)]), slots_there)
    slots = draw.sample(range(slots_there), tokens)
    for i in range(tokens):
        if draw.chance(0.15):
            slots[i] = draw.choice([-1, -1, -(2**31), -5])
    build.line(f"slots = {forms.whole_numbers(draw, slots, draw.one('int32', 'int64'))}")
    for name, dim in (("k", of.k_dim), ("v", of.v_dim)):
        size = draw.one("1", "1", "100", "1e-3")
        inner = f"normal(SHAPE, seed={draw.number()}) * {size}"
        make = (
            f"(sparkled({inner}, {draw.number()}) if {draw.chance(0.4)} else {inner}).to(torch.{draw.choice(FLOATS)})"
        )
        build.line(f"{name} = {forms.strided(draw, make, (tokens, of.heads, dim), overlapping=True)}")
        shapes = bad(f"{name}.transpose(1, 2)[..., None]", f"torch.zeros({tokens}, {of.heads + 1}, {dim})",
                     f"torch.zeros({tokens}, {of.heads}, {dim + 1})", f"torch.zeros({tokens + 1}, {of.heads}, {dim})",
                     names=("k", "v", "slots"))  # fmt: skip
        rows = good(f"negative(normal({tokens}, {of.heads}, {dim}))", f"{name}.clone().requires_grad_()")
        wrong_types = forms.tensors(name, "float64", "int32", "uint8", "float8_e4m3fn", "int64")
        if of.dtype in FLOATS and of.layout == "NHD" and 0 < tokens <= of.page and draw.chance(0.5):
            build.line(f"{name} = cache.{'key' if name == 'k' else 'value'}_cache[0, :{tokens}]")
        if of.k_dim == of.v_dim and name == "v":
            rows += good("k")
        build.arg(name, name, wrong_types, shapes, rows)
    junk = forms.tensors("slots", "float32", "int16", "uint8", "float64", names=("k", "v"))
    junk += bad(f"torch.arange({tokens + 1})", "slots[None]", "slots[..., None]", names=("k", "v"))
    if tokens and slots_there < 2**31:
        past = str(slots_there), "2**62", "2**31 - 1"
        junk += bad(f"torch.arange({tokens}) + {slots_there}", *(f"torch.full(({tokens},), {slot})" for slot in past))
    if tokens > 1:
        junk += bad(f"torch.zeros({tokens}, dtype=torch.int64)")
    build.arg("slots", "slots", junk)
    build.arg("backend", "'triton'" if triton else draw.one("'auto'", "'torch'"),
              forms.word("auto", "torch", "triton"), leave_out=0 if triton else 0.3)  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        if result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")
        check_write(facts, facts.scope["cache"], facts.args["k"], facts.args["v"], facts.args["slots"].tolist(), kinds)

    of_scope = tuple(f"cache.{name}" for name in ("key_cache", "value_cache", "k_scale", "v_scale"))
    names = ("key_cache", "value_cache", "k_scale", "v_scale")  # those whose elements overlap
    if draw.chance(0.03) and not overlapping and not any("= cache." in line for line in build.lines):
        build.late.append("shrunk(cache)")
        build.spoils = (1.0,)
        return build.finish(check, of_scope, BAD if of.blocks else EITHER, names)
    return build.finish(check, of_scope, EITHER if overlapping else GOOD, names if overlapping else ())


def check_write(facts: Facts, cache: Any, k: Any, v: Any, slots: list[int], kinds: tuple[str, str]) -> None:
    """Raise unless each token is in its slot, and the rest of the pools and scales as it was."""
    layout, page = cache.geometry.layout, cache.geometry.page_size
    for which, rows, kind in (("key", k, kinds[0]), ("value", v, kinds[1])):
        tensor, factor = getattr(cache, f"{which}_cache"), getattr(cache, f"{which[0]}_scale")
        pool = Pool.of(facts.before(tensor), layout, which)
        before = None if factor is None else facts.before(factor)
        scale = Scales(None if before is None else before.clone(), kind)
        new = before.tolist() if before is not None and kind == "per-token-head" else None
        for row, slot in zip(facts.before(rows).tolist(), slots, strict=True):
            if slot >= 0:
                block, offset = divmod(slot, page)
                if new is not None:
                    write_row(pool, Written(new), row, block, offset, new)
                else:
                    write_row(pool, scale, row, block, offset, None)
        if new is not None:
            check_equal(f"{which[0]}_scale", factor, torch.tensor(new, dtype=torch.float32).view(factor.shape))
        check_pool(f"{which}_cache", tensor, pool)


class Written(Scales):
    """A per-token-head scale while it is being written."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__(None)
        self.none, self.one, self.rank, self.values = False, False, 3, values


def cache_gather(draw: Draw) -> Case:
    triton = draw.chance(0.12)
    of = sizes(draw)
    build = Builder(draw, "PagedKVCache.gather (triton)" if triton else "PagedKVCache.gather", "cache.gather")
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    if triton:
        build.trace()
        build.warm = 0.6
    build.lines += cache_lines(draw, of, kinds, overlapping=True)
    raw = kinds == ("none", "none") and draw.chance(0.4)
    out_dtype = of.dtype if raw else draw.choice(FLOATS)
    build.line("key_cache, value_cache = cache.key_cache, cache.value_cache")
    given = add_plan(build, of, 12 if triton else 24)
    add_out(build, of, given.total, out_dtype, ("out_dtype",))
    wrong = [] if kinds == ("none", "none") else ["float8_e4m3fn", "float8_e5m2"]
    build.arg("out_dtype", f"torch.{out_dtype}", forms.dtype(*wrong))
    build.arg("backend", "'triton'" if triton else draw.one("'auto'", "'torch'"),
              forms.word("auto", "torch", "triton"), leave_out=0 if triton else 0.3)  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        args, cache = facts.args, facts.scope["cache"]
        rows, out = rows_of(facts), args.get("out")
        check_pair(result, out, args["out_dtype"], len(rows), of)
        for i, which in enumerate(("key", "value")):
            pool = Pool.of(getattr(cache, f"{which}_cache"), of.layout, which)
            scale = Scales(getattr(cache, f"{which[0]}_scale"), kinds[i] if kinds[i] != "none" else None)
            check_rows(f"result[{i}]", result[i], None if out is None else facts.before(out[i]), pool, scale, rows)

    writes = ("args['out'][0]", "args['out'][1]")
    if draw.chance(0.03):
        build.late.append("shrunk(cache)")
        return build.finish(check, writes, BAD if of.blocks else EITHER, ("key_cache", "value_cache"))
    return build.finish(check, writes)


def cache_check(draw: Draw) -> Case:
    """`check()` of a cache whose scales may hold anything where that is not looked at before."""
    of = sizes(draw)
    kinds = draw.choice(KINDS[3:]), draw.choice(KINDS[3:])
    build = Builder(draw, "PagedKVCache.check", "cache.check", spoils=(1.0,), warm=0)
    build.lines += pool_lines(draw, of)
    wrong = []
    for side, kind in zip("kv", kinds, strict=True):
        shape = of.scale_shape(kind)
        build.line(f"{side}_scale = {forms.strided(draw, f'scales(SHAPE, seed={draw.number()})', shape)}")
        if math.prod(shape) and draw.chance(0.4):
            at = ", ".join(str(draw.randrange(size)) for size in shape)
            value = draw.one("float('nan')", "float('inf')", "0.0", "-1.0", "-0.0")
            wrong.append((f"{side}_scale", f"{side}_scale[{at}] = {value}"))
    given = ", ".join(
        f"{side}_scale={side}_scale, {side}_kind={kind!r}" for side, kind in zip("kv", kinds, strict=True)
    )
    build.line(f"cache = kg.PagedKVCache.from_tensors(key_cache, value_cache, layout={of.layout!r}, {given})")
    build.lines += [line for _, line in wrong]

    def check(facts: Facts, result: Any) -> None:
        if result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")

    return build.finish(check, verdict=BAD if wrong else GOOD, names=tuple(name for name, _ in wrong))
