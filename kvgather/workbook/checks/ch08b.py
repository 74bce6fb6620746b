"""Checks of chapter 08b: merging two states, a sink that is counted once, a rule for the fastest path, a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgather.attention.merge import apply_sinks, merge_states
from kvgather.bench.peers import cases as peers_cases
from kvgather.cases.prefix import PrefixCase
from kvgather.workbook.checks import Wrong, exercise, expect
from kvgather.workbook.checks.shape import pair
from kvgather.workbook.measured_paths import PATHS, expected_of_case, measured_paths
from kvgather.workbook.measured_peers import FORMS, PRODUCT_SPEED, least_time, measured_peers

HEADS, DIM = 2, 3
NAN = math.nan
MOST, USUAL, SHARE = 1.5, 1.1, 0.9
"""Largest time relative to the best path: of every batch, and of this share of them."""
TOKENS = 64
EXPECTED = tuple(
    PrefixCase("auto", q_heads=32, kv_heads=kv_heads, head_dim=256, new=(TOKENS,) * 16, cached=(8192,) * 16)
    for kv_heads in (2, 32)
)
"""Batches without recorded rows: equal new tokens, 16 and 1 query heads for each KV head. The hybrid path is faster on
the first and the direct path on the second, so a rule by new tokens alone is wrong on one of them. The recorded batches
do not refuse such a rule: their groups have 4 or 8 query heads."""
LIMITS = ("bytes", "products")
UNRECORDED_US = 1000.0
"""The time of a batch that an implementation was not timed on."""

State = tuple[Tensor, Tensor]


@exercise("08b.1", correct="each part is weighted by its denominator; a part without keys has weight 0")
def merge(answer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)

    def state(lse: float, second: float | None = None) -> State:
        """Of one row; the second head has half the log-sum-exp, or its own."""
        out = torch.randn(1, HEADS, DIM, generator=generator)
        return out, torch.tensor([[lse, lse / 2 if second is None else second]])

    def with_nan(out: Tensor, lse: Tensor) -> State:
        """Head 0 holds NaN; it counts unless its log-sum-exp is −inf."""
        out[0, 0] = NAN
        return out, lse

    no_keys = (torch.full((1, HEADS, DIM), NAN), torch.full((1, HEADS), -math.inf))
    cases = {
        "lse 1 and 2": (state(1.0), state(2.0)),
        "lse 200 and 199": (state(200.0), state(199.0)),
        "lse -200 and -199": (state(-200.0), state(-199.0)),
        "lse 3 and -inf": (state(3.0), no_keys),
        "lse -inf and 3": (no_keys, state(3.0)),
        "lse -inf and -inf": (no_keys, no_keys),
        "head 0 lse -inf and 3, head 1 lse 1 and 2": (with_nan(*state(-math.inf, 1.0)), state(3.0, 2.0)),
        "lse 1 and 2, out_a has a NaN that was seen: it must stay": (with_nan(*state(1.0)), state(2.0)),
        "lse 1 and 2, out_b has a NaN that was seen: it must stay": (state(1.0), with_nan(*state(2.0))),
        "lse 1 and -inf, out_a has a NaN that was seen: it must stay": (with_nan(*state(1.0)), no_keys),
        "lse nan and 2, a row of NaN that was seen: it must stay": (with_nan(*state(NAN, 1.0)), state(2.0)),
    }
    for name, (a, b) in cases.items():
        expected = merge_states(*a, *b)
        got = pair(name, answer(*(t.clone() for t in (*a, *b))))
        exact = name.startswith(("lse 3 and -inf", "lse -inf"))
        for tensor, right, actual in zip(("out", "lse"), expected, got, strict=True):
            expect(right, actual, f"{tensor}, {name}", tolerance=0.0 if exact else 1e-5)


@exercise("08b.2", correct="the sink is in the denominator once, for any number of parts")
def finish(answer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    sinks = torch.tensor([1.5, -2.0])

    def state() -> State:
        return torch.randn(2, HEADS, DIM, generator=generator), torch.randn(2, HEADS, generator=generator)

    no_keys = (torch.full((2, HEADS, DIM), NAN), torch.full((2, HEADS), -math.inf))
    lost = state()
    lost[0][1, 0] = NAN
    cases = {
        "one part": [state()],
        "three parts": [state() for _ in range(3)],
        "two parts, the first without keys": [no_keys, state()],
        "two parts without keys": [no_keys, no_keys],
        "two parts, the first with a NaN that was seen: it must stay": [lost, state()],
    }
    for name, parts in cases.items():
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge_states(out, lse, *part)
        # merge_states returns 0 for rows without keys.
        out = torch.where((lse == -math.inf)[..., None], 0, out)
        expected = apply_sinks(out, lse, sinks)
        got = pair(name, answer([tuple(t.clone() for t in part) for part in parts], sinks.clone()))
        for tensor, right, actual in zip(("out", "lse"), expected, got, strict=True):
            expect(right, actual, f"{tensor}, {name}", tolerance=1e-5)


@exercise("08b.3", correct="on every batch your rule is near the best path")
def my_auto(answer: Callable[..., Any]) -> str | None:
    batches = measured_paths("reach", "auto")
    worse = []
    for measured in batches:
        path, name = _path(answer, measured.case), _batch(measured.case)
        best = min(PATHS, key=measured.times.__getitem__)
        ratio = measured.times[path] / measured.times[best]
        worse.append((ratio, f"{name}: {path} takes {measured.times[path]:,.0f} µs, {best} {measured.best:,.0f} µs"))
    ratio, message = max(worse)
    if ratio > MOST:
        return f"{message}, {ratio:.1f} times as long"
    within = sum(ratio <= USUAL for ratio, _ in worse)
    if within < SHARE * len(batches):
        return f"within {USUAL - 1:.0%} of the best path on {within} of {len(batches)} batches; the worst: {message}"
    for case in EXPECTED:
        path, times = _path(answer, case), expected_of_case(case)
        best = min(PATHS, key=times.__getitem__)
        if times[path] > MOST * times[best]:
            return (
                f"{_batch(case)}, not measured: the rule of auto expects {times[path]:,.0f} µs of {path} and "
                f"{times[best]:,.0f} µs of {best}; these {TOKENS} new tokens are {case.rows:,} rows of a KV head, "
                "and the direct path pays for rows"
            )
    return None


def _path(answer: Callable[..., Any], case: PrefixCase) -> str:
    """The path that a rule takes for a batch."""
    new, cached, sequences = case.new[0], case.cached[0], len(case.new)
    path = answer(new, cached, sequences, case.q_heads, case.kv_heads, case.head_dim)
    if path not in PATHS:
        raise Wrong(f"{_batch(case)}: expected one of {', '.join(PATHS)}, got {path!r}")
    return str(path)


@exercise("08b.4", correct="the longer of both times is the limit, and its share says how much there is to gain")
def judge(answer: Callable[..., Any]) -> None:
    recorded = {measured.case.name: measured.times for measured in measured_peers()}
    forms = {name: form for name, form in FORMS.items() if form.product_speed == PRODUCT_SPEED}
    for case in peers_cases(torch.device("cuda")):
        for name, form in forms.items():
            us = recorded.get(case.name, {}).get(name, UNRECORDED_US)
            what = f"{_batch(case)}, {form.label} in {us:,.0f} µs"
            got = answer(
                case.new[0],
                case.cached[0],
                len(case.new),
                case.q_heads,
                case.kv_heads,
                case.head_dim,
                form.itemsize,
                us,
            )
            limit, share = pair(what, got)
            if limit not in LIMITS:
                raise Wrong(f"{what}: expected one of {', '.join(LIMITS)}, got {limit!r}")
            least = least_time(case, form)
            expect(least.limit, limit, f"limit, {what}")
            expect(least.us / us, share, f"share, {what}", tolerance=1e-3)


def _batch(case: PrefixCase) -> str:
    """Such as "16 new and 8,192 cached tokens, 1 sequence, 64 query and 8 KV heads of 64"."""
    sequences = len(case.new)
    return (
        f"{case.new[0]} new and {case.cached[0]:,} cached tokens, {sequences} sequence{'s' * (sequences > 1)}, "
        f"{case.q_heads} query and {case.kv_heads} KV heads of {case.head_dim}"
    )
