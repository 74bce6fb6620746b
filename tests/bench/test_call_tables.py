"""The tables of the engines' call: one line for each measured case, empty without rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvgather.bench import call_tables, host, report
from kvgather.bench.report import Row
from kvgather.cases.measured import CALLS

TIMES = {
    "kvgather": 100.04,
    "cp_mha_gather_cache": 102.0,
    "upstream form": 714.0,
    "cp_mha_gather_cache, eager": 103.0,
    "upstream form, eager": 1236.0,
}
DEVICE = "NVIDIA H200"


def row(benchmark: str, case: str, implementation: str, time: float, launches: float = 0.0) -> Row:
    return Row(
        benchmark, case, implementation, time, time, time, 9, 1, 1.0, 0.5, 0.0, 1.0, DEVICE, "580", "2.11.0+cu130",
        "3.6.0", "abc", "2026-11-27", launches,
    )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two files of the gather, of which the second has the engines' call, and one of host times."""
    folder = tmp_path / "benchmarks" / "results"
    report.write([row("gather", "NHD-8x64-another", "kvgather", 1.0)], folder / "gather_cpu.csv")
    rows = [row("gather", case.name, name, time) for case in CALLS for name, time in TIMES.items()]
    report.write(rows, folder / "gather_h200.csv")
    calls = [host.YARDSTICK, *host.TARGETS]
    report.write(
        [row("host", host.CASE.name, name, 38.0 + i, 1 + i / 38) for i, name in enumerate(calls)],
        folder / "host_h200.csv",
    )
    return folder


def test_a_line_for_each_case(results: Path) -> None:
    rows = call_tables.committed(results, "gather")
    assert len(rows) == len(CALLS) * len(TIMES) and call_tables.where(rows).startswith(f"{DEVICE}, 2026-11-27, torch")
    lines = call_tables.call_lines(rows)
    assert len(lines) == len(CALLS)
    assert lines[0] == (
        "1,536", "8 × 64, NHD", "100 µs", "102 µs", "714 µs", "7.0 ×", "103 µs", "1,236 µs", "12.0 ×"
    )  # fmt: skip
    assert all(len(line) == len(call_tables.CALL_HEADERS) for line in lines)
    only_graphs = [each for each in rows if not each.implementation.endswith("eager")]
    assert call_tables.call_lines(only_graphs) == []


def test_a_line_for_each_host_time(results: Path) -> None:
    lines = call_tables.host_lines(call_tables.committed(results, "host"))
    assert lines[0] == ("raw launch, upstream form", "38.0 µs", "1.00")
    assert [line[0] for line in lines[1:]] == list(host.TARGETS)


def test_the_readmes_block_is_written_between_its_markers(results: Path) -> None:
    readme = results.parents[1] / "README.md"
    readme.write_text(f"before\n\n{call_tables.BEGIN}\nold\n{call_tables.END}\n\nafter\n")
    for _ in range(2):
        call_tables.write_readme(readme, results)
        text = readme.read_text()
        assert text == (
            f"before\n\n{call_tables.BEGIN}\n{call_tables.readme_block(results)}{call_tables.END}\n\nafter\n"
        )
    assert text.count("\n| ") == 2 + len(call_tables.IN_README) + 2 + 1 + len(host.TARGETS)
    assert "| 16,384 | 1 × 64, SHUFFLE | 100 µs | 102 µs | 714 µs | 7.0 × | 103 µs | 1,236 µs | 12.0 × |" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (readme.parent / link).exists(), link


def test_without_rows_there_is_no_table(results: Path) -> None:
    (results / "host_h200.csv").unlink()
    assert call_tables.readme_block(results) == ""
    assert call_tables.committed(results, "host") == []
    assert call_tables.call_lines([]) == call_tables.host_lines([]) == []


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match=r"README.md has no <!-- the engines' call: begin"):
        call_tables.write_readme(readme, tmp_path)
