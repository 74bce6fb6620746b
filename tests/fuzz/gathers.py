"""Calls of `GatherPlan.build` and `gather`, and what has to come of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fuzz import forms
from tests.fuzz.case import BAD, Builder, Case, Draw, Facts, Wrong, bad, either, good, large
from tests.fuzz.junk import JUNK
from tests.fuzz.pages import Pool, Scales, check_rows, rows_of_plan, used_offsets
from tests.fuzz.pools import (
    FLOATS,
    FP8,
    KINDS,
    Sizes,
    add_pools,
    kind_forms,
    pool_lines,
    scale_code,
    scale_forms,
    sizes,
    taken_away,
)
from tests.fuzz.tables import Batch, batch, index_forms

TABLE = ("block_table", "cu_seqlens_k", "seq_starts")


def numbers(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else tensor.tolist()


def backend_of(draw: Draw, share: float = 0.12) -> str:
    return "'triton'" if draw.chance(share) else draw.one("'auto'", "'torch'")


def build_plan(draw: Draw) -> Case:
    of = sizes(draw)
    given = batch(draw, of, most=40)
    build = Builder(draw, "GatherPlan.build", "kg.GatherPlan.build")
    build.by_kernel()
    add_table(build, given, of)

    def check(facts: Facts, plan: Any) -> None:
        args = facts.args
        table, cu, starts = (numbers(args.get(name)) for name in TABLE)
        assert table is not None and cu is not None
        total = args.get("total_tokens")
        check_plan(plan, table, cu, starts, int(args["page_size"]), int(args["num_blocks"]),
                   cu[-1] if total is None else int(total))  # fmt: skip

    return build.finish(check)


def add_table(build: Builder, given: Batch, of: Sizes) -> None:
    """The arguments of `GatherPlan.build`."""
    for name, code in zip(TABLE, given.codes(build.draw), strict=True):
        build.line(f"{name} = {code}")
    build.arg("block_table", "block_table", index_forms("block_table", 2, TABLE), bad("block_table.flatten()"))
    build.arg("cu_seqlens_k", "cu_seqlens_k", index_forms("cu_seqlens_k", 1, TABLE), bad("cu_seqlens_k[:-1]"))
    starts = index_forms("cu_seqlens_k" if given.starts is None else "seq_starts", 1, TABLE, optional=True)
    build.arg("seq_starts", "seq_starts", [form for form in starts if given.starts or form.verdict == BAD])
    sizes_forms = forms.integer(1), forms.same_integer(of.page)
    build.arg("page_size", str(of.page), *sizes_forms, either("2**31 - 1", "1", names=TABLE[1:2]))
    build.arg("num_blocks", str(of.blocks), forms.integer(), forms.same_integer(of.blocks), good("2**31 - 1"))
    total = forms.integer()[1:]  # None is one of its forms
    code = "None" if given.given_total is None else str(given.given_total)
    total += large("2**31 - 1") if of.page == 1 else []  # 16 GiB of records
    build.arg("total_tokens", code, total, forms.same_integer(given.total), leave_out=0.5 if code == "None" else 0)


def check_plan(
    plan: Any, table: list[list[int]], cu: list[int], starts: list[int] | None, page: int, blocks: int, total: int
) -> None:
    """Raise unless a plan's records name the rows that its table and offsets do, each in the place it belongs to."""
    if (plan.total_tokens, plan.page_size, plan.num_blocks) != (total, page, blocks):
        raise Wrong(f"the plan says {plan.total_tokens} rows, page {plan.page_size}, {plan.num_blocks} blocks")
    if not table:  # its rows may be 2^31 - 1 then
        if len(plan.records):
            raise Wrong(f"a plan of no sequences has {len(plan.records)} records")
        return
    want, got, used = rows_of_plan(table, cu, starts, page, blocks, total), [None] * total, used_offsets(cu, total)
    for at, (block, first, rows, begin) in enumerate(plan.records.tolist()):
        if rows == 0:
            if (block, first, begin) != (-1, 0, 0):
                raise Wrong(f"records[{at}] is {[block, first, rows, begin]}, and without rows should be [-1, 0, 0, 0]")
            continue
        sequence = max(b for b in range(len(table)) if used[b] // page + 2 * b <= at)
        if not used[sequence] <= first < used[sequence + 1]:
            raise Wrong(f"records[{at}] is of row {first}, which is not of sequence {sequence}")
        for row in range(rows):
            if got[first + row] is not None:
                raise Wrong(f"row {first + row} has two records")
            got[first + row] = "bad" if block < 0 else (block, begin + row)  # type: ignore[call-overload]
    if got != want:
        at = next(i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
        raise Wrong(f"row {at} of the plan is {got[at]}, and should be {want[at]}")


def add_plan(build: Builder, of: Sizes, most: int = 24, sick: float = 0.2) -> Batch:
    """Lines that make `plan`, and the argument of this name."""
    draw = build.draw
    given = batch(draw, of, most, sick)
    for name, code in zip(TABLE, given.codes(draw), strict=True):
        build.line(f"{name} = {code}")
    blocks = draw.choice([of.blocks, of.blocks, max(0, of.blocks - 1)])
    total = "" if given.given_total is None else f", total_tokens={given.given_total}"
    sizes_code = f"page_size={of.page}, num_blocks={blocks}"
    build.line(f"plan = kg.GatherPlan.build(block_table, cu_seqlens_k, {sizes_code}{total}, seq_starts=seq_starts)")
    others = (f"page_size={of.page + 1}, num_blocks=0", f"page_size={of.page}, num_blocks={of.blocks + 1}")
    wrong = [f"kg.GatherPlan.build(block_table[:, :0], cu_seqlens_k * 0, {sizes})" for sizes in others]
    build.arg("plan", "plan", forms.bad(*JUNK, "plan.records", "kg.GatherPlan", *wrong, "(plan,)"))
    return given


def rows_of(facts: Facts) -> list[Any]:
    """What the rows of the scope's plan hold."""
    scope = facts.scope
    table, cu, starts = (numbers(scope[name]) for name in TABLE)
    assert table is not None and cu is not None
    plan = facts.args["plan"]
    return rows_of_plan(table, cu, starts, plan.page_size, plan.num_blocks, plan.total_tokens)


def add_out(build: Builder, of: Sizes, total: int, out_dtype: str, names: tuple[str, ...] = ()) -> bool:
    """The argument `out`; returns whether it is given."""
    draw = build.draw
    junk = forms.bad(*(code for code in JUNK if code != "None"), "(None, None)", "[torch.zeros(1)] * 2",
                     "(key_cache, value_cache)", "(torch.zeros(0), 3)")  # fmt: skip
    if draw.chance(0.5):
        build.arg("out", "None", junk, leave_out=0.5)
        return False
    add_rows(build, of, total, out_dtype, ("k_out", "v_out"))
    wrong = bad(
        "(k_out, v_out.double())", "(k_out.to('meta'), v_out)", "(k_out[None], v_out)", "(v_out,)",
        "(k_out, v_out, v_out)", "(k_out.flatten(), v_out)", "(k_out, v_out[..., None])", "{'k': k_out, 'v': v_out}",
        f"(k_out, v_out.new_zeros(1).expand({max(2, total)}, {of.heads}, {of.v_dim}))", "iter((k_out, v_out))",
        f"(k_out[: {max(0, total - 1)}] if {total} else k_out.new_zeros(()), v_out)",
        "(k_out, torch.zeros(3, 3).to_sparse())", names=names,
    )  # fmt: skip
    both = ("(k_out, k_out)", "[v_out, v_out]")  # which may be without elements
    wrong += bad(*both, names=names) if total else either(*both, names=names)
    if out_dtype == "float32":
        wrong += bad("(negative(k_out), v_out)", "(k_out, negative(v_out))", names=names)
    wrong += either("(without_memory(k_out), v_out)", "[k_out, without_memory(v_out)]")
    shape, dtype = f"({total}, {of.heads}, {of.k_dim})", f"torch.{out_dtype}"
    wrong += bad(f"(over(key_cache, {shape}, {dtype}), v_out)", f"(k_out, over(k_out, v_out.shape, {dtype}))",
                 f"(over(value_cache, {shape}, {dtype}), v_out)", names=names)  # fmt: skip
    build.arg("out", "(k_out, v_out)", junk, wrong, good("[k_out, v_out]"))
    return True


def add_rows(build: Builder, of: Sizes, total: int, dtype: str, names: tuple[str, str]) -> None:
    """Lines that make outputs of at least `total` rows, in some memory."""
    draw = build.draw
    rows = total + draw.choice([0, 0, 1, 3])
    make = f"codes(SHAPE).view(torch.{dtype})" if dtype in FP8 else f"torch.full((SHAPE,), 7.).to(torch.{dtype})"
    if of.k_dim == of.v_dim and draw.chance(0.2):
        both = make.replace("SHAPE", f"{rows}, 2, {of.heads}, {of.k_dim}")
        build.line(f"both_out = {both}")
        build.line(f"{names[0]}, {names[1]} = both_out[:, 0], both_out[:, 1]")
        return
    for name, dim in zip(names, (of.k_dim, of.v_dim), strict=True):
        build.line(f"{name} = {forms.strided(draw, make, (rows, of.heads, dim))}")


def gather(draw: Draw) -> Case:
    triton = draw.chance(0.12)
    of = sizes(draw)
    build = Builder(draw, "gather (triton)" if triton else "gather", "kg.gather")
    if triton:
        build.trace()
        build.warm = 0.6  # a call like one that passed has a way of its own
    build.lines += pool_lines(draw, of)
    add_pools(build, of)
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    raw = kinds == ("none", "none") and draw.chance(0.4)
    out_dtype = of.dtype if raw else draw.choice(FLOATS)
    given = add_plan(build, of, 12 if triton else 24)
    left_out = 0.5 if of.layout == "NHD" else 0
    build.arg("layout", repr(of.layout), forms.word("NHD", "HND", "SHUFFLE"), leave_out=left_out)
    for side, kind in zip("kv", kinds, strict=True):
        code = scale_code(draw, of, kind)
        build.line(f"{side}_scale = {code}")
        build.arg(f"{side}_scale", f"{side}_scale", scale_forms(of, f"{side}_scale", kind))
        say = "None" if kind == "per-tensor" or draw.chance(0.7) else repr(kind)
        build.arg(f"{side}_kind", say, forms.word(*KINDS, optional=True), leave_out=0.7 if say == "None" else 0)
        for form in kind_forms(kind):
            if form.verdict != BAD:
                build.forms[f"{side}_kind"].append(forms.either(form.code, names=(f"{side}_scale",))[0])
    wrong = [] if raw or kinds == ("none", "none") else ["float8_e4m3fn", "float8_e5m2"]
    more = good("torch.float32", "torch.float16", "torch.bfloat16")
    add_out(build, of, given.total, out_dtype, ("out_dtype",))
    build.arg("out_dtype", f"torch.{out_dtype}", forms.dtype(*wrong))
    if "out" not in build.args or build.args["out"] == "None":
        build.forms["out_dtype"] += more
    build.arg("backend", "'triton'" if triton else draw.one("'auto'", "'torch'"),
              forms.word("auto", "torch", "triton"), leave_out=0 if triton else 0.3)  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        args = facts.args
        out, layout = args.get("out"), args.get("layout", "NHD")
        rows = rows_of(facts)
        check_pair(result, out, args.get("out_dtype", torch.bfloat16), len(rows), of)
        for i, (which, side) in enumerate((("key", "k"), ("value", "v"))):
            pool = Pool.of(args[f"{which}_cache"], layout, which)
            scale = Scales(args.get(f"{side}_scale"), args.get(f"{side}_kind"))
            check_rows(f"result[{i}]", result[i], None if out is None else facts.before(out[i]), pool, scale, rows)

    outs = ("k_out",) if build.args.get("out", "None") != "None" and given.total else ()
    return build.finish(check, ("args['out'][0]", "args['out'][1]"), *taken_away(build, of, outs=outs))


def check_pair(result: Any, out: Any, dtype: Any, total: int, of: Sizes) -> None:
    """Raise unless a gather returned two tensors of the right shape, or those that it was given."""
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(t, Tensor) for t in result):
        raise Wrong(f"returned {type(result).__name__}, and should return K and V")
    if out is not None:
        if result[0] is not out[0] or result[1] is not out[1]:
            raise Wrong("returned other tensors than out")
        return
    for tensor, dim in zip(result, (of.k_dim, of.v_dim), strict=True):
        if tuple(tensor.shape) != (total, of.heads, dim) or tensor.dtype != dtype:
            raise Wrong(f"returned {tensor.dtype} of shape {list(tensor.shape)}, and should {[total, of.heads, dim]}")
