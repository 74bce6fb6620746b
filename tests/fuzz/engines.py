"""Calls of `cp_mha_gather_cache`, as engines make them, and what has to come of them."""

from __future__ import annotations

from typing import Any

from tests.fuzz import forms
from tests.fuzz.case import BAD, GOOD, Builder, Case, Draw, Facts, Wrong, bad, either, good
from tests.fuzz.gathers import add_rows, numbers
from tests.fuzz.pages import Pool, Scales, check_rows, rows_of_plan
from tests.fuzz.pools import FLOATS, Sizes, add_pools, pool_lines, scale_code, scale_forms, sizes, taken_away
from tests.fuzz.tables import batch, index_forms


def engines_call(draw: Draw) -> Case:
    of = sizes(draw)
    flat = of.layout == "SHUFFLE" and draw.chance(0.4)
    build = Builder(draw, "cp_mha_gather_cache", "kg.cp_mha_gather_cache")
    build.by_kernel()
    if flat:
        like = Sizes("NHD", of.blocks, of.page, of.heads, of.k_dim, of.v_dim, of.dtype)
        if of.v_dim % of.x and draw.chance(0.5):
            like.v_dim = of.v_dim = of.k_dim
        for line in pool_lines(draw, like, overlapping=False):
            build.line(line)
        build.line("key_cache, value_cache = (pool.contiguous() for pool in (key_cache, value_cache))")
    else:
        build.lines += pool_lines(draw, of)
    add_pools(build, of)
    given = batch(draw, of, 24, 0.2)
    names = ("block_tables", "cu_seqlens_kv", "seq_starts")
    for name, code in zip(names, given.codes(draw), strict=True):
        build.line(f"{name} = {code}")
    dequant, out_dtype = draw.chance(0.7), draw.choice(FLOATS)
    if not dequant and draw.chance(0.3):
        out_dtype = of.dtype
    add_rows(build, of, given.total, out_dtype, ("key", "value"))
    for name, other in (("key", "value"), ("value", "key")):
        expanded = f"{name}.new_zeros(1).expand(400, 9, 9)"
        wrong = bad(f"{name}[None]", f"{name}.double()", expanded, f"{name}[..., :-1]", names=(other,))
        if of.k_dim == of.v_dim:  # one tensor for both, which may be without elements
            wrong += bad(other, names=(other,)) if given.total else either(other, names=(other,))
        build.arg(name, name, forms.tensors(name, names=(other, "key's dtype")), wrong)
    build.arg("block_tables", names[0], index_forms(names[0], 2, names))
    build.arg("cu_seqlens_kv", names[1], index_forms(names[1], 1, names))
    wrong_starts = index_forms(names[2] if given.starts else names[1], 1, names, optional=True)
    build.arg("seq_starts", names[2], [form for form in wrong_starts if given.starts or form.verdict == BAD])
    allowed = ["per-tensor", "per-head", "per-token-head"]
    kinds = draw.choice(allowed), draw.choice(allowed)
    for side, kind in zip("kv", kinds, strict=True):
        build.line(f"{side}_scales = {scale_code(draw, of, kind)}")
        wrong = [f for f in scale_forms(of, f"{side}_scales", kind) if f.verdict == BAD]
        wrong += either(f"torch.ones({of.blocks}, {of.heads})", names=("per_token_quant",)) + bad("None")
        if not dequant:  # not looked at
            wrong = good("None", "'junk'", "torch.ones(3, 3)", "object()")
        build.arg(f"{side}_scales", f"{side}_scales", wrong)
    follow = [draw.randrange(max(1, len(given.table))) for _ in range(given.total)]  # it is not used
    say = "None" if draw.chance(0.5) else forms.whole_numbers(draw, follow, draw.one("int32", "int64"))
    build.line(f"token_to_batch = {say}")
    wrong_follow = bad("3", "'x'", "[0]", "torch.zeros(500)", "torch.zeros(500, 1, dtype=torch.int32)")
    build.arg("token_to_batch", "token_to_batch", wrong_follow)
    build.arg("dequant", str(dequant), bad("None", "1", "0", "'True'", "np.bool_(True)", "torch.tensor(True)"))
    build.arg("kv_cache_layout", repr(of.layout), forms.word("NHD", "HND", "SHUFFLE"))
    build.arg("total_tokens", str(given.total), forms.integer(), forms.same_integer(given.total),
              bad(str(given.total + 400), names=("key", "value", "token_to_batch")))  # fmt: skip
    per_token = True if "per-token-head" in kinds else draw.chance(0.5)
    build.arg("per_token_quant", str(per_token), bad("None", "1", "'no'", "np.bool_(False)"), leave_out=0.3)
    if "per_token_quant" not in build.args and not per_token:
        build.args["per_token_quant"] = "False"

    def check(facts: Facts, result: Any) -> None:
        args = facts.args
        if result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")
        table, cu, starts = (numbers(args[name]) for name in names)
        assert table is not None and cu is not None
        rows = rows_of_plan(table, cu, starts, of.page, of.blocks, int(args["total_tokens"]))
        for which, side in (("key", "k"), ("value", "v")):
            pool = Pool.of(args[f"{which}_cache"], of.layout, which, flat)
            scale = Scales(args[f"{side}_scales"] if args["dequant"] else None)
            check_rows(which, args[which], facts.before(args[which]), pool, scale, rows)

    outs = ("key",) if given.total else ()
    verdict, blamed = taken_away(build, of, "s", outs) if dequant else (GOOD, ())
    return build.finish(check, ("args['key']", "args['value']"), verdict, blamed)
