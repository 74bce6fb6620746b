"""The map of block ids that fault: points of real children on a CPU, of planted children, and the committed file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvgather import cli
from kvgather.device import triton_available
from kvgather.lab.crash_map import BLOCK_IDS, Point, as_csv, bytes_behind, read_map, run_map

pytestmark = pytest.mark.triton
MACHINE = {"device": "a device", "driver": "", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def plant(monkeypatch, returncode=0, stdout="", stderr=""):
    """Replace the children; returns the list of their (command, environment)."""
    started = []

    def start(command, env, **streams):
        started.append((command, env))
        streams["stdout"].write(stdout.encode())
        streams["stderr"].write(stderr.encode())
        return SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(subprocess, "run", start)
    return started


def test_a_block_is_as_far_away_as_the_scales_of_the_blocks_before_it():
    assert bytes_behind(0) == 0
    assert bytes_behind(1) == 8 * 16 * 4
    assert bytes_behind(4096) == 2 * 2**20
    assert bytes_behind(3, heads=2, page_size=4) == 3 * 2 * 4 * 4


@pytest.mark.skipif(sys.platform == "win32" or not triton_available(), reason="needs Triton's interpreter")
def test_real_children_say_what_they_read_or_die():
    near, far = run_map("cpu", MACHINE, (0, 2**20))
    assert (near.outcome, near.bytes_behind, near.num_blocks) == ("silent corruption", 0, 2**20 + 1)
    assert near.scales_used.split()[0] == "0.5"  # the first head reads the scalar itself
    assert far.outcome in ("segfault", "silent corruption")  # 512 MiB behind a scalar on the heap
    assert far.outcome != "segfault" or far.message == "k_scale = tl.load(k_scale_ptr + scale_at)"
    assert near.device == "a device" and near.date == "2026-01-01"


def test_on_a_gpu_every_block_runs_twice(monkeypatch):
    lines = [{"place": "the pool of K"}, {"outcome": "illegal access", "raised_by": "the next call", "message": "CUDA"}]
    started = plant(monkeypatch, 1, "".join(json.dumps(line) + "\n" for line in lines))
    points = list(run_map("cuda", MACHINE))
    assert [(p.block_id, p.launch_blocking) for p in points] == [(id, on) for on in (0, 1) for id in BLOCK_IDS]
    assert {(p.outcome, p.raised_by, p.place, p.message) for p in points} == {
        ("illegal access", "the next call", "the pool of K", "CUDA")
    }
    assert sorted(env["CUDA_LAUNCH_BLOCKING"] for _, env in started) == ["0"] * 15 + ["1"] * 15
    assert all("TRITON_INTERPRET" not in env and command[-1] == "cuda" for command, env in started)


@pytest.mark.parametrize(
    ("child", "outcome", "message"),
    [
        ({"returncode": -11, "stdout": '{"place": "x"}\n'}, "segfault", ""),
        ({"returncode": -6}, "abort", ""),
        ({"returncode": 1, "stderr": "RuntimeError: CUDA out of memory"}, "failed", "RuntimeError: CUDA out of memory"),
        ({"returncode": 0, "stdout": ""}, "failed", "exit 0 with no output"),
        ({"returncode": 1, "stdout": "{not json\n", "stderr": "why"}, "failed", "why"),
    ],
)
def test_children_that_die(monkeypatch, child, outcome, message):
    plant(monkeypatch, **child)
    (point,) = run_map("cpu", MACHINE, (1,))
    assert (point.outcome, point.message) == (outcome, message)


def test_a_child_that_hangs_is_a_timeout(monkeypatch):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("child", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    (point,) = run_map("cpu", MACHINE, (1,), timeout=3)
    assert (point.outcome, point.message) == ("timeout", "no answer in 3 s")
    with pytest.raises(ValueError, match="timeout"):
        list(run_map("cpu", MACHINE, (1,), timeout=0))


def test_points_survive_a_file(monkeypatch, tmp_path):
    plant(monkeypatch, stdout='{"outcome": "ok", "scales_used": "0.5 0.5"}\n')
    points = [*run_map("cpu", MACHINE, (0, 1)), *run_map("cuda", MACHINE, (2,))]
    points.append(replace(points[0], message='commas, and "quotes"'))
    path = tmp_path / "map.csv"
    assert read_map(path) == []
    path.write_text(as_csv(points))
    assert read_map(path) == points
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"map.csv has columns \['a', 'b'\]; accepted: \['block_id'"):
        read_map(path)


@pytest.fixture
def machine(monkeypatch):
    from kvgather.bench import machine

    monkeypatch.setattr(machine, "machine", lambda device_type: MACHINE)
    monkeypatch.setattr("kvgather.device.has_gpu", lambda: False)


def test_the_command_writes_what_read_map_reads(monkeypatch, machine, tmp_path, capsys):
    plant(monkeypatch, stdout='{"outcome": "ok", "scales_used": "0.5 0.5"}\n')
    path = tmp_path / "new" / "map.csv"
    assert cli.main(["crash", "--map", "--csv", str(path)]) == cli.OK
    assert [point.block_id for point in read_map(path)] == list(BLOCK_IDS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[6] == "block     4,096: 2,097,152 bytes behind: ok, scales 0.5 0.5"
    assert cli.main(["crash", "--map", "--csv", "-"]) == cli.OK
    printed = capsys.readouterr()
    assert printed.out == path.read_text() and printed.err.splitlines() == lines


def test_the_command_reports_children_that_failed(monkeypatch, machine, capsys):
    plant(monkeypatch, 1, stderr="no module")
    assert cli.main(["crash", "--map"]) == cli.FAILED
    assert capsys.readouterr().out.splitlines()[0].endswith("failed: no module")


@pytest.mark.parametrize(
    "arguments",
    [["--map", "--list"], ["--map", "--json", "-"], ["--map", "--case", "x"], ["--csv", "x.csv"], ["--commit", "x"]],
)
def test_arguments_that_contradict_one_another(arguments, machine, capsys):
    assert cli.main(["crash", *arguments]) == cli.USAGE
    assert "accepted: " in capsys.readouterr().err


def test_a_point_in_words():
    point = Point(
        4096, 2**21, 1, "illegal access", "the next call", "", "no segment of torch", "CUDA error: x", 9, **MACHINE
    )
    assert str(point) == (
        "block     4,096, CUDA_LAUNCH_BLOCKING=1: 2,097,152 bytes behind (no segment of torch): illegal access, "
        "raised by the next call: CUDA error: x"
    )


def test_committed_maps_have_every_block_once() -> None:
    for path in RESULTS.glob("crash_map_*.csv"):
        points = read_map(path)
        jobs = [(point.block_id, point.launch_blocking) for point in points]
        assert len(set(jobs)) == len(jobs) and {block_id for block_id, _ in jobs} == set(BLOCK_IDS)
        for point in points:
            assert point.device and point.torch and point.commit and len(point.date) == 10
            assert point.outcome in ("ok", "silent corruption", "illegal access", "abort")
            assert bool(point.raised_by) == (point.outcome == "illegal access")
            assert point.bytes_behind == bytes_behind(point.block_id)
