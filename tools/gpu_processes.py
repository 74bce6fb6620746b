"""The processes of `gpu_suite`: divides test files into shards and runs each shard in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_record import with_path

MARKS = re.compile(r"pytest\.mark\.gpu|from tests\.where import")
"""A file without a match has no GPU test; its imports may need packages that a GPU machine lacks."""

SECONDS_A_TEST = {
    "tests/attention/test_bad_blocks.py": 6.0,
    "tests/attention/test_dense_gpu.py": 0.6,
    "tests/attention/test_direct.py": 3.9,
    "tests/attention/test_direct_bounds.py": 2.6,
    "tests/attention/test_direct_gpu.py": 26.0,
    "tests/attention/test_direct_tiles_gpu.py": 16.6,
    "tests/attention/test_disagreeing.py": 2.9,
    "tests/attention/test_max_q.py": 2.3,
    "tests/attention/test_prefix.py": 4.7,
    "tests/attention/test_prefix_gpu.py": 14.0,
    "tests/attention/test_share.py": 23.0,
    "tests/bench/test_prefix.py": 3.0,
    "tests/gather/test_kernel.py": 0.7,
    "tests/gather/test_ops.py": 3.0,
    "tests/gather/test_properties.py": 5.7,
    "tests/gather/test_sanitizer.py": 12.8,
    "tests/hopper/test_gpu.py": 12.0,
    "tests/lab/test_crash.py": 8.1,
    "tests/parallel/test_ranks_gpu.py": 50.0,
    "tests/parallel/test_tensor_parallel_gpu.py": 40.0,
    "tests/scatter/test_kernel.py": 0.3,
}
"""Mean seconds of a test with 16 processes on an H100, mostly compilation; files not listed take `USUAL`."""
USUAL = 1.0
SHARD_SECONDS = 60.0
"""A longer file is divided into shards of about this length; a process takes 7 s before its first test."""
GIGABYTES = {
    "tests/attention/test_direct_gpu.py": 5,
    "tests/attention/test_direct_large.py": 6,
    "tests/bench/test_prefix.py": 5,
    "tests/gather/test_large.py": 24,
    "tests/parallel/test_states.py": 22,
}
"""Peak GPU memory of a file's process; files not listed take at most `USUAL_GIGABYTES`."""
USUAL_GIGABYTES = 3
GRACE = 5.0
"""Seconds that a process has to end after Ctrl-C; then it is killed."""


@dataclass(frozen=True)
class Shard:
    """Tests of one file that run in one process.

    Attributes:
        file: the file's path from the root, with slashes.
        ids: the tests, in the order of the file.
        part: the shard's number, such as "2/5"; "" for a whole file.
    """

    file: str
    ids: tuple[str, ...]
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.file} {self.part}".rstrip()

    @property
    def seconds(self) -> float:
        return len(self.ids) * SECONDS_A_TEST.get(self.file, USUAL)

    @property
    def gigabytes(self) -> int:
        return GIGABYTES.get(self.file, USUAL_GIGABYTES)


@dataclass(frozen=True)
class End:
    """The end of one test: "passed", "failed", "errors" or "skipped", with the reason."""

    id: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Running:
    """A shard's process; `folder` contains its ids, events and output."""

    shard: Shard
    process: subprocess.Popen[bytes]
    folder: Path
    begun: float = field(default_factory=time.monotonic)
    killed: str = ""

    def quiet(self) -> float:
        """Seconds since the process last began or ended a test."""
        events = self.folder / "events"
        age = time.time() - events.stat().st_mtime if events.exists() else float("inf")
        return min(age, time.monotonic() - self.begun)


def candidates(root: Path, paths: Sequence[str]) -> list[str]:
    """The test files under `paths` that may contain GPU tests, relative to the root, with slashes."""
    files: set[Path] = set()
    for path in paths:
        files |= {root / path} if path.endswith(".py") else set((root / path).rglob("test_*.py"))
    return sorted(str(file.relative_to(root).as_posix()) for file in files if MARKS.search(file.read_text("utf-8")))


def cut(file: str, ids: Sequence[str]) -> list[Shard]:
    """The shards of a file. A shard has every n-th test, because neighbouring tests take about the same time."""
    whole = Shard(file, tuple(ids))
    parts = max(1, min(len(ids), round(whole.seconds / SHARD_SECONDS)))
    if parts == 1:
        return [whole]
    return [Shard(file, tuple(ids[nth::parts]), f"{nth + 1}/{parts}") for nth in range(parts)]


def events_of(folder: Path) -> list[dict[str, Any]]:
    """The events that a process has written, without an incomplete last line."""
    file = folder / "events"
    lines = file.read_text().splitlines() if file.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def command(root: Path, files: Sequence[str], *options: str) -> list[str]:
    return [
        sys.executable, "-X", "faulthandler", "-m", "pytest", "-p", "gpu_shard", "-p", "no:cacheprovider",
        "--rootdir", str(root), "--tb=short", "--color=no", *options, *files,
    ]  # fmt: skip


def environment(folder: Path, cache: Path, ids: Sequence[str] | None) -> dict[str, str]:
    """A child's environment: one thread, a kernel cache that all children share, and no installed pytest plugins."""
    variables = with_path(Path(__file__).resolve().parent)
    variables |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    variables.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    variables["KVGATHER_EVENTS"] = str(folder / "events")
    if ids is not None:
        (folder / "ids").write_text(json.dumps(list(ids)))
        variables["KVGATHER_IDS"] = str(folder / "ids")
    return variables


def collect(root: Path, files: Sequence[str], work: Path, timeout: float) -> tuple[dict[str, list[str]], list[End]]:
    """The GPU tests of each file, and an error for each file that cannot be collected."""
    folder = work / "collect"
    folder.mkdir()
    if not files:
        return {}, []
    try:
        collection = subprocess.run(
            command(root, files, "--collect-only", "-q", "--continue-on-collection-errors"),
            cwd=root, env=environment(folder, work, None), capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {}, [End("collection", "errors", f"took longer than {timeout:g} s")]
    by_file: dict[str, list[str]] = {}
    broken, complete = [], False
    for event in events_of(folder):
        if "broken" in event:
            broken.append(End(event["broken"], "errors", event["reason"]))
        for test in event.get("collected", ()):
            by_file.setdefault(test.split("::")[0], []).append(test)
        complete = complete or "collected" in event
    if not complete and not broken:
        broken.append(End("collection", "errors", (collection.stdout + collection.stderr)[-600:]))
    return by_file, broken


def start(root: Path, shard: Shard, folder: Path, cache: Path) -> Running:
    folder.mkdir()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command(root, [shard.file]), cwd=root, env=environment(folder, cache, shard.ids),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Running(shard, process, folder)


def kill(running: Sequence[Running], reason: str) -> None:
    """End processes and their children: first as Ctrl-C does, so that a test can end what it has started elsewhere."""
    for each in running:
        each.killed = reason
        each.process.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for each in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, end - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.wait()


def ends_of(running: Running) -> list[End]:
    """The end of each test of a shard whose process has ended."""
    ends: dict[str, End] = {}
    begun, stopped, broken = "", "", ""
    for event in events_of(running.folder):
        begun = event.get("start", begun)
        stopped = event.get("stopped", stopped)
        broken = event.get("reason", "") if "broken" in event else broken
        if "end" in event:
            outcome = "errors" if event["outcome"] == "error" else event["outcome"]
            ends[event["end"]] = End(event["end"], outcome, event["reason"], event["seconds"])
    reason = stopped or running.killed or broken or _end_text(running.process.returncode)
    for test in running.shard.ids:
        if test not in ends:
            time_text = "" if stopped or broken else " in this test" if test == begun else " before this test"
            ends[test] = End(test, "errors", reason + time_text)
    if running.process.returncode not in (0, 1) and all(end.outcome in ("passed", "skipped") for end in ends.values()):
        ends[running.shard.name] = End(running.shard.name, "errors", f"every test ended, then {reason}")
    return list(ends.values())


def _end_text(status: int) -> str:
    if status >= 0:
        return f"the process ended with status {status}"
    try:
        return f"the process died of {signal.Signals(-status).name}"
    except ValueError:
        return f"the process died of signal {-status}"


def run_shards(
    root: Path,
    shards: Sequence[Shard],
    work: Path,
    *,
    workers: int,
    gigabytes: float,
    limit: float,
    until: float,
    ended: Callable[[Shard, list[End], float, Path], None],
) -> None:
    """Run each shard in a process, `workers` at a time, the longest first.

    Args:
        root: the working directory of the processes.
        shards: the shards to run.
        work: an empty folder for the processes' events and output, and for the kernels that they compile.
        workers: number of processes that run at the same time.
        gigabytes: GPU memory of all processes together; a shard that needs more runs alone.
        limit: seconds without the begin or the end of a test after which a process is killed.
        until: the monotonic time at which every process is killed.
        ended: called with each finished shard, the ends of its tests, its seconds, and its process's folder.
    """
    waiting = sorted(shards, key=lambda shard: -shard.seconds)
    running: list[Running] = []
    try:
        while waiting or running:
            expired = time.monotonic() > until
            for shard in list(waiting):
                if expired:
                    waiting.remove(shard)
                    ends = [End(test, "errors", "not begun: the suite's time was over") for test in shard.ids]
                    ended(shard, ends, 0.0, work)
                elif len(running) < workers and _fits(shard, running, gigabytes):
                    waiting.remove(shard)
                    running.append(start(root, shard, work / f"{len(shards) - len(waiting):03}", work))
            if expired:
                kill([each for each in running if each.process.poll() is None], "killed: the suite's time was over,")
            kill(
                [each for each in running if each.process.poll() is None and each.quiet() > limit],
                f"killed: no test began or ended for {limit:g} s,",
            )
            for current in list(running):
                if current.process.poll() is not None:
                    running.remove(current)
                    ended(current.shard, ends_of(current), time.monotonic() - current.begun, current.folder)
            time.sleep(0.05)
    finally:
        kill(running, "interrupted")  # after Ctrl-C, or an error; else none is left


def _fits(shard: Shard, running: Sequence[Running], gigabytes: float) -> bool:
    return not running or shard.gigabytes + sum(other.shard.gigabytes for other in running) <= gigabytes
