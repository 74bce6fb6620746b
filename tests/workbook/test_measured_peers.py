"""Recorded rows of others are read as they are, a missing row is a gap, and least times are those counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvgather.bench import report
from kvgather.bench.peer_fa3 import BF16_POOL, FP8_POOL
from kvgather.bench.peer_flashinfer import NAME as FLASHINFER
from kvgather.bench.peer_targets import LIMIT, OURS
from kvgather.bench.peers import cases
from kvgather.bench.report import Row
from kvgather.bench.results import find_results
from kvgather.cases.prefix import PrefixCase
from kvgather.workbook.measured_paths import rule_takes
from kvgather.workbook.measured_peers import (
    FILE,
    FORMS,
    PRODUCT_SPEED,
    READ_SPEED,
    hopper_attends,
    least_time,
    measured_peers,
    peers_by_layer,
    sources_of,
)

CASES = cases(torch.device("cuda"))
ROW = Row(
    "peers", CASES[0].name, OURS, 90.0, 100.0, 110.0, 9, 1, 1.0, 0.0, 0.0, 0.0, "GPU", "1", "t2", "t3", "c", "d",
    error=2e-3,
)  # fmt: skip


def row(name: str, us: float, case: PrefixCase = CASES[0], **changes: object) -> Row:
    return replace(ROW, implementation=name, p50_us=us, case=case.name, **changes)  # type: ignore[arg-type]


def write(folder: Path, *rows: Row) -> Path:
    path = folder / FILE
    report.write(rows, path)
    return path


def test_the_committed_file_has_both_layers_with_all_implementations() -> None:
    layers = peers_by_layer(measured_peers())
    assert list(layers) == ["64 query, 8 KV heads of 64", "32 query, 8 KV heads of 128"]
    for points in layers.values():
        assert list(points) == [1, 16, 128, 512]
        assert all({*FORMS} <= {*at.times} | {*at.reasons} for at in points.values())
        assert all({*at.errors} == {*FORMS} - {*at.reasons} for at in points.values())
        assert all(0 < error < 0.05 for at in points.values() for error in at.errors.values())


def test_times_are_those_of_the_file() -> None:
    rows = report.read(find_results() / FILE)
    for at in measured_peers():
        expected = {row.implementation: row.p50_us for row in rows if row.case == at.case.name and row.p50_us}
        assert at.times == expected and len(expected) >= 4


def test_a_missing_file_has_no_batches(tmp_path: Path) -> None:
    assert measured_peers(tmp_path / FILE) == ()
    assert peers_by_layer(()) == {}
    assert sources_of(()) == [
        f"No rows: {FILE} has none of these batches. `kvgather bench prefix --peers --csv` records them."
    ]


def test_a_peer_that_was_not_timed_has_a_reason(tmp_path: Path) -> None:
    path = write(
        tmp_path, row(OURS, 100.0), row(BF16_POOL, 150.0, peer_version="fa 3", error=3e-3), row(LIMIT, 50.0, error=0.0),
        row(FLASHINFER, 0.0, reason="not installed", error=0.0),
    )  # fmt: skip
    (at,) = measured_peers(path)
    assert at.times == {OURS: 100.0, BF16_POOL: 150.0, LIMIT: 50.0} and at.errors == {OURS: 2e-3, BF16_POOL: 3e-3}
    assert at.new == 1 and at.machine == "GPU, d, torch t2, triton t3"
    assert at.ratio(BF16_POOL) == 1.5 and at.ratio(FLASHINFER) is None
    assert at.share(FLASHINFER) is None
    assert at.share(LIMIT) == pytest.approx(CASES[0].cached_bytes / READ_SPEED / 50)
    assert sources_of([at]) == [
        "GPU, d, torch t2, triton t3", "FA3 BF16: fa 3", "FA3 FP8 was not timed: there are no rows",
        "FlashInfer was not timed: not installed",
    ]  # fmt: skip


def test_sources_name_every_machine_once(tmp_path: Path) -> None:
    other = replace(row(OURS, 90.0, CASES[1]), date="e")
    path = write(
        tmp_path,
        row(OURS, 100.0),
        row(FP8_POOL, 90.0, peer_version="fa 3"),
        row(BF16_POOL, 99.0, peer_version="fa 3"),
        other,
    )
    assert sources_of(measured_peers(path))[:3] == [
        "GPU, d, torch t2, triton t3", "GPU, e, torch t2, triton t3", "FA3 FP8 and FA3 BF16: fa 3",
    ]  # fmt: skip


def test_batches_without_ours_and_unknown_cases_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, row(BF16_POOL, 150.0), replace(row(OURS, 1.0), case="peers-of-another-benchmark"))
    (at,) = measured_peers(path)
    assert at.ratio(BF16_POOL) is None
    assert peers_by_layer([at]) == {}


def test_a_row_of_another_day_says_so(tmp_path: Path) -> None:
    rows = (
        row(OURS, 100.0),
        row(BF16_POOL, 150.0, peer_version="fa 3"),
        row(FLASHINFER, 9.0, peer_version="1", date="e"),
    )
    (at,) = measured_peers(write(tmp_path, *rows))
    assert at.sources == {BF16_POOL: "fa 3", FLASHINFER: "1, e"}


def test_the_hopper_kernel_attends_where_its_own_row_is_that_of_auto() -> None:
    """Where auto took the direct path: the row of the kernel that hopper_attends names is the nearer one."""
    names = {False: "direct kernel", True: "Hopper kernel"}
    seen = set()
    for at in measured_peers():
        kernels = {hopper: at.times[name] for hopper, name in names.items()}
        apart = max(kernels.values()) / min(kernels.values())
        if apart > 1.1 and rule_takes(at.case, hopper_attends(at.case)) == "direct":
            nearer = min(kernels, key=lambda hopper: abs(at.times[OURS] - kernels[hopper]))
            assert hopper_attends(at.case) is nearer, at.case.name
            seen.add(nearer)
    assert seen == {False, True}


def test_layers_are_sorted_by_head_dim_and_new_tokens(tmp_path: Path) -> None:
    chosen = [case for case in reversed(CASES) if case.cached == (8192,) * 16]
    layers = peers_by_layer(measured_peers(write(tmp_path, *(row(OURS, 100.0, case) for case in chosen))))
    assert [(title, list(points)) for title, points in layers.items()] == [
        ("64 query, 8 KV heads of 64", [1, 16, 128, 512]), ("32 query, 8 KV heads of 128", [1, 16, 128, 512]),
    ]  # fmt: skip


def test_least_times_counted_by_hand() -> None:
    """Two sequences, 3 new after 5 cached tokens, 4 query heads over 2 KV heads of 8."""
    case = PrefixCase("peers", new=(3, 3), cached=(5, 5), q_heads=4, kv_heads=2, head_dim=8)
    least = least_time(case)
    pairs = 2 * (6 + 7 + 8) * 4  # sequences, keys that the three tokens see, query heads
    assert least.product_us == pytest.approx(pairs * (2 * 8 + 2 * 8) / PRODUCT_SPEED)
    assert least.read_us == pytest.approx(2 * 8 * 2 * (8 + 8) / READ_SPEED)
    assert least.limit == "bytes" and least.us == least.read_us
    assert least_time(case, FORMS[BF16_POOL]).read_us == 2 * least.read_us
    assert least_time(case, FORMS[FP8_POOL]).product_us == least.product_us / 2


def test_products_limit_a_long_prefill() -> None:
    least = least_time(next(case for case in CASES if case.new == (512,) * 16))
    assert least.limit == "products" and least.us == least.product_us > least.read_us
