"""The README's example gives the README's output, and its figures are the committed rows'."""

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvgather.bench import call_tables, report
from kvgather.bench.ranks.rows import read as read_ranks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_the_examples_print_what_they_say() -> None:
    examples = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    assert len(examples[0][0].splitlines()) == 10
    names: dict[str, object] = {}  # the second goes on from the first
    for code, output in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == output


def test_the_figures_are_the_measured_ones() -> None:
    rows = {row.case: row for row in report.read(RESULTS / "gather_h100.csv") if row.implementation == "kvgather"}
    told = re.findall(r"\| (\d+), (\w+), ([\w-]+) \| ([\d.]+) µs \| ([\d.]+) \| ([\d.]+) × \|", README)
    assert len(told) == 5
    for dim, layout, kind, time, share, faster in told:
        row = rows[f"{layout}-8x{dim}-page16-e4m3fn>bfloat16-{kind}-16seqs131080"]
        assert time == f"{row.p50_us:.1f}"
        assert share == f"{row.share_of_cast:.3f}"
        assert faster == f"{row.against_token:.1f}"
        assert row.device in README and row.date in README


def test_the_figures_of_several_gpus_are_the_measured_ones() -> None:
    measured = {
        ranks: {(row.context, row.new, row.what): row for row in read_ranks(RESULTS / f"parallel_h200_x{ranks}.csv")}
        for ranks in (2, 4)
    }
    time = r"([\d.,]+) (µs|ms)"
    cell = rf"{time} \((\d+) %(?: of the ideal)?\) \|"
    told = re.findall(rf"\| (\d+), ([\d,]+) \| {time} \| {cell} {time} \| {cell}", README)
    assert len(told) == 3
    for new, context, *figures in told:
        key = int(context.replace(",", "")), int(new)
        expected: list[str] = []
        for ranks, units in ((2, figures[1:4:2]), (4, figures[6:9:2])):
            alone, row = (measured[ranks][*key, what] for what in ("one GPU", "context parallel"))
            assert row.efficiency_graph is not None
            expected += _as_told(alone.graph_us, units[0])
            expected += [*_as_told(row.graph_us, units[1]), f"{100 * row.efficiency_graph:.0f}"]
        assert figures == expected, (new, context)


def test_the_figures_of_the_replay_on_ranks_are_the_measured_ones() -> None:
    rows = {row["ranks"]: row for row in csv.DictReader((RESULTS / "serving_h200.csv").read_text().splitlines())}
    ranks = [rows[count] for count in ("1", "2", "4")]
    speeds = [f"{float(row['decode_per_s']):,.0f}" for row in ranks]
    sizes = [f"{int(row['peak_memory']) / 2**30:.0f}" for row in ranks]
    assert f"decode {speeds[0]}, {speeds[1]} and {speeds[2]} tokens per second on 1, 2 and 4 H200s" in README
    assert f"take {sizes[0]}, {sizes[1]} and {sizes[2]} GiB of each" in README


def _as_told(microseconds: float | None, unit: str) -> tuple[str, str]:
    assert microseconds is not None
    return f"{microseconds:,.0f}" if unit == "µs" else f"{microseconds / 1000:.1f}", unit


def test_the_prefix_paths_figures_are_the_measured_ones() -> None:
    rows = report.read(RESULTS / "prefix_h100.csv")
    times = {(row.case, row.implementation): row.p50_us for row in rows}
    paths = ("direct", "gather", "hybrid")
    columns = r"([\d,]+) µs \| " * len(paths)
    told = re.findall(rf"\| (\d+) \| {columns}(\w+) \| ([\d,]+) µs \|", README)
    assert len(told) == 4
    for new, *figures, path, token in told:
        case = f"reach-64q8x64-NHD-per-tensor-16seqs-8192+{new}"
        by_path = {name: times[case, name] for name in paths}
        assert figures == [f"{time:,.0f}" for time in by_path.values()]
        assert token == f"{times[case, 'token per program, dense']:,.0f}"
        assert path == min(by_path, key=lambda name: by_path[name])
        assert abs(times[case, "auto"] / by_path[path] - 1) < 0.02
    assert rows[0].device in README and rows[0].date in README


def test_the_engines_calls_figures_are_the_measured_ones() -> None:
    block = README.split(f"{call_tables.BEGIN}\n")[1].split(call_tables.END)[0]
    assert block == call_tables.readme_block(ROOT / "benchmarks" / "results")  # python -m kvgather.bench.call_tables


def record(name: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / name
    if not file.exists():
        assert name not in README
        pytest.skip(f"{name} is not committed")
    return json.loads(file.read_text())


def test_the_gpu_suites_figures_are_the_records() -> None:
    found = record("gpu_suite.json")
    told = re.search(
        r"need a GPU, on (one|\d+ ×) (.+?), (\S+), torch (\S+), triton (\S+): (\d+) passed, (\d+) failed, "
        r"(\d+) errors, (\d+) skipped, in (\d+) s \(\[gpu_suite\.json\]\(benchmarks/results/gpu_suite\.json\), "
        r"`make test-gpu`\)",
        README,
    )  # fmt: skip
    assert told, "tools/gpu_record.py writes the sentence"
    names = ("device", "date", "torch", "triton", "passed", "failed", "errors", "skipped")
    number = "one" if found["gpus"] == 1 else f"{found['gpus']} ×"
    assert told.groups() == (number, *(str(found[name]) for name in names), f"{found['seconds']:.0f}")
    assert found["passed"] > 0 and found["failed"] == found["errors"] == 0
    assert found["seconds"] <= 600 and sum(found["skips"].values()) == found["skipped"]
    assert found["driver"] and found["commit"]


def test_memchecks_figures_are_the_records() -> None:
    found = record("memcheck.json")
    told = re.search(
        r"one launch of each of (\d+) kernel variants, on one (.+?), (\S+), torch (\S+), triton (\S+): (\d+) errors, "
        r"in (\d+) s \(\[memcheck\.json\]\(benchmarks/results/memcheck\.json\), `make memcheck`\)", README,
    )  # fmt: skip
    assert told, "tools/gpu_record.py writes the sentence"
    names = ("variants", "device", "date", "torch", "triton", "errors")
    assert told.groups() == (*(str(found[name]) for name in names), f"{found['seconds']:.0f}")
    assert found["variants"] > 500 and found["errors"] == found["wrong"] == 0 and found["found"] == {}
    assert found["tool"].startswith("compute-sanitizer ") and found["driver"] and found["commit"]


def test_the_sentences_about_the_records(tmp_path: Path) -> None:
    import gpu_record

    where = {"device": "NVIDIA H100", "date": "2026-01-02", "torch": "2.11.0", "triton": "3.6.0"}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{gpu_record.BEGIN}old\n{gpu_record.END}\nafter\n")
    gpu_record.main(readme, tmp_path)
    assert readme.read_text() == f"before\n\n{gpu_record.BEGIN}{gpu_record.END}\nafter\n"
    suite = where | {"gpus": 1, "passed": 900, "failed": 0, "errors": 0, "skipped": 3, "seconds": 412.4}
    (tmp_path / "gpu_suite.json").write_text(json.dumps(suite))
    (tmp_path / "memcheck.json").write_text(json.dumps(where | {"variants": 580, "errors": 0, "seconds": 100.0}))
    gpu_record.main(readme, tmp_path)
    text = readme.read_text()
    on = "on one NVIDIA H100, 2026-01-02, torch 2.11.0, triton 3.6.0: "
    assert f"{on}900 passed, 0 failed, 0 errors, 3 skipped, in 412 s ([gpu_suite.json]" in text
    assert f"each of 580 kernel variants, {on}0 errors, in 100 s ([memcheck.json]" in text
    gpu_record.main(readme, tmp_path)
    assert readme.read_text() == text
    (tmp_path / "gpu_suite.json").write_text(json.dumps(suite | {"gpus": 2}))
    gpu_record.main(readme, tmp_path)
    assert "a GPU, on 2 × NVIDIA H100, 2026-01-02, torch 2.11.0" in readme.read_text()


def test_every_file_it_links_to_exists() -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", README, flags=re.DOTALL)  # a launch, kernel[grid](x), looks like a link
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / target).exists(), target
