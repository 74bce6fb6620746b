"""What the recorded rows say: which implementation is the fastest at which number of new tokens, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ..bench.peer_fa3 import BF16_POOL
from ..bench.peer_kernels import DIRECT, HOPPER
from ..bench.peer_targets import LIMIT, MOST_ERROR, OURS
from .measured_paths import rule_takes
from .measured_peers import FORMS, LABELS, MeasuredPeers, hopper_attends, least_time

__all__ = ["error_range", "kernel_rows", "limit_rows", "limits_verdict", "time_rows", "verdict", "verdict_rows"]

LEVEL = 1.02
"""Times that differ by at most 2 % count as equal: the spread of most rows."""


class _Place(NamedTuple):
    """Ours among others at one number of new tokens: how it ends, the fastest other, and the times' ratio."""

    outcome: str
    other: str
    ratio: float


def verdict(points: Mapping[int, MeasuredPeers], most_error: float | None = None) -> str:
    """Who is the fastest, in sentences.

    Args:
        points: of one layer, by the number of new tokens.
        most_error: others with a larger error are left out; None leaves out none.
    """
    places = [(new, _place(at, most_error)) for new, at in sorted(points.items())]
    sentences = []
    for (outcome, other), group in groupby(places, key=lambda place: place[1][:2]):
        run = list(group)
        news, ratios = [new for new, _ in run], _numbers(f"{place.ratio:.2f}" for _, place in run)
        at = f"At {_numbers(map(str, news))} new token{'s' * (news != [1])}"
        label = LABELS.get(other, "")
        sentences.append(
            {
                "none": f"{at} no other was timed.",
                "leads": f"{at} ours is the fastest; {label} takes {ratios} times as long.",
                "level": f"{at} ours and {label} are level.",
                "trails": f"{at} {label} is the fastest; ours takes {ratios} times as long.",
            }[outcome]
        )
    return " ".join(sentences)


def _place(at: MeasuredPeers, most_error: float | None) -> _Place:
    others = [
        name
        for name in FORMS
        if name != OURS and name in at.times and (most_error is None or at.errors[name] <= most_error)
    ]
    if not others:
        return _Place("none", "", 0.0)
    other = min(others, key=at.times.__getitem__)
    ratio = at.times[OURS] / at.times[other]
    if ratio > LEVEL:
        return _Place("trails", other, ratio)
    if ratio >= 1 / LEVEL:
        return _Place("level", other, ratio)
    return _Place("leads", other, 1 / ratio)


def _numbers(texts: Iterable[str]) -> str:
    """Such as "1, 16 and 128"."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def verdict_rows(layers: Mapping[str, Mapping[int, MeasuredPeers]]) -> list[tuple[str, str, str]]:
    """Rows of a table: the layer, which implementations are compared with ours, and the verdict."""
    among = {"all": None, f"error ≤ {_error(MOST_ERROR)}": MOST_ERROR}
    return [(title, name, verdict(points, most)) for title, points in layers.items() for name, most in among.items()]


def time_rows(title: str, points: Mapping[int, MeasuredPeers]) -> tuple[list[tuple[str | None, ...]], list[str]]:
    """Times of one layer, above the dtypes and the largest error of each implementation.

    A time of ours has the path that `auto` takes now, the others have their ratio to ours.

    Returns:
        Rows and headers for `tables.table`; the first header is the title.
    """
    names = [name for name in (*FORMS, LIMIT) if any(name in at.times for at in points.values())]
    rows: list[tuple[str | None, ...]] = [
        (_new(new), *(_time(at, name) for name in names)) for new, at in sorted(points.items())
    ]
    dtypes = [f"{FORMS[name].pool}, {FORMS[name].q}" if name in FORMS else None for name in names]
    errors = [max((at.errors[name] for at in points.values() if name in at.errors), default=None) for name in names]
    rows += [("dtypes of pool, Q", *dtypes), ("largest error", *(None if e is None else _error(e) for e in errors))]
    return rows, [title, *(LABELS[name] for name in names)]


def _new(new: int) -> str:
    return f"{new} new token{'s' * (new != 1)}"


def _time(at: MeasuredPeers, name: str) -> str | None:
    if name not in at.times:
        return None
    time, ratio = f"{at.times[name]:,.0f} µs", at.ratio(name)
    if name == OURS:
        return f"{time}, {_way(at)}"
    return time if ratio is None else f"{time} ({ratio:.2f})"


def _way(at: MeasuredPeers) -> str:
    """The path that `auto` takes, and whether the Hopper kernel attends on it."""
    hopper = hopper_attends(at.case)
    path = rule_takes(at.case, hopper)
    return f"{path}, Hopper" if hopper and path == "direct" else path


def kernel_rows(measured: Sequence[MeasuredPeers]) -> tuple[list[tuple[str | None, ...]], list[str]]:
    """The two kernels of the direct path, each by itself, and what `auto` took.

    Returns:
        Rows and headers for `tables.table`; no rows where the kernels were not timed.
    """
    rows: list[tuple[str | None, ...]] = []
    for at in sorted(measured, key=lambda at: (at.case.head_dim, at.new, at.case.cached)):
        if {DIRECT, HOPPER} <= at.times.keys():
            case, direct, hopper = at.case, at.times[DIRECT], at.times[HOPPER]
            batch = f"{len(case.new)} × ({case.cached[0]:,} + {at.new:,})"
            rows.append((at.layer, batch, f"{direct:,.0f} µs", f"{hopper:,.0f} µs", f"{direct / hopper:.2f}", _way(at)))
    return rows, ["layer", "sequences × (cached + new)", DIRECT, HOPPER, "direct / Hopper", "auto takes"]


def error_range(measured: Sequence[MeasuredPeers], name: str) -> str | None:
    """The smallest and the largest error of an implementation, such as "1.7e-3 to 3.5e-3"; None without one."""
    errors = [at.errors[name] for at in measured if name in at.errors]
    if not errors:
        return None
    least, most = _error(min(errors)), _error(max(errors))
    return least if least == most else f"{least} to {most}"


def _error(error: float) -> str:
    """Such as 3.5e-3; two digits of an exponent would make a table's columns wider."""
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def limit_rows(title: str, points: Mapping[int, MeasuredPeers]) -> tuple[list[tuple[str | None, ...]], list[str]]:
    """Of one layer: what limits each implementation, bytes or products, and which share of this limit it reaches.

    Returns:
        Rows and headers for `tables.table`; the first header is the title.
    """
    names = [name for name in (*FORMS, LIMIT) if any(name in at.times for at in points.values())]
    rows = [(_new(new), *(_share(at, name) for name in names)) for new, at in sorted(points.items())]
    return rows, [title, *(LABELS[name] for name in names)]


def _share(at: MeasuredPeers, name: str) -> str | None:
    share = at.share(name)
    if share is None:
        return None
    return f"{'bytes' if name == LIMIT else least_time(at.case, FORMS[name]).limit}, {share:.0%}"


def limits_verdict(measured: Sequence[MeasuredPeers], name: str = BF16_POOL) -> list[str]:
    """Ours next to another implementation, where bytes limit both and where products do: times, and shares reached."""
    both = [at for at in measured if OURS in at.times and name in at.times]
    sentences = []
    for limit in ("bytes", "products"):
        alike = [at for at in both if {least_time(at.case, FORMS[one]).limit for one in (OURS, name)} == {limit}]
        if alike:
            ratios = _range([at.times[OURS] / at.times[name] for at in alike], ".2f")
            ours, other = (_range([at.share(one) or 0.0 for at in alike], ".0%") for one in (OURS, name))
            sentences += [
                f"Where {limit} limit both, ours takes {ratios} times as long as {LABELS[name]}.",
                f"There ours reaches {ours} of its limit, {LABELS[name]} {other}.",
            ]
    return sentences or [f"{LABELS[name]} was not timed next to ours."]


def _range(numbers: Sequence[float], form: str) -> str:
    least, most = (format(number, form) for number in (min(numbers), max(numbers)))
    return least if least == most else f"{least} to {most}"
