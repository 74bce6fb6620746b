"""The processes of `gpu_suite`: cuts test files into shards and runs each shard in a process of its own."""

from __future__ import annotations

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
"""A file without these words has no GPU test; it may need packages that a GPU machine lacks."""

SECONDS_A_TEST = {
    "tests/attention/test_dense_gpu.py": 0.6,
    "tests/attention/test_direct.py": 3.9,
    "tests/attention/test_direct_bounds.py": 2.6,
    "tests/attention/test_direct_gpu.py": 17.7,
    "tests/attention/test_direct_tiles_gpu.py": 11.5,
    "tests/attention/test_disagreeing.py": 2.9,
    "tests/attention/test_max_q.py": 2.3,
    "tests/attention/test_prefix.py": 4.7,
    "tests/attention/test_prefix_gpu.py": 8.9,
    "tests/bench/test_prefix.py": 3.0,
    "tests/gather/test_kernel.py": 0.7,
    "tests/gather/test_ops.py": 3.0,
    "tests/gather/test_properties.py": 5.7,
    "tests/gather/test_sanitizer.py": 12.8,
    "tests/lab/test_crash.py": 8.1,
    "tests/scatter/test_kernel.py": 0.3,
}
"""About how long a test of a file takes with 16 processes on an H100, mostly compiling; elsewhere `USUAL`."""
USUAL = 1.0
SHARD_SECONDS = 60.0
"""A file that takes longer is cut into shards of about this length; a process takes 7 s before its first test."""
GIGABYTES = {
    "tests/attention/test_direct_gpu.py": 5,
    "tests/attention/test_direct_large.py": 6,
    "tests/bench/test_prefix.py": 5,
    "tests/gather/test_large.py": 24,
}
"""GPU memory that a process takes at most, where it is more than `USUAL_GIGABYTES`."""
USUAL_GIGABYTES = 3


@dataclass(frozen=True)
class Shard:
    """Some tests of one file, run by one process.

    Attributes:
        file: its path from the root, with slashes.
        ids: the tests, in the order of the file.
        part: such as "2/5", or "" for a whole file.
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
    """What became of one test: "passed", "failed", "errors" or "skipped", and why."""

    id: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Running:
    """A shard's process; `folder` holds its ids, events and output."""

    shard: Shard
    process: subprocess.Popen[bytes]
    folder: Path
    begun: float = field(default_factory=time.monotonic)
    killed: str = ""

    def quiet(self) -> float:
        """Seconds since it last began or ended a test."""
        events = self.folder / "events"
        since = time.time() - events.stat().st_mtime if events.exists() else float("inf")
        return min(since, time.monotonic() - self.begun)


def candidates(root: Path, paths: Sequence[str]) -> list[str]:
    """Test files under `paths` that may hold GPU tests, from the root, with slashes."""
    found: set[Path] = set()
    for path in paths:
        found |= {root / path} if path.endswith(".py") else set((root / path).rglob("test_*.py"))
    return sorted(str(file.relative_to(root).as_posix()) for file in found if MARKS.search(file.read_text("utf-8")))


def cut(file: str, ids: Sequence[str]) -> list[Shard]:
    """The shards of a file: every n-th test, since neighbours take about equally long."""
    whole = Shard(file, tuple(ids))
    parts = max(1, min(len(ids), round(whole.seconds / SHARD_SECONDS)))
    if parts == 1:
        return [whole]
    return [Shard(file, tuple(ids[nth::parts]), f"{nth + 1}/{parts}") for nth in range(parts)]


def events_of(folder: Path) -> list[dict[str, Any]]:
    """What a process wrote down, less a last line that its death cut off."""
    file = folder / "events"
    lines = file.read_text().splitlines() if file.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def command(root: Path, files: Sequence[str], *more: str) -> list[str]:
    return [
        sys.executable, "-X", "faulthandler", "-m", "pytest", "-p", "gpu_shard", "-p", "no:cacheprovider",
        "--rootdir", str(root), "--tb=short", "--color=no", *more, *files,
    ]  # fmt: skip


def environment(folder: Path, cache: Path, ids: Sequence[str] | None) -> dict[str, str]:
    """A child's: one thread, a kernel cache that all share, and none of the plugins that happen to be installed."""
    made = with_path(Path(__file__).resolve().parent)
    made |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    made.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    made.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    made["KVGATHER_EVENTS"] = str(folder / "events")
    if ids is not None:
        (folder / "ids").write_text(json.dumps(list(ids)))
        made["KVGATHER_IDS"] = str(folder / "ids")
    return made


def collect(root: Path, files: Sequence[str], work: Path, timeout: float) -> tuple[dict[str, list[str]], list[End]]:
    """The GPU tests of each file, and an error for each file that cannot be collected."""
    folder = work / "collect"
    folder.mkdir()
    if not files:
        return {}, []
    try:
        done = subprocess.run(
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
        broken.append(End("collection", "errors", (done.stdout + done.stderr)[-600:]))
    return by_file, broken


def start(root: Path, shard: Shard, folder: Path, cache: Path) -> Running:
    folder.mkdir()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command(root, [shard.file]), cwd=root, env=environment(folder, cache, shard.ids),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Running(shard, process, folder)


def kill(running: Running, reason: str) -> None:
    """End a process and the children it started."""
    running.killed = reason
    try:
        os.killpg(running.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        running.process.kill()
    running.process.wait()


def ends_of(running: Running) -> list[End]:
    """What became of each test of a shard whose process has ended."""
    ends: dict[str, End] = {}
    begun, stopped, broken = "", "", ""
    for event in events_of(running.folder):
        begun = event.get("start", begun)
        stopped = event.get("stopped", stopped)
        broken = event.get("reason", "") if "broken" in event else broken
        if "end" in event:
            outcome = "errors" if event["outcome"] == "error" else event["outcome"]
            ends[event["end"]] = End(event["end"], outcome, event["reason"], event["seconds"])
    reason = stopped or running.killed or broken or _how_it_ended(running.process.returncode)
    for test in running.shard.ids:
        if test not in ends:
            when = "" if stopped or broken else " in this test" if test == begun else " before this test"
            ends[test] = End(test, "errors", reason + when)
    if running.process.returncode not in (0, 1) and all(end.outcome in ("passed", "skipped") for end in ends.values()):
        ends[running.shard.name] = End(running.shard.name, "errors", f"every test ended, then {reason}")
    return list(ends.values())


def _how_it_ended(status: int) -> str:
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
        root: where the tests are run.
        shards: what to run.
        work: an empty folder, for the processes' events and output and for the kernels they compile.
        workers: processes at a time.
        gigabytes: GPU memory that they may take together; a shard that needs more runs alone.
        limit: seconds without a test that begins or ends, after which a process is killed.
        until: the monotonic time at which all of them are.
        ended: called with each shard that ends, what became of its tests, its seconds, and its process's folder.
    """
    waiting = sorted(shards, key=lambda shard: -shard.seconds)
    running: list[Running] = []
    while waiting or running:
        over = time.monotonic() > until
        for shard in list(waiting):
            if over:
                waiting.remove(shard)
                late = [End(test, "errors", "not begun: the suite's time was over") for test in shard.ids]
                ended(shard, late, 0.0, work)
            elif len(running) < workers and _fits(shard, running, gigabytes):
                waiting.remove(shard)
                running.append(start(root, shard, work / f"{len(shards) - len(waiting):03}", work))
        for one in list(running):
            if one.process.poll() is None and over:
                kill(one, "killed: the suite's time was over,")
            elif one.process.poll() is None and one.quiet() > limit:
                kill(one, f"killed: no test began or ended for {limit:g} s,")
            if one.process.poll() is not None:
                running.remove(one)
                ended(one.shard, ends_of(one), time.monotonic() - one.begun, one.folder)
        time.sleep(0.05)


def _fits(shard: Shard, running: Sequence[Running], gigabytes: float) -> bool:
    return not running or shard.gigabytes + sum(one.shard.gigabytes for one in running) <= gigabytes
