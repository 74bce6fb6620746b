"""The README's example gives the README's output, and its figures are the committed rows'."""

import contextlib
import io
import re
from pathlib import Path

from kvgather.bench import call_tables, report

ROOT = Path(__file__).parents[1]
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
    rows = {
        row.case: row
        for row in report.read(ROOT / "benchmarks" / "results" / "gather_h100.csv")
        if row.implementation == "kvgather"
    }
    told = re.findall(r"\| (\d+), (\w+), ([\w-]+) \| ([\d.]+) µs \| ([\d.]+) \| ([\d.]+) × \|", README)
    assert len(told) == 5
    for dim, layout, kind, time, share, faster in told:
        row = rows[f"{layout}-8x{dim}-page16-e4m3fn>bfloat16-{kind}-16seqs131080"]
        assert time == f"{row.p50_us:.1f}"
        assert share == f"{row.share_of_cast:.3f}"
        assert faster == f"{row.against_token:.1f}"
        assert row.device in README and row.date in README


def test_the_prefix_paths_figures_are_the_measured_ones() -> None:
    rows = report.read(ROOT / "benchmarks" / "results" / "prefix_h100.csv")
    times = {(row.case, row.implementation): row.p50_us for row in rows}
    told = re.findall(r"\| (\d+) \| ([\d,]+) µs \| ([\d,]+) µs \| (\w+) \| ([\d,]+) µs \|", README)
    assert len(told) == 4
    for new, direct, gather, path, token in told:
        case = f"reach-64q8x64-NHD-per-tensor-16seqs-8192+{new}"
        by_path = {name: times[case, name] for name in ("direct", "gather")}
        assert direct == f"{by_path['direct']:,.0f}" and gather == f"{by_path['gather']:,.0f}"
        assert token == f"{times[case, 'token per program, dense']:,.0f}"
        assert path == min(by_path, key=lambda name: by_path[name])
        assert abs(times[case, "auto"] / by_path[path] - 1) < 0.02
    assert rows[0].device in README and rows[0].date in README


def test_the_engines_calls_figures_are_the_measured_ones() -> None:
    block = README.split(f"{call_tables.BEGIN}\n")[1].split(call_tables.END)[0]
    assert block == call_tables.readme_block(ROOT / "benchmarks" / "results")  # python -m kvgather.bench.call_tables


def test_every_file_it_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
