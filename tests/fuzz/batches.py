"""Calls of `PrefixBatch` and `GatherPlan` that no layer makes: building, `check`, `explain`, `==`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.caches import cache_lines
from tests.fuzz.case import BAD, GOOD, Builder, Case, Draw, Facts, Wrong, bad
from tests.fuzz.gathers import TABLE
from tests.fuzz.junk import JUNK
from tests.fuzz.pages import rows_of_plan
from tests.fuzz.pools import KINDS, Sizes, sizes
from tests.fuzz.prefixes import Checked, Prefix, batch_args, batch_lines, build_call, prefix
from tests.fuzz.tables import batch

WINDOWS = forms.integer(1)[1:]  # None is none


def build_batch(draw: Draw) -> Case:
    of = sizes(draw)
    given = prefix(draw, of, most_new=6, most_cached=40)
    build = Builder(draw, "PrefixBatch.build", "kg.PrefixBatch.build", batch_lines(draw, given))
    build.by_kernel()
    batch_args(build, given, of)

    def check(facts: Facts, made: Any) -> None:
        want, total_q = given.checked(of), given.total_q
        if made.total_q != total_q or (made.page_size, made.num_blocks) != (of.page, of.blocks):
            raise Wrong(f"total_q {made.total_q}, page {made.page_size}, {made.num_blocks} blocks")
        pairs = [
            ("block_table", made.block_table.tolist(), want.own_blocks()),
            ("cu_seqlens_q", made.cu_seqlens_q.tolist(), want.used_q),
            ("cu_seqlens_k", made.cu_seqlens_k.tolist(), [sum(want.lens_k[:b]) for b in range(len(want.lens_k) + 1)]),
            ("slots", made.slots.tolist(), want.slots(total_q)),
            ("share", made.share, given.share),
            ("writers", made.writers.tolist(), writers(given, want)),
            ("max_q, max_k", (made.max_q, made.max_k), (want.max_q, want.max_k)),
            ("dtypes", {t.dtype for t in (made.block_table, made.cu_seqlens_q, made.cu_seqlens_k)}, {torch.int32}),
        ]
        for name, got, expected in pairs:
            if got != expected:
                raise Wrong(f"{name} is {got}, and should be {expected}")

    return build.finish(check)


def writers(given: Prefix, want: Checked) -> list[int]:
    """The rank that has the page of each new token, whether its block is good or not."""
    found, ranks = [-1] * given.total_q, want.share[1]
    for b, tokens in enumerate(want.lens_k):
        for i in range(want.new(b)):
            position = tokens - want.new(b) + i
            found[want.used_q[b] + i] = position // want.page % ranks if position >= 0 else -1
    return found


def faults(given: Prefix, of: Sizes, window: int | None) -> list[str]:
    """The arguments of which `check` has something to report."""
    checked, found = given.checked(of), []
    n = given.numbers
    totals = [n["total_q"] if n["total_q"] is not None else given.cu_q[-1],
              n["total_k"] if n["total_k"] is not None else given.cu_k[-1]]  # fmt: skip
    for name, cu, total in (("cu_seqlens_q", given.cu_q, totals[0]), ("cu_seqlens_k", given.cu_k, totals[1])):
        if cu[0] != 0 or any(not a <= b <= total for a, b in pairwise(cu)):
            found.append(name)
    if found:
        return found
    for b, row in enumerate(given.table):
        new, tokens = given.cu_q[b + 1] - given.cu_q[b], given.cu_k[b + 1] - given.cu_k[b]
        if new > tokens:
            found.append("cu_seqlens_k")
            continue
        first = 0 if window is None else max(0, tokens - new - window + 1)
        rank, ranks = checked.share
        columns = range(first // of.page, -(-tokens // of.page))
        past_the_end = any(column >= len(row) for column in columns)  # of a table that all ranks have
        if past_the_end or any(not 0 <= row[column] < of.blocks for column in columns if column % ranks == rank):
            found.append("block_table")
        if new > checked.max_q:
            found.append("max_q")
        if tokens > checked.max_k:
            found.append("max_k")
    return found


def check_batch(draw: Draw) -> Case:
    of = sizes(draw)
    given = prefix(draw, of, sick=0.7)
    window = draw.choice([None, None, 1, 2, 5, 100])
    lines = [*batch_lines(draw, given), f"batch = {build_call(given, of)}"]
    if draw.chance(0.5):  # buffers may be used again before it
        lines += ["for buffer in (block_table, cu_seqlens_q, cu_seqlens_k): buffer.zero_()"]
    build = Builder(draw, "PrefixBatch.check", "batch.check", lines, spoils=(0.8, 0.2, 0))
    build.arg("window", str(window), WINDOWS, bad("0"), leave_out=0.5 if window is None else 0)
    found = faults(given, of, window)

    def check(facts: Facts, result: Any) -> None:
        if result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")

    build.warm = 0 if found else 0.3
    return build.finish(check, verdict=BAD if found else GOOD, names=tuple(found))


def check_plan(draw: Draw) -> Case:
    of = sizes(draw)
    given = batch(draw, of, sick=0.6)
    lines = [f"{name} = {code}" for name, code in zip(TABLE, given.codes(draw), strict=True)]
    total = given.total
    lines.append(f"plan = kg.GatherPlan.build(block_table, cu_seqlens_k, page_size={of.page}, num_blocks={of.blocks}, "
                 f"total_tokens={total}, seq_starts=seq_starts)")  # fmt: skip
    if draw.chance(0.5):
        lines.append("block_table.zero_(), cu_seqlens_k.zero_()")
    build = Builder(draw, "GatherPlan.check", "plan.check", lines, spoils=(1.0,), warm=0)
    cu, found = given.cu, []
    if cu[0] != 0 or any(not a <= b <= total for a, b in pairwise(cu)) or cu[0] > total:
        found.append("cu_seqlens_k")
    elif "bad" in rows_of_plan(given.table, cu, given.starts, of.page, of.blocks, total):
        found += ["block_table", "seq_starts"]

    def check(facts: Facts, result: Any) -> None:
        if result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")

    return build.finish(check, verdict=BAD if found else GOOD, names=tuple(found))


SAME = """
def compared(one, like, other):
    return [one == one, one != one, one == like, one == other, other == one, len({one, like}), hash(one) == hash(one)]
"""


def equality(draw: Draw) -> Case:
    """Plans and batches are equal to themselves alone, and have a hash."""
    of = sizes(draw)
    given = prefix(draw, of, sick=0)
    if draw.chance(0.5):
        what, code = "GatherPlan", f"kg.GatherPlan.build(block_table, cu_seqlens_k, page_size={of.page}, num_blocks=9)"
    else:
        what, code = "PrefixBatch", build_call(given, of)
    lines = [SAME.strip(), *batch_lines(draw, given), f"one, like = {code}, {code}"]
    build = Builder(draw, f"{what} == and hash", "compared", lines, spoils=(1.0,), warm=0)
    build.arg("one", "one")
    build.arg("like", "like")
    build.arg("other", draw.one("None", "3", "'x'", "block_table", "np.zeros(3)", "one.total_tokens"
                                if what == "GatherPlan" else "one.total_q"))  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        other = facts.args["other"]
        if isinstance(other, torch.Tensor) or hasattr(other, "shape"):
            result = [*result[:3], False, False, *result[5:]]  # a tensor decides itself what equals it
        if result != [True, False, False, False, False, 2, True]:
            raise Wrong(f"gave {result}")

    return build.finish(check)


def explain(draw: Draw) -> Case:
    of = sizes(draw)
    given = prefix(draw, of, sick=0.1)
    kinds = draw.choice(KINDS), draw.choice(KINDS)
    lines = [*batch_lines(draw, given), f"batch = {build_call(given, of)}", *cache_lines(draw, of, kinds, True)]
    prepares = draw.chance(0.5)
    name = "prepare" if prepares else "explain"
    build = Builder(draw, f"PrefixBatch.{name}", f"batch.{name}", lines)
    heads = of.heads * draw.one(1, 2, 4)
    build.arg("cache", "cache", forms.bad(*JUNK, "batch", "kg.PagedKVCache", "cache.key_cache"))
    wrong = forms.integer(1), forms.same_integer(heads), bad(str(of.heads + 1)) if of.heads > 1 else []
    build.arg("num_q_heads", str(heads), *wrong)
    window = draw.choice([None, None, 1, 3, 100])
    build.arg("window", str(window), WINDOWS, bad("0"), leave_out=0.3)
    build.arg("dtype", draw.one("torch.bfloat16", "torch.float16", "torch.float32"), forms.dtype("float8_e4m3fn"),
              leave_out=0.3)  # fmt: skip
    if prepares:
        others = forms.bad("kg.PagedKVCache(0, 77, 1, 4, device='cpu')", "torch.zeros(3)", names=("batch",))
        build.forms["cache"] += others
        build.arg("workspace_tokens", draw.one("None", "1000"), forms.integer(1)[1:], bad("0"), leave_out=0.3)
        build.arg("path", draw.one("'auto'", "'gather'", "'direct'"), forms.word("auto", "gather", "direct"),
                  leave_out=0.3)  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        if prepares and result is not None:
            raise Wrong(f"returned {type(result).__name__}, and should return None")
        if not prepares and (type(result) is not str or not result.startswith("auto takes the gather path")):
            raise Wrong(f"gave {result!r:.200}")

    return build.finish(check)
