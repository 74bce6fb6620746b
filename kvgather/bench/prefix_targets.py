"""What the rows of `kvgather bench prefix` say: which targets are reached, and where the paths cross."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..cases.prefix import CPU_CASES, PrefixCase, cases
from .report import Row

REACH = {16: (200, 287), 128: (850, 1251), 512: (2800, 3624)}
"""New tokens: the time to reach, and the best peer's, in µs on one H100."""
DECODE, WINDOW, WORKSPACE = 0.70, 0.10, 1.15
"""Of the bandwidth of reading the cache once; how far a window's time may be from that at 8,192; times unbounded."""
AUTO = ((1.05, 27), (1.10, 30))
"""Times the better path, and on how many of the 30 cases at least."""
PATHS = ("direct", "gather")

Target = tuple[str, str, str, bool | None]
"""What, what is to be reached, what was measured, whether it is enough; None where it was not measured."""
Found = list[tuple[PrefixCase, dict[str, Row]]]


def targets(rows: Sequence[Row]) -> str:
    """The table of what is to be reached on an H100, with what was measured."""
    found = _by_case(rows)
    lines = [*_reach(found), _decode(found), *_auto(found), *_window(found), *_workspace(found)]
    widths = [max(map(len, column)) for column in ([line[0] for line in lines], [line[1] for line in lines])]
    said = {True: "reached", False: "NOT reached", None: ""}
    return "\n".join(
        f"{what:<{widths[0]}}  {accepted:<{widths[1]}}  {said[enough]:<11}  {measured}"
        for what, accepted, measured, enough in lines
    )


def crossing(rows: Sequence[Row]) -> str:
    """Direct against gather by rows (new tokens × query heads of a group), per head dim, with the rule that fits best.

    It is what the table of `kvgather.attention.choose` is filled from: direct up to so many rows, else gather.
    """
    groups: dict[tuple[int, bool], list[tuple[int, float, float, str]]] = {}
    for case, by_name in _by_case(rows):
        if all(path in by_name for path in PATHS) and case.workspace is None:
            direct, gather = (by_name[path].p50_us for path in PATHS)
            group = groups.setdefault((case.head_dim, case.window is not None), [])
            group.append((case.rows, direct, gather, case.name))
    lines: list[str] = []
    for (dim, window), measured in sorted(groups.items()):
        measured.sort()
        most, within, worst = best_rule([(many, direct, gather) for many, direct, gather, _ in measured])
        above = min((many for many, *_ in measured if many > most), default=None)
        lines += [
            f"head dim {dim}, {'a window' if window else 'all keys'}: direct up to {most} rows"
            + (f" (or any number below {above})" if above is not None else " or more")
            + f": within 5 % on {within} of {len(measured)}, at worst {worst:.2f} × the better path"
        ]
        lines += [
            f"  {many:>6} rows  direct {direct:>8.1f} µs  gather {gather:>8.1f} µs  gather / direct "
            f"{gather / direct:5.2f}  {name}"
            for many, direct, gather, name in measured
        ]
    return "\n".join(lines)


def best_rule(measured: Iterable[tuple[int, float, float]]) -> tuple[int, int, float]:
    """The number of rows up to which direct is taken that is within 5 % most often, then the one least bad at worst.

    Args:
        measured: rows, time of the direct path, time of the gather path.

    Returns:
        That number; on how many it is within 5 % of the better path; the worst ratio.
    """
    measured = list(measured)

    def ratios(most: int) -> list[float]:
        return [
            (direct if many <= most else gather) / min(direct, gather) for many, direct, gather in measured
        ]  # fmt: skip

    def badness(most: int) -> tuple[int, float]:
        return sum(ratio > 1.05 for ratio in ratios(most)), max(ratios(most))

    best = min(sorted({0, *(many for many, *_ in measured)}), key=badness)
    return best, len(measured) - badness(best)[0], badness(best)[1]


def summary(rows: Sequence[Row]) -> str:
    """Targets and crossing; on a CPU, what was left out."""
    if not any(row.implementation == "direct" for row in rows):
        return (
            "Tiny batches in plain torch. Left out, for they need a GPU: the direct path, one program per (token, "
            "head), the\nlimits, peaks of memory, and every target."
        )
    return f"{targets(rows)}\n\n{crossing(rows)}"


def _by_case(rows: Sequence[Row]) -> Found:
    """The rows of each case that is known, by implementation."""
    known = {case.name: case for case in (*cases(torch.device("cuda")), *CPU_CASES)}
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == "prefix" and row.case in known:
            found.setdefault(row.case, {})[row.implementation] = row
    return [(known[name], by_name) for name, by_name in found.items()]


def _better(by_name: dict[str, Row]) -> tuple[float, str] | None:
    """The time and the name of the better path."""
    return min(((by_name[path].p50_us, path) for path in PATHS if path in by_name), default=None)


def _part(found: Found, part: str) -> Found:
    return [(case, by_name) for case, by_name in found if case.part == part]


def _reach(found: Found) -> Iterable[Target]:
    reached = {max(case.new): by_name for case, by_name in _part(found, "reach")}
    for new, (most, peer) in REACH.items():
        what, accepted = f"{new} new", f"≤ {most:,} µs"
        by_name = reached.get(new, {})
        best = _better(by_name)
        if best is None:
            yield what, accepted, "not measured", None
            continue
        names = (*PATHS, "auto", "token per program, dense", "dense, no gather", "dense, no gather, cached part")
        others = ", ".join(f"{name} {by_name[name].p50_us:,.1f}" for name in names if name in by_name)
        yield what, accepted, f"{best[0]:,.1f} µs, {best[0] / peer:.2f} of the best peer ({others})", best[0] <= most


def _decode(found: Found) -> Target:
    what, accepted = "1 new (decode)", f"≥ {DECODE:.2f} of reading once"
    for case, by_name in _part(found, "reach"):
        best, limit = _better(by_name), by_name.get("read limit")
        if max(case.new) == 1 and best is not None and limit is not None:
            share = limit.p50_us / best[0]
            rates = ", ".join(
                f"{name} {case.cached_bytes / by_name[name].p50_us / 1e3:,.0f} GB/s"
                for name in ("read limit", "contiguous copy", best[1], "auto") if name in by_name
            )  # fmt: skip
            return (
                what,
                accepted,
                f"{share:.2f}: {best[1]} {best[0]:.1f} µs, limit {limit.p50_us:.1f} µs ({rates})",
                (share >= DECODE),
            )
    return what, accepted, "not measured", None


def _auto(found: Found) -> Iterable[Target]:
    ratios = []
    for case, by_name in _part(found, "auto"):
        best = _better(by_name)
        if best is not None and "auto" in by_name:
            ratios.append((by_name["auto"].p50_us / best[0], case.name, best[1]))
    ratios.sort(reverse=True)
    wanted = AUTO[-1][1]
    for most, count in AUTO:
        what, accepted = f"auto within {most - 1:.0%} of the better", f"≥ {count} of {wanted}"
        worse = [f"{name} {ratio:.3f} ({path} is better)" for ratio, name, path in ratios if ratio > most]
        within = len(ratios) - len(worse)
        measured = f"{within} of {len(ratios)}" + (f"; not: {', '.join(worse)}" if worse else "")
        enough = within >= count if len(ratios) >= wanted else None
        yield what, accepted, measured if ratios else "not measured", enough


def _window(found: Found) -> Iterable[Target]:
    measured: dict[tuple[str, int], dict[int, float]] = {}
    for case, by_name in _part(found, "window"):
        for name in (*PATHS, "auto"):
            if name in by_name:
                measured.setdefault((name, max(case.new)), {})[max(case.cached)] = by_name[name].p50_us
    accepted = f"± {WINDOW:.0%} of 8,192"
    measured = {key: times for key, times in measured.items() if 8192 in times and len(times) > 1}
    if not measured:
        yield "window 128", accepted, "not measured", None
        return
    for (name, new), times in sorted(measured.items(), key=lambda item: (item[0][1], item[0][0])):
        ratios = [time / times[8192] for time in times.values()]
        line = ", ".join(f"{cached:,}: {time:.1f}" for cached, time in sorted(times.items()))
        enough = max(abs(ratio - 1) for ratio in ratios) <= WINDOW
        yield (
            f"window 128, {new} new, {name}", accepted,
            f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} (µs at {line})", enough,
        )  # fmt: skip


def _workspace(found: Found) -> Iterable[Target]:
    what = "workspace 32,768 at 262,144, 16 new"
    measured = None
    for case, by_name in _part(found, "workspace"):
        name = f"gather, workspace {case.workspace}"
        if name in by_name and "gather" in by_name:
            measured = case, by_name, by_name[name].p50_us / by_name["gather"].p50_us, f"{name}: peak memory"
    accepted = f"≤ {WORKSPACE:.2f} × unbounded"
    if measured is None:
        yield what, accepted, "not measured", None
        return
    case, by_name, ratio, peak = measured
    bounded, unbounded = (by_name[name].p50_us for name in (f"gather, workspace {case.workspace}", "gather"))
    times = f"{ratio:.3f} ({bounded:,.1f} against {unbounded:,.1f} µs)"
    yield what, accepted, times, ratio <= WORKSPACE
    allowed = f"≤ {case.allowed_peak_bytes / 2**20:.2f} MiB"
    if peak not in by_name:
        yield "  its peak memory", allowed, "not measured", None
        return
    others = ", ".join(
        f"{name.removesuffix(': peak memory')} {row.bytes / 2**20:.2f}"
        for name, row in by_name.items() if name.endswith(": peak memory") and name != peak
    )  # fmt: skip
    held = by_name[peak].bytes
    yield "  its peak memory", allowed, f"{held / 2**20:.2f} MiB ({others})", held <= case.allowed_peak_bytes
