"""The targets of `kvgather bench prefix` and the lengths at which its paths are equally fast, from measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..cases.prefix import CPU_CASES, PrefixCase, cases
from .report import Row
from .tables import text_table

REACH = {16: (200, 287), 128: (850, 1251), 512: (2800, 3624)}
"""New tokens: the target time and the best peer's time, in µs on one H100."""
DECODE, WINDOW, WORKSPACE = 0.70, 0.10, 1.15
"""Least share of the bandwidth of reading the cache once; largest deviation of a window's time from the time at 8,192
cached tokens; largest time of a bounded workspace, relative to an unbounded one."""
AUTO = ((1.05, 27), (1.10, 30))
"""Largest time relative to the faster path, and the least number of the 30 cases within it."""
PATHS = ("direct", "gather", "hybrid")

Target = tuple[str, str, str, bool | None]
"""Name, target, measurement, and whether the target is reached; None if it was not measured."""
CaseRows = list[tuple[PrefixCase, dict[str, Row]]]
"""Cases with their rows by implementation."""


def targets(rows: Sequence[Row]) -> str:
    """A table of the targets on an H100 and the measurements."""
    by_case = _by_case(rows)
    found = [*_reach(by_case), _decode(by_case), *_auto(by_case), *_window(by_case), *_workspace(by_case)]
    verdicts = {True: "reached", False: "NOT reached", None: ""}
    cells = [(name, target, verdicts[reached], measurement) for name, target, measurement, reached in found]
    return text_table(cells, ("", "to reach", "", "measured"), "llll")


def crossing(rows: Sequence[Row]) -> str:
    """The direct path's times next to the faster one's of those that gather, by head dim and rows, and the best rule.

    A rule chooses the direct path up to a number of rows (new tokens × query heads per KV head), and above it the
    faster one of the gather path and the hybrid path.
    """
    groups: dict[tuple[int, bool], list[tuple[int, float, float, str]]] = {}
    for case, by_name in _by_case(rows):
        if "direct" in by_name and "gather" in by_name and case.workspace is None:
            direct = by_name["direct"].p50_us
            gather = min(by_name[path].p50_us for path in PATHS[1:] if path in by_name)
            group = groups.setdefault((case.head_dim, case.window is not None), [])
            group.append((case.rows, direct, gather, case.name))
    parts: list[str] = []
    for (head_dim, window), times in sorted(groups.items()):
        times.sort()
        most, within, worst = best_rule([(num_rows, direct, gather) for num_rows, direct, gather, _ in times])
        above = min((num_rows for num_rows, *_ in times if num_rows > most), default=None)
        parts.append(
            f"head dim {head_dim}, {'a window' if window else 'all keys'}: direct up to {most} rows"
            + (f" (or any number below {above})" if above is not None else " or more")
            + f": within 5 % on {within} of {len(times)}, at worst {worst:.2f} × the better path"
        )
        cells = [
            (f"{num_rows}", f"{direct:.1f} µs", f"{gather:.1f} µs", f"{gather / direct:.2f}", name)
            for num_rows, direct, gather, name in times
        ]
        parts.append(text_table(cells, ("rows", "direct", "gathered", "gathered / direct", "case"), "rrrrl"))
    return "\n".join(parts)


def best_rule(times: Iterable[tuple[int, float, float]]) -> tuple[int, int, float]:
    """The rule that is most often within 5 % of the faster path; among equals, the one with the smallest worst ratio.

    Args:
        times: for each case, its rows, the direct path's time and the time of the best path that gathers.

    Returns:
        The number of rows up to which the rule chooses the direct path; the number of cases within 5 %; the worst ratio
        to the faster path.
    """
    times = list(times)

    def ratios(most: int) -> list[float]:
        return [(direct if num_rows <= most else gather) / min(direct, gather) for num_rows, direct, gather in times]

    def badness(most: int) -> tuple[int, float]:
        return sum(ratio > 1.05 for ratio in ratios(most)), max(ratios(most))

    best = min(sorted({0, *(num_rows for num_rows, *_ in times)}), key=badness)
    return best, len(times) - badness(best)[0], badness(best)[1]


def summary(rows: Sequence[Row]) -> str:
    """Targets and crossing; for a CPU's rows, what they lack."""
    if not any(row.implementation == "direct" for row in rows):
        return (
            "Tiny batches in plain torch. Left out, for they need a GPU: the direct path, one program per (token, "
            "head), the\nlimits, peaks of memory, and every target."
        )
    return f"{targets(rows)}\n\n{crossing(rows)}"


def _by_case(rows: Sequence[Row]) -> CaseRows:
    """The rows of each known case, by implementation."""
    known = {case.name: case for case in (*cases(torch.device("cuda")), *CPU_CASES)}
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == "prefix" and row.case in known:
            by_case.setdefault(row.case, {})[row.implementation] = row
    return [(known[name], by_name) for name, by_name in by_case.items()]


def _faster(by_name: dict[str, Row]) -> tuple[float, str] | None:
    """The time and the name of the faster path."""
    return min(((by_name[path].p50_us, path) for path in PATHS if path in by_name), default=None)


def _part(by_case: CaseRows, part: str) -> CaseRows:
    return [(case, by_name) for case, by_name in by_case if case.part == part]


def _reach(by_case: CaseRows) -> Iterable[Target]:
    by_new = {max(case.new): by_name for case, by_name in _part(by_case, "reach")}
    for new, (most, peer) in REACH.items():
        name, target = f"{new} new", f"≤ {most:,} µs"
        by_name = by_new.get(new, {})
        best = _faster(by_name)
        if best is None:
            yield name, target, "not measured", None
            continue
        others = (*PATHS, "auto", "token per program, dense", "dense, no gather", "dense, no gather, cached part")
        times = ", ".join(f"{other} {by_name[other].p50_us:,.1f}" for other in others if other in by_name)
        yield name, target, f"{best[0]:,.1f} µs, {best[0] / peer:.2f} of the best peer ({times})", best[0] <= most


def _decode(by_case: CaseRows) -> Target:
    name, target = "1 new (decode)", f"≥ {DECODE:.2f} of reading once"
    for case, by_name in _part(by_case, "reach"):
        best, limit = _faster(by_name), by_name.get("read limit")
        if max(case.new) == 1 and best is not None and limit is not None:
            share = limit.p50_us / best[0]
            rates = ", ".join(
                f"{other} {case.cached_bytes / by_name[other].p50_us / 1e3:,.0f} GB/s"
                for other in ("read limit", "contiguous copy", best[1], "auto") if other in by_name
            )  # fmt: skip
            times = f"{best[1]} {best[0]:.1f} µs, limit {limit.p50_us:.1f} µs"
            return name, target, f"{share:.2f}: {times} ({rates})", share >= DECODE
    return name, target, "not measured", None


def _auto(by_case: CaseRows) -> Iterable[Target]:
    ratios = []
    for case, by_name in _part(by_case, "auto"):
        best = _faster(by_name)
        if best is not None and "auto" in by_name:
            ratios.append((by_name["auto"].p50_us / best[0], case.name, best[1]))
    ratios.sort(reverse=True)
    num_cases = AUTO[-1][1]
    for most, count in AUTO:
        name, target = f"auto within {most - 1:.0%} of the better", f"≥ {count} of {num_cases}"
        worse = [f"{case} {ratio:.3f} ({path} is better)" for ratio, case, path in ratios if ratio > most]
        within = len(ratios) - len(worse)
        measurement = f"{within} of {len(ratios)}" + (f"; not: {', '.join(worse)}" if worse else "")
        reached = within >= count if len(ratios) >= num_cases else None
        yield name, target, measurement if ratios else "not measured", reached


def _window(by_case: CaseRows) -> Iterable[Target]:
    by_way: dict[tuple[str, int], dict[int, float]] = {}
    for case, by_name in _part(by_case, "window"):
        for way in (*PATHS, "auto"):
            if way in by_name:
                by_way.setdefault((way, max(case.new)), {})[max(case.cached)] = by_name[way].p50_us
    target = f"± {WINDOW:.0%} of 8,192"
    by_way = {key: times for key, times in by_way.items() if 8192 in times and len(times) > 1}
    if not by_way:
        yield "window 128", target, "not measured", None
        return
    for (way, new), times in sorted(by_way.items(), key=lambda item: (item[0][1], item[0][0])):
        ratios = [time / times[8192] for time in times.values()]
        listed = ", ".join(f"{cached:,}: {time:.1f}" for cached, time in sorted(times.items()))
        reached = max(abs(ratio - 1) for ratio in ratios) <= WINDOW
        yield (
            f"window 128, {new} new, {way}", target,
            f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} (µs at {listed})", reached,
        )  # fmt: skip


def _workspace(by_case: CaseRows) -> Iterable[Target]:
    name, target = "workspace 32,768 at 262,144, 16 new", f"≤ {WORKSPACE:.2f} × unbounded"
    for case, by_name in _part(by_case, "workspace"):
        bounded = f"gather, workspace {case.workspace}"
        if bounded in by_name and "gather" in by_name:
            times = by_name[bounded].p50_us, by_name["gather"].p50_us
            ratio = times[0] / times[1]
            measurement = f"{ratio:.3f} ({times[0]:,.1f} against {times[1]:,.1f} µs)"
            yield name, target, measurement, ratio <= WORKSPACE
            yield _peak(case, by_name, f"{bounded}: peak memory")
            return
    yield name, target, "not measured", None


def _peak(case: PrefixCase, by_name: dict[str, Row], bounded: str) -> Target:
    name, target = "its peak memory", f"≤ {case.allowed_peak_bytes / 2**20:.2f} MiB"
    if bounded not in by_name:
        return name, target, "not measured", None
    others = ", ".join(
        f"{other.removesuffix(': peak memory')} {row.bytes / 2**20:.2f}"
        for other, row in by_name.items() if other.endswith(": peak memory") and other != bounded
    )  # fmt: skip
    size = by_name[bounded].bytes
    return name, target, f"{size / 2**20:.2f} MiB ({others})", size <= case.allowed_peak_bytes
