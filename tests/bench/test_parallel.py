"""`kvgather bench parallel` on two ranks of a CPU, started by torchrun as on GPUs; refused data, arguments, targets."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from kvgather import cli
from kvgather.bench import parallel
from kvgather.bench.ranks import group, rows, targets
from kvgather.bench.ranks.rows import Row
from kvgather.cases.context import ContextCase
from kvgather.lab.child import environment
from tests.parallel.gloo import ROOT, Rank, run_ranks

WHATS = [
    "one GPU", "ideal", "context parallel", "local attention", "all-gather", "merge", "sum of parts",
]  # fmt: skip
ROW = Row(
    case="a", what="context parallel", ranks=2, context=1_048_576, new=1, path="direct", graph_us=240.0,
    graph_p20_us=239.0, graph_p80_us=241.5, eager_us=300.0, eager_p20_us=299.0, eager_p80_us=301.0, samples=9,
    above_ideal_graph_us=39.0, above_ideal_eager_us=41.0, efficiency_graph=0.91, efficiency_eager=0.8,
    bytes_received=8448, bytes_least=8320, link="NV18", no_graph="", device="NVIDIA H100 80GB HBM3", driver="580",
    torch="2.11.0", triton="3.6.0", nccl="2.28.9", commit="abc", date="2026-11-27",
)  # fmt: skip


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on a CPU, in a folder."""
    env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kvgather", "bench", "parallel", "--device", "cpu", "--seconds", "0.01", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    """What rank 0 printed, and the rows in the file with the default name."""
    folder = tmp_path_factory.mktemp("ran")
    done = torchrun(folder, "--contexts", "70,700", "--new", "1,20", "--commit", "fed4321", "--csv")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = folder.glob("benchmarks/results/*")
    assert file.name == "parallel_cpu_x2.csv"
    return done.stdout, rows.read(file)


def test_every_case_has_all_rows(ran: tuple[str, list[Row]]) -> None:
    cases = parallel.cases([70, 700], [1, 20])
    assert [(row.case, row.what) for row in ran[1]] == [(case.name, what) for case in cases for what in WHATS]
    for row in ran[1]:
        assert row.ranks == 2 and row.link == "gloo" and row.commit == "fed4321" and row.device and row.torch
        assert row.case == ContextCase(row.context, row.new).name
        assert row.eager_us is not None and row.eager_us > 0
        assert row.graph_us is row.graph_p20_us is row.efficiency_graph is None
        if row.samples:
            assert row.eager_p20_us is not None and row.eager_p80_us is not None
            assert row.eager_p20_us <= row.eager_us <= row.eager_p80_us
            assert row.no_graph == "a CPU has no CUDA graphs"
        assert row.path == ("gather" if row.what in ("one GPU", "context parallel", "local attention") else "")


def test_rows_of_a_case_belong_together(ran: tuple[str, list[Row]]) -> None:
    for at in range(0, len(ran[1]), len(WHATS)):
        by_what = {row.what: row for row in ran[1][at : at + len(WHATS)]}
        time = {what: row.eager_us or 0.0 for what, row in by_what.items()}
        assert time["ideal"] == pytest.approx(time["one GPU"] / 2, abs=0.02)
        assert time["sum of parts"] == pytest.approx(sum(time[what] for what in WHATS[3:6]), abs=0.05)
        call = by_what["context parallel"]
        assert call.above_ideal_eager_us == pytest.approx(time[call.what] - time["ideal"], abs=0.02)
        assert call.efficiency_eager == pytest.approx(time["ideal"] / time[call.what], abs=1e-3)
        assert call.bytes_received == call.new * 64 * (64 * 2 + 4)  # one other rank's output in BF16, and log-sum-exp
        assert call.bytes_least == call.new * 64 * (64 * 2 + 4 + 64 * 2) // 2
        assert all(row.bytes_received is None for row in by_what.values() if row is not call)


def test_rank_0_alone_prints(ran: tuple[str, list[Row]]) -> None:
    for case in parallel.cases([70, 700], [1, 20]):
        assert ran[0].count(f"\n{case.name}\n") == 1
    assert ran[0].count("efficiency ≥ 0.95") == 1 and ran[0].count("not measured") == 6
    assert "28 rows in benchmarks/results/parallel_cpu_x2.csv" in ran[0]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    ranks = run_ranks("tests.bench._parallel_child", 2, tmp_path_factory.mktemp("ranks"), 60)
    assert [rank.code for rank in ranks] == [0, 0], "\n".join(rank.text[-2000:] for rank in ranks)
    return ranks


@pytest.mark.parametrize("change", ["wrong_page", "nan_page", "wrong_lse"])
def test_wrong_data_is_refused_on_all_ranks(ended: list[Rank], change: str) -> None:
    for rank in ended:
        assert rank.said[change].startswith(
            "ArithmeticError: context parallel is not one GPU's output on 64q8x64-NHD-per-tensor-1seqs-100+2: error "
        )
    assert "error inf" in ended[0].said["nan_page"] and "error inf" not in ended[0].said["wrong_page"]
    output_error, lse_error = map(float, re.findall(r"(?:error|exp) ([\d.e-]+),", ended[0].said["wrong_lse"]))
    assert output_error < parallel.TOLERANCE and lse_error > parallel.LSE_TOLERANCE


def test_right_data_is_timed(ended: list[Rank]) -> None:
    assert [rank.said["nothing wrong"] for rank in ended] == ["AssertionError: timed"] * 2


def test_ranks_have_the_pages_of_the_whole(ended: list[Rank]) -> None:
    assert [rank.said["same pages"] for rank in ended] == [True, True]


def test_ways_take_turns_and_the_slowest_rank_counts(ended: list[Rank]) -> None:
    for rank, done in enumerate(ended):
        said = done.said["turns"]
        assert said["alone"] == pytest.approx(20_000) and said["all"] == pytest.approx(2000)
        assert said["graphs"] == [None, None]
        loop = ["all 0", "all 1"] * 2  # 8 ms on the slower rank; once more would exceed 10
        once = (["alone"] if rank == 0 else []) + loop
        assert said["samples"] == [4, 4] and said["ran"][-4 * len(once) :] == 4 * once  # 28 ms a round


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel"], "this process is no rank of a group; accepted: python3 -m torch.distributed.run --standalone"),
        (["parallel", "--contexts", "1e6"], "--contexts is '1e6'; accepted: numbers from 1 to 1,073,741,824, such as"),
        (["parallel", "--contexts", "5,0"], "--contexts is '5,0'; accepted: numbers from 1"),
        (["parallel", "--contexts", "2000000000"], "--contexts is '2000000000'; accepted: numbers from 1"),
        (["parallel", "--new", "1,,2"], "--new is '1,,2'; accepted: numbers from 1 to 1,073,741,824, such as 1,16,512"),
        (["gather", "--new", "1"], "--contexts or --new with gather; accepted: kvgather bench parallel"),
        (["parallel", "--peers"], "--peers with parallel; accepted: kvgather bench prefix --peers"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in group.SET_BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["bench", *arguments]) == cli.USAGE
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"kvgather: {message}") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (1, "cpu", "the group has 1 rank; accepted: 2 or more, python3 -m"),
        (2, "cuda", "2 ranks run here, and torch sees 0 GPUs; accepted: one GPU for each, or --device cpu"),
    ],
)
def test_wrong_groups(ranks: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in group.SET_BY_TORCHRUN:
        monkeypatch.setenv(name, str(ranks))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(group, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match=message), group.joined(device):
        pass


def test_a_case_of_no_name() -> None:
    with pytest.raises(
        ValueError, match="--case is 'x9'; accepted: part of one of 64q8x64-NHD-per-tensor-1seqs-262144"
    ):
        parallel.run(torch.device("cpu"), only="x9")


TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-31\t0
GPU1\tNV18\t X \tSYS\tNODE\t0-31\t0
GPU2\tNV18\tSYS\t X \tSYS\t0-31\t0
NIC0\tPIX\tNODE\tSYS\t X \t\t

Legend:
  X    = Self
"""


def test_links_in_the_topology() -> None:
    assert group.links_in(TOPOLOGY, [0, 1]) == ["NV18"]
    assert group.links_in(TOPOLOGY, [1, 2]) == ["SYS"]
    assert group.links_in(TOPOLOGY, [0, 1, 2]) == ["NV18", "SYS"]
    assert group.links_in(TOPOLOGY, [0, 3]) == group.links_in("", [0, 1]) == []


def test_rows_survive_a_file_and_replace_their_case(tmp_path: Path) -> None:
    path = tmp_path / "results" / "parallel.csv"
    empty = replace(ROW, what="ideal", graph_us=None, bytes_received=None, samples=0)
    rows.write([ROW, empty, replace(ROW, case="other"), replace(ROW, ranks=4)], path)
    assert rows.read(path) == [ROW, empty, replace(ROW, case="other"), replace(ROW, ranks=4)]
    rows.write([replace(ROW, eager_us=1.0)], path)
    assert rows.read(path) == [replace(ROW, case="other"), replace(ROW, ranks=4), replace(ROW, eager_us=1.0)]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"parallel.csv has columns \['a', 'b'\]; accepted: \['case', 'what'"):
        rows.read(path)


def test_a_table_says_why_there_is_no_graph() -> None:
    text = rows.table([ROW, replace(ROW, what="merge", efficiency_eager=None, no_graph="merge, rank 1: captured")])
    assert "39.0 µs / 41.0 µs" in text and "0.910 / 0.800" in text and "8,448 (least 8,320)" in text
    assert text.endswith("no CUDA graph: merge, rank 1: captured")


def test_the_summary_compares_with_the_targets() -> None:
    longest = replace(ROW, context=4_194_304)
    lines = targets.summary([ROW, longest, replace(ROW, new=512, efficiency_graph=0.96)]).splitlines()
    assert lines[1].split("ideal")[1].split() == "39.0 µs reached 41.0 µs NOT reached".split()
    assert lines[2].split("0.90")[1].split() == "0.910 reached 0.800 NOT reached".split()
    assert lines[3].split("0.95")[1].split() == "0.960 reached 0.800 NOT reached".split()
    assert "efficiency ≥ 0.85" in targets.summary([replace(longest, ranks=4)])
    assert len(targets.summary([replace(longest, ranks=8)]).splitlines()) == 3  # no target for 8 at the longest


def test_every_field_of_a_row_is_documented() -> None:
    assert Row.__doc__ is not None
    for field in fields(Row):
        assert field.name in Row.__doc__


def test_committed_rows_have_a_device_a_link_and_a_date() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("parallel_*.csv"):
        for row in rows.read(path):
            assert row.device and row.link and row.torch and row.nccl and len(row.date) == 10, (path.name, row)
            assert path.stem.endswith(f"_x{row.ranks}")


@pytest.mark.gpu
def test_a_gpu_times_a_collective_in_a_graph(tmp_path: Path) -> None:
    (done,) = run_ranks("tests.bench._parallel_gpu_child", 1, tmp_path, 120, RANKS_ON="cuda")
    assert done.code == 0, done.text[-3000:]
    assert done.said["reasons"] == ["", ""]
    assert all(0 < graph <= 1.5 * eager for graph, eager in done.said["times"])
