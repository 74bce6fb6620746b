"""The targets of `kvgather bench prefix --peers`: our attention relative to the peers', from measured rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import peer_fa3, peer_flashinfer
from .report import Row
from .tables import text_table

OURS = "auto, attention alone"
LIMIT = "read limit"
PEERS = (*peer_fa3.NAMES, *peer_flashinfer.NAMES)
MOST_ERROR = 5e-3
"""Largest error of our attention against float64."""

_WORK_64, _WORK_128 = "peers-64q8x64-NHD-per-tensor-{}", "peers-32q8x128-NHD-per-tensor-{}"
TARGETS: Mapping[str, tuple[float, str]] = {
    _WORK_64.format("16seqs-8192+16"): (1.0, peer_fa3.BF16_POOL),
    _WORK_64.format("16seqs-8192+128"): (1.0, peer_fa3.BF16_POOL),
    _WORK_64.format("16seqs-8192+512"): (1.0, peer_fa3.BF16_POOL),
    _WORK_128.format("16seqs-8192+1"): (1.0, peer_fa3.FP8_POOL),
    _WORK_128.format("16seqs-8192+16"): (1.1, peer_fa3.FP8_POOL),
    _WORK_128.format("16seqs-8192+128"): (1.1, peer_fa3.BF16_POOL),
    _WORK_128.format("16seqs-8192+512"): (1.1, peer_fa3.BF16_POOL),
}
"""By case: our largest time, relative to the time of the named row."""
LEAST_OF_LIMIT: Mapping[str, float] = {_WORK_64.format("1seqs-131072+1"): 0.7}
"""By case: our least share of the bandwidth of reading the cache once."""


def summary(rows: Sequence[Row]) -> str:
    """Times and targets of each case, and the reasons of peers that were not timed; empty without rows of ours."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.implementation] = row
    by_case = {case: by_name for case, by_name in by_case.items() if OURS in by_name}
    if not by_case:
        return ""
    peers = [name for name in PEERS if any(_timed(by_name, name) for by_name in by_case.values())]
    cells = [
        (case, _time(by_name[OURS]), *(_against(by_name, name) for name in peers), *_target(case, by_name))
        for case, by_name in by_case.items()
    ]
    headers = ("µs (ours over the peer's)", "ours", *peers, "to reach", "")
    worst = max(by_name[OURS].error for by_name in by_case.values())
    accuracy = f"Largest error of ours: {worst:.1e} (≤ {MOST_ERROR:.1e}): {_verdict(worst <= MOST_ERROR)}"
    return "\n".join([text_table(cells, headers, "lr" + "r" * len(peers) + "ll"), accuracy, *_reasons(by_case)])


def _timed(by_name: Mapping[str, Row], name: str) -> Row | None:
    row = by_name.get(name)
    return row if row is not None and not row.reason and row.p50_us else None


def _time(row: Row) -> str:
    return f"{row.p50_us:,.1f}"


def _against(by_name: Mapping[str, Row], name: str) -> str:
    row = _timed(by_name, name)
    return "–" if row is None else f"{_time(row)} ({by_name[OURS].p50_us / row.p50_us:.2f})"


def _target(case: str, by_name: Mapping[str, Row]) -> tuple[str, str]:
    """What is to reach, and the measurement with its verdict."""
    if case in LEAST_OF_LIMIT:
        least, row = LEAST_OF_LIMIT[case], _timed(by_name, LIMIT)
        share = None if row is None else row.p50_us / by_name[OURS].p50_us
        measured = "not measured" if share is None else f"{share:.2f}: {_verdict(share >= least)}"
        return f"≥ {least:.2f} of the {LIMIT}", measured
    if case in TARGETS:
        (most, name), ours = TARGETS[case], by_name[OURS].p50_us
        row = _timed(by_name, name)
        measured = "not measured" if row is None else f"{ours / row.p50_us:.2f}: {_verdict(ours <= most * row.p50_us)}"
        return f"≤ {most:.2f} × {name}", measured
    return "", ""


def _verdict(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def _reasons(by_case: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """A line for each peer and reason, with the cases unless it holds for all of them."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case, by_name in by_case.items():
        for name, row in by_name.items():
            if row.reason:
                cases.setdefault((name, row.reason), []).append(case)
    lines = []
    for (name, reason), left_out in cases.items():
        where = "" if len(left_out) == len(by_case) else f" on {', '.join(left_out)}"
        lines.append(f"{name}: not timed{where}: {reason}")
    return lines
