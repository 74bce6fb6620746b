"""The host benchmark: eager calls, in raw launches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvgather import cli
from kvgather.attention.batch import PrefixBatch
from kvgather.attention.prefix import prefix_attention
from kvgather.bench import host, report, turns
from kvgather.bench.report import Row
from kvgather.cases import Case, build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Case(num_heads=1, k_dim=16, v_dim=16, lengths=(3, 2), starts=(), out_dtype=torch.float32)
ROW = Row(
    "host", "a case", "cache.gather", 36.0, 37.25, 40.0, 400, 0, 0.0, 0.0, 0.0, 0.0, "NVIDIA H100", "580", "2.11.0",
    "3.6.0", "abc", "2026-11-22", 0.98,
)  # fmt: skip


def test_the_budgets_are_those_of_the_design() -> None:
    assert (host.Q_HEADS, host.WINDOW) == (64, 128)
    assert list(host.TARGETS.values()) == [1.0, 1.2, 1.2, 1.2, 3.0, 6.0]


def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "host", "--device", "cpu"]) == cli.USAGE
    error = capsys.readouterr().err
    assert error == "kvgather: --device is cpu; accepted with host: cuda, for the yardstick is a launch on a GPU\n"


@pytest.mark.triton
def test_each_call_does_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "Q_HEADS", 2)
    built = build(TINY, values="normal")
    out = torch.empty(5, 1, 16), torch.empty(5, 1, 16)
    calls = host.prepare(built, out)
    assert list(calls) == [host.YARDSTICK, *host.TARGETS]
    host.check(calls, built, out)

    before = built.cache.gather(built.plan, out_dtype=torch.float32)
    calls["cache.write"]()
    after = built.cache.gather(built.plan, out_dtype=torch.float32)
    changed = (before[0] != after[0]).any(dim=(1, 2)) | (before[1] != after[1]).any(dim=(1, 2))
    assert changed.tolist() == [False, False, True, False, True]  # each sequence's last token

    arguments, options = calls["prefix_attention"].args, calls["prefix_attention"].keywords
    assert options == {"path": "direct"} and arguments[1] is not None  # K of the new tokens: it is written
    torch.testing.assert_close(calls["prefix_attention"](), prefix_attention(*arguments, path="gather"))

    batch = calls["PrefixBatch.build"]()
    assert isinstance(batch, PrefixBatch)
    assert (batch.seqlens_q, batch.seqlens_k, list(batch.windows)) == ((1, 1), (3, 2), [128])
    batch.check()


@pytest.mark.triton
def test_a_wrong_gather_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ours", lambda built, out: lambda: out[0].zero_())
    monkeypatch.setattr(host, "time_on_host", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ArithmeticError, match=r"cache.gather is not the reference on NHD-1x16-"):
        host.measure(TINY, CPU)


@pytest.mark.triton
def test_rows_are_in_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "Q_HEADS", 2)
    monkeypatch.setattr(turns, "HOST_BATCH", 1)
    rows = host.measure(TINY, CPU, seconds=1e-6)
    assert [row.implementation for row in rows] == [host.YARDSTICK, *host.TARGETS]
    assert rows[0].launches == 1
    for row in rows:
        assert (row.benchmark, row.case) == ("host", TINY.name)
        assert row.launches == pytest.approx(row.p50_us / rows[0].p50_us, rel=0.01, abs=0.001)


def test_the_summary_compares_with_the_budgets() -> None:
    rows = [
        replace(ROW, implementation=host.YARDSTICK, launches=1.0),
        replace(ROW, implementation="cache.gather", launches=1.0),
        replace(ROW, implementation="prefix_attention", launches=3.01),
    ]
    header, *lines = host.summary(rows).splitlines()
    assert header.split() == ["median", "launches", "to", "reach"]
    assert [line.split() for line in lines] == [
        "cache.gather 37.2 µs 1.00 ≤ 1.0 reached".split(),
        "prefix_attention 37.2 µs 3.01 ≤ 3.0 NOT reached".split(),
    ]


def test_only_files_with_host_times_have_the_column_launches(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    plain = replace(ROW, launches=0.0)
    report.write([plain], path)
    assert "launches" not in path.read_text() and report.read(path) == [plain]
    report.write([replace(ROW, case="other")], path)
    assert path.read_text().splitlines()[0].endswith(",date,launches")
    assert report.read(path) == [plain, replace(ROW, case="other")]
    assert "0.98 ×" in report.table([replace(ROW, p50_us=38.0), ROW])  # the yardstick first: the time in launches


@pytest.mark.gpu
def test_a_gpu_measures_all() -> None:
    rows = host.run(CUDA, seconds=0.02)
    assert [row.implementation for row in rows] == [host.YARDSTICK, *host.TARGETS]
    assert all(row.p50_us > 0 and row.launches > 0 for row in rows)
