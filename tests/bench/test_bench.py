"""The gather benchmark: implementations are compared with the reference, and rows survive the CSV file."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kvgather.bench import gather, report, tables
from kvgather.bench.implementations import plan_build
from kvgather.bench.machine import COMMIT
from kvgather.bench.report import Row
from kvgather.cases import Case, build, measured
from kvgather.plan import GatherPlan
from tests.gather.oracle import assert_same
from tests.where import on_each_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case(num_heads=2, k_dim=16, v_dim=16, lengths=(19, 3), starts=())
ROW = Row(
    "gather", "a case", "kvgather", 146.0, 147.25, 150.0, 400, 402677760, 2734.7, 0.951, 0.0, 5.2, "NVIDIA H100", "580",
    "2.11.0", "3.6.0", "abc", "2026-11-22",
)  # fmt: skip


def outputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return gather.empty_rows(case, CPU)


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_a_cpu_compares_and_times_every_implementation_for_cpus(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setenv(COMMIT, "given")
    case = replace(CASE, layout=layout, k_kind="per-token-head")
    rows = gather.measure(case, CPU, seconds=0.001)
    assert [row.implementation for row in rows] == [
        "kvgather", "torch index", "python loop", "contiguous cast", "contiguous copy"
    ]  # fmt: skip
    for row in rows:
        assert (row.benchmark, row.case) == ("gather", case.name)
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us and row.samples >= 5
        assert row.gb_per_s == pytest.approx(row.bytes / row.p50_us / 1e3, rel=0.02, abs=0.06)
        assert row.device and row.torch == torch.__version__ and row.commit and len(row.date) == 10
    assert rows[0].bytes == 22 * 2 * 32 * 3 + 22 * 2 * 4
    assert [row.share_of_cast for row in rows if row.implementation == "contiguous cast"] == [1]


@pytest.mark.triton
def test_overheads_have_rows_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvgather.bench.launches import empty_launch

    monkeypatch.setattr(gather, "_overheads", lambda *_: {"empty launch": empty_launch, "plan build": plan_build})
    rows = {row.implementation: row for row in gather.measure(CASE, CPU, seconds=0.001)}
    for name in ("empty launch", "plan build"):
        row = rows[name]
        assert (row.bytes, row.gb_per_s, row.share_of_cast) == (0, 0, 0) and row.p50_us > 0


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "torch_index", lambda built, out: lambda: out[0].zero_() + out[1].zero_())
    with pytest.raises(ArithmeticError, match=rf"torch index is not the reference on {CASE.name}"):
        gather.measure(CASE, CPU, seconds=0.001)


def test_short_gathers_are_timed_alone_and_long_ones_with_their_plan() -> None:
    cases = gather.cases(CUDA)
    alone = [case for case in cases if gather.is_timed_alone(case, CUDA)]
    assert {sum(case.lengths) for case in alone} == {1500}
    for case in alone:
        assert list(gather._overheads(case, CUDA)) == ["empty launch"]
        assert not gather._overheads(case, CPU)
    planned = [case for case in cases if "plan build" in gather._overheads(case, CUDA)]
    assert {case.layout for case in planned} == {"NHD", "HND", "SHUFFLE"}


def test_the_timed_plan_is_the_cases_plan() -> None:
    built = build(CASE)
    plan = plan_build(built, outputs(CASE))()
    assert isinstance(plan, GatherPlan)
    assert torch.equal(plan.records, built.plan.records) and plan.total_tokens == built.plan.total_tokens


@pytest.mark.triton
def test_the_empty_launch_has_as_many_programs_as_the_gather() -> None:
    from kvgather.bench.launches import empty_launch

    built = build(replace(CASE, num_heads=16, k_dim=64, v_dim=64, page_size=32))
    launch = empty_launch(built, outputs(built.case))
    assert isinstance(launch, partial)
    assert launch.args[1] == (len(built.plan.records) * 2 * 2,)  # pages × slots of 16 × columns of 512
    assert launch.keywords == {"num_warps": 16}
    out = outputs(CASE)
    out[0].fill_(3)
    empty_launch(build(CASE), out)()
    assert (out[0] == 3).all()


@pytest.mark.triton
@on_each_device
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
@pytest.mark.parametrize("which", ["trusting", "software_decode"])
def test_the_variants_of_the_launch_gather_the_same_rows(which: str, layout: str, where: str) -> None:
    from kvgather.bench import launches

    for case in (
        replace(CASE, layout=layout, k_kind="per-token-head", lengths=(37, 0, 3)),
        replace(CASE, layout=layout, v_kind="per-head", page_size=32, num_heads=3, k_dim=48, v_dim=32),
        replace(CASE, layout=layout, dtype=torch.bfloat16, k_kind="none", v_kind="none"),
    ):
        built = build(case, where)
        expected = built.cache.gather(built.plan, backend="triton")
        out = torch.full_like(expected[0], -7), torch.full_like(expected[1], -7)
        getattr(launches, which)(built, out)()
        assert_same(out, expected)


def test_rows_survive_a_file_and_replace_their_case(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gather.csv"
    report.write([ROW, replace(ROW, implementation="x"), replace(ROW, case="other")], path)
    report.write([replace(ROW, p50_us=1.5), replace(ROW, device="another")], path)  # the first replaces rows
    assert report.read(path) == [replace(ROW, case="other"), replace(ROW, p50_us=1.5), replace(ROW, device="another")]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"gather.csv has columns \['a', 'b'\]; accepted: \['benchmark'"):
        report.read(path)


OWN_COLUMNS = ("tiles_", "crash_map_", "serving_", "parallel_", "hopper_bounds_")
"""Files whose rows are other ones, with tests of their own."""


def test_committed_rows_have_a_device_and_a_date() -> None:
    for path in (Path(__file__).parents[2] / "benchmarks" / "results").glob("*.csv"):
        if path.name.startswith(OWN_COLUMNS):
            continue
        for row in report.read(path):
            assert row.device and row.torch and len(row.date) == 10, (path.name, row)
            assert row.p20_us <= row.p50_us <= row.p80_us, (path.name, row)


def test_a_table_has_a_part_for_each_case() -> None:
    text = report.table([ROW, replace(ROW, implementation="empty launch", p50_us=0.5, bytes=0), replace(ROW, case="b")])
    lines = text.splitlines()
    assert [lines[at] for at in (0, 1, 5, 6)] == ["", "a case", "", "b"]
    assert lines[2].split() == lines[7].split() == "median 20 % to 80 % GB/s of the cast time".split()
    assert lines[3].split() == "kvgather 147.2 µs 146.0 µs to 150.0 µs 2734.7 0.951 1.00 ×".split()
    assert lines[4].split() == "empty launch 0.5 µs 146.0 µs to 150.0 µs 0.00 ×".split()
    assert len({len(line) for line in lines[2:5]}) == (1 if tables.tabulate else 3)
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("Tesla T4", "t4"),
    ],
)
def test_slugs(device: str, slug: str) -> None:
    assert report.slug(device) == slug


def test_every_field_of_a_row_is_documented() -> None:
    assert Row.__doc__ is not None
    for field in fields(Row):
        assert field.name in Row.__doc__


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1500,), measured.LONGER], ids=["one_launch", "plan"])
def test_a_gpu_times_the_overheads(lengths: tuple[int, ...]) -> None:
    case = replace(measured.GPU_BASE, lengths=lengths)
    rows = {row.implementation: row for row in gather.measure(case, CUDA, seconds=0.02)}
    other = rows["empty launch" if lengths == (1500,) else "plan build"]
    assert other.bytes == 0 and 0 < other.p50_us < 1000
    assert rows["kvgather"].case == case.name + ("-one_launch" if lengths == (1500,) else "")
