"""Calls of `prefix_attention` and `merge_states`, and what has to come of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.attend import Row, check_all, check_row, softmax_row
from tests.fuzz.caches import cache_lines, check_write
from tests.fuzz.case import BAD, EITHER, GOOD, Builder, Case, Draw, Facts, Wrong, bad, good
from tests.fuzz.floats import product
from tests.fuzz.junk import JUNK, NO_TENSORS
from tests.fuzz.pages import Pool, Scales
from tests.fuzz.pools import FLOATS, KINDS, Sizes, sizes
from tests.fuzz.prefixes import Checked, batch_lines, build_call, prefix


def prefix_attention(draw: Draw) -> Case:
    direct = draw.chance(0.12)
    of = sizes(draw)
    given = prefix(draw, of, most_new=3 if direct else draw.choice([4, 9]), most_cached=8 if direct else 16)
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    function = "prefix_attention (direct)" if direct else "prefix_attention"
    overlapping = draw.chance(0.1)
    lines = [*cache_lines(draw, of, kinds, overlapping, tame=True, finite=True), *batch_lines(draw, given)]
    build = Builder(draw, function, "kg.prefix_attention", [*lines, f"batch = {build_call(given, of)}"])
    if direct:
        build.trace()
        build.warm = 0.5
    else:
        build.by_kernel(0.05)
    rows, q_heads = given.total_q, of.heads * draw.one(1, 1, 2, 3)
    q_dtype = draw.choice(FLOATS)
    _add_rows(build, "q", (rows, q_heads, of.k_dim), q_dtype)
    writes = draw.chance(0.6)
    for name, dim in (("k_new", of.k_dim), ("v_new", of.v_dim)):
        if writes:
            _add_rows(build, name, (rows, of.heads, dim), draw.choice(FLOATS))
            build.forms[name] += bad("None", names=("k_new", "v_new"))
        else:
            build.line(f"{name} = None")
            wrong = bad(*NO_TENSORS[1:], names=("k_new", "v_new"))
            if name == "k_new":  # with one for v_new too it would be right
                wrong += bad(f"torch.zeros({rows}, {of.heads}, {dim})", names=("k_new", "v_new"))
            build.arg(name, "None", wrong)
    page_1 = f"kg.PagedKVCache({of.blocks}, {of.page + 1}, {of.heads}, {of.k_dim}, device='cpu', dtype=torch.float32)"
    build.arg("cache", "cache", bad(*JUNK, page_1, "cache.key_cache", "batch", names=("batch", "q")))
    plan = [] if given.share else bad("batch.plan")
    build.arg("batch", "batch", bad(*JUNK, "kg.PrefixBatch", "cache"), plan)
    build.arg("softmax_scale", draw.one("None", "None", "0.3", "1", "np.float32(0.5)", "1e-30"), forms.number(),
              good("fractions.Fraction(1, 2)"), leave_out=0.3)  # fmt: skip
    if draw.chance(0.4):
        seed, dtype = draw.number(), draw.choice(FLOATS)
        inner = draw.one("{}", "{}", "{}", "{} * 1e4", "{} * 0 - torch.inf")
        inner = inner.format(f"normal(SHAPE, seed={seed})")
        sinks = forms.strided(draw, f"({inner}).to(torch.{dtype})", (q_heads,), overlapping=True)
        build.line(f"sinks = {sinks}")
        wrong = forms.tensors("sinks", "float64", "int32", optional=True) + bad(f"normal({q_heads + 1})", "sinks[None]")
        build.arg("sinks", "sinks", wrong, good("None", f"negative(normal({q_heads}))"))
    window = draw.choice([None, None, 1, 2, 3, 50, 2**31 - 1])
    build.arg("window", str(window), forms.integer(1)[1:], bad("0"), leave_out=0.3 if window is None else 0)
    verdict, names = GOOD, ()
    workspace = None if draw.chance(0.6) else draw.choice([1, 2, 4, 8, 100, 2**31 - 1])
    least = (window or 1) * (1 if given.known else max(1, len(given.table)))
    least = max(of.page, len(given.table)) if given.share else least
    if workspace is not None and workspace < least:
        verdict, names = EITHER, ("workspace_tokens",)
    build.arg("workspace_tokens", str(workspace), forms.integer(1, names=("window",))[1:], bad("0"),
              leave_out=0.3 if workspace is None else 0)  # fmt: skip
    build.arg("path", "'direct'" if direct else draw.one("'auto'", "'gather'"), forms.word("auto", "gather", "direct"),
              leave_out=0 if direct else 0.3)  # fmt: skip
    build.arg("return_lse", draw.one("True", "True", "False"), leave_out=0.2)
    checked = given.checked(of)
    slots = checked.slots(rows)
    written = [slot for slot in slots if slot >= 0]
    if writes and len(set(written)) < len(written):
        verdict, names = BAD, (*names, "batch", *(["cache"] if overlapping else []))
    elif writes and overlapping:
        verdict, names = EITHER, (*names, "cache")
    if draw.chance(0.02):
        build.warm = 0 if verdict != GOOD else build.warm
        build.late.append("shrunk(cache)")
        verdict, names = BAD if of.blocks else EITHER, (*names, "cache")

    def check(facts: Facts, result: Any) -> None:
        args, cache = facts.args, facts.scope["cache"]
        if args["k_new"] is not None:
            check_write(facts, cache, args["k_new"], args["v_new"], slots, kinds)
        lse_too = bool(args.get("return_lse", False))
        out, lse = result if lse_too else (result, None)
        if tuple(out.shape) != (rows, q_heads, of.v_dim) or out.dtype != args["q"].dtype:
            raise Wrong(f"out is {out.dtype} of shape {list(out.shape)}")
        if lse is not None and (tuple(lse.shape) != (rows, q_heads) or lse.dtype != torch.float32):
            raise Wrong(f"lse is {lse.dtype} of shape {list(lse.shape)}")
        want = rows_of_attention(args, cache, checked, of, rows, q_heads)
        check_all(out, lse, want)

    written_too = tuple(f"cache.{name}" for name in ("key_cache", "value_cache", "k_scale", "v_scale"))
    return build.finish(check, written_too if writes else (), verdict, names)


def _add_rows(build: Builder, name: str, shape: tuple[int, int, int], dtype: str) -> None:
    """An argument of rows of new tokens, in some memory."""
    draw = build.draw
    make = f"normal(SHAPE, seed={draw.number()}).to(torch.{dtype})"
    build.line(f"{name} = {forms.strided(draw, make, shape, overlapping=True)}")
    n, heads, dim = shape
    wrong = bad(f"torch.zeros({n + 1}, {heads}, {dim})", f"torch.zeros({n}, {heads}, {dim + 1})",
                f"torch.zeros({n}, 0, {dim})", f"torch.zeros({n}, {heads * 7 + 1 if name != 'q' else 0}, {dim})",
                names=("batch", "cache"))  # fmt: skip
    dtypes = ("float64", "int32", "float8_e4m3fn", "uint8")
    same = good(f"negative(normal({n}, {heads}, {dim}))", f"{name}.clone().requires_grad_()")
    build.arg(name, name, forms.tensors(name, *dtypes), forms.flattened(name), wrong, same)


def rows_of_attention(
    args: dict[str, Any], cache: Any, checked: Checked, of: Sizes, rows: int, q_heads: int
) -> list[list[Row]]:
    """What each row of each head has to be, of the cache as it is after the write."""
    given = args.get("softmax_scale")
    scale = of.k_dim**-0.5 if given is None else float(given)
    sinks = None if args.get("sinks") is None else args["sinks"].float().tolist()
    q = args["q"].float().tolist()
    empty = [Row([0.0] * of.v_dim, -math.inf if sinks is None else sinks[h], spare=True) for h in range(q_heads)]
    want = [list(empty) for _ in range(rows)]
    pools = [
        (Pool.of(getattr(cache, f"{which}_cache"), of.layout, which), Scales(getattr(cache, f"{which[0]}_scale")))
        for which in ("key", "value")
    ]
    for b, ids in enumerate(checked.blocks):
        tokens, new = checked.lens_k[b], checked.new(b)
        if not new:
            continue
        keys, values = ([_token(*pool, ids, j, of.page) for j in range(tokens)] for pool in pools)
        for i in range(new):
            seen = checked.seen(b, i, args.get("window"))
            for h in range(q_heads):
                head = h // (q_heads // of.heads)
                if checked.is_nan(b) or any(keys[j] is None for j in seen):
                    row = Row([math.nan] * of.v_dim, math.nan)
                else:
                    row = softmax_row(
                        q[checked.used_q[b] + i][h], [keys[j][head] for j in seen], [values[j][head] for j in seen],
                        scale, None if sinks is None else sinks[h], of.v_dim,
                    )  # fmt: skip
                want[checked.used_q[b] + i][h] = row
    return want


def _token(pool: Pool, scale: Scales, ids: list[int], position: int, page: int) -> Any:
    """`[heads][dim]` of a token; None where its block is no block of the pool."""
    column, slot = divmod(position, page)
    block = ids[column]
    if block < 0:
        return None
    found = []
    for head in range(pool.heads):
        factor = scale.at(block, head, slot)
        values = [pool.value(block, slot, head, dim) for dim in range(pool.dim)]
        found.append(values if factor is None else [product(value, factor) for value in values])
    return found


def merge_states(draw: Draw) -> Case:
    build = Builder(draw, "merge_states", "kg.merge_states")
    n, heads, dim = draw.randint(0, 5), draw.randint(0, 3), draw.randint(0, 6)
    for side in "ab":
        make = f"normal(SHAPE, seed={draw.number()}).to(torch.{draw.choice(FLOATS)})"
        build.line(f"out_{side} = {forms.strided(draw, make, (n, heads, dim), overlapping=True)}")
        inner = f"normal(SHAPE, seed={draw.number()}) * {draw.one('1', '30')}"
        where = f"normal(SHAPE, seed={draw.number()}) > {draw.one('0.5', '9.')}"
        make = f"torch.where({where}, {draw.one('-', '')}torch.inf, {inner})"
        build.line(f"lse_{side} = {forms.strided(draw, make, (n, heads), overlapping=True)}")
        if draw.chance(0.3):
            build.line(f"out_{side} = torch.where(normal({n}, {heads}, {dim}, seed={draw.number()}) > 1.2, torch.nan, "
                       f"out_{side})")  # fmt: skip
    outs = ("out_a", "out_b", "lse_a", "lse_b")
    for side in "ab":
        out, lse = f"out_{side}", f"lse_{side}"
        wrong = bad(f"torch.zeros({n + 1}, {heads}, {dim})", f"torch.zeros({n}, {heads}, {dim + 1})", names=outs)
        more = forms.tensors(out, "float64", "int32", "float8_e4m3fn", names=outs)
        build.arg(out, out, more, forms.flattened(out, outs), wrong, good(f"negative(normal({n}, {heads}, {dim}))"))
        wrong = bad(f"torch.zeros({n}, {heads + 1})", f"torch.zeros({n + 1}, {heads})", f"{lse}[..., None]", names=outs)
        more = forms.tensors(lse, "float64", "bfloat16", "float16", "int32", names=outs)
        build.arg(lse, lse, more, wrong, good(f"negative(normal({n}, {heads}))"))

    def check(facts: Facts, result: Any) -> None:
        a = facts.args
        out, lse = result
        dtype = torch.promote_types(a["out_a"].dtype, a["out_b"].dtype)
        if out.shape != a["out_a"].shape or out.dtype != dtype or lse.shape != a["lse_a"].shape:
            raise Wrong(f"gave {out.dtype} of shape {list(out.shape)}")
        lists = [a[name].float().tolist() for name in ("out_a", "lse_a", "out_b", "lse_b")]
        got, got_lse = out.float().tolist(), lse.tolist()
        for i in range(n):
            for h in range(heads):
                _check_merged(f"out[{i}, {h}]", got[i][h], got_lse[i][h], *(part[i][h] for part in lists), out.dtype)

    return build.finish(check)


def _check_merged(
    name: str, got: list[float], got_lse: float, out_a: list[float], lse_a: float, out_b: list[float], lse_b: float,
    dtype: Any,
) -> None:  # fmt: skip
    """Raise unless one row of one head is merged rightly, element by element: NaN stays where it is."""
    if lse_a == math.inf:
        lse_a = math.nan if any(map(math.isnan, out_a)) else -math.inf
    if lse_b == math.inf:
        lse_b = math.nan if any(map(math.isnan, out_b)) else -math.inf
    if lse_a == lse_b == -math.inf:
        want, lse = [0.0] * len(got), -math.inf
    elif lse_a == -math.inf or lse_b == -math.inf:
        want, lse = (out_b, lse_b) if lse_a == -math.inf else (out_a, lse_a)
    elif math.isnan(lse_a) or math.isnan(lse_b):
        want, lse = [math.nan] * len(got), math.nan
    else:
        top = max(lse_a, lse_b)
        weights = math.exp(lse_a - top), math.exp(lse_b - top)
        want = [(x * weights[0] + y * weights[1]) / sum(weights) for x, y in zip(out_a, out_b, strict=True)]
        lse = top + math.log(sum(weights))
    for d, (have, right) in enumerate(zip(got, want, strict=True)):
        check_row(f"{name}[{d}]", [have], None, Row([right], 0.0, max(map(abs, (out_a[d], out_b[d], 1e-30)))), dtype)
    both_nan, close = math.isnan(lse) and math.isnan(got_lse), abs(got_lse - lse) < 1e-4 * (1 + abs(lse))
    if not (both_nan or close or got_lse == lse):
        raise Wrong(f"{name} has log-sum-exp {got_lse}, and should have {lse}")
