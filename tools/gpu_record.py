"""The records of the GPU's checks: where they were made, how they are written, and what the README says of them.

`python3 tools/gpu_record.py` writes the README's sentences about the committed records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- the GPU's records: begin -->\n", "<!-- the GPU's records: end -->\n"
_MACHINE = """
import json, torch
from kvgather.bench.machine import machine
gpu = torch.cuda.is_available()
gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else 0.0
print(json.dumps([gigabytes, machine("cuda" if gpu else "cpu")]))
"""


def with_path(*folders: Path) -> dict[str, str]:
    """The environment, with folders before the others that Python imports from."""
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine() -> tuple[float, dict[str, str]]:
    """The GPU's memory in 10^9 bytes, 0 without one; and device, driver, torch, triton, commit and date."""
    done = subprocess.run([sys.executable, "-c", _MACHINE], env=with_path(ROOT), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch or kvgather cannot be used: {done.stderr[-600:]}")
    gigabytes, found = json.loads(done.stdout.splitlines()[-1])
    return gigabytes, found


def write(record: dict[str, Any], out: Path) -> None:
    """Write JSON next to `out` and rename it, so that no half of a record is ever there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".part")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(out)


def sentences(results: Path = RESULTS) -> str:
    """What the README says of the records that a folder has; empty if it has none."""
    told = []
    suite, memcheck = results / "gpu_suite.json", results / "memcheck.json"
    if suite.exists():
        found = json.loads(suite.read_text())
        told.append(
            f"The tests that need a GPU, on {_where(found)}: {found['passed']} passed, {found['failed']} failed, "
            f"{found['errors']} errors, {found['skipped']} skipped, in {found['seconds']:.0f} s "
            "([gpu_suite.json](benchmarks/results/gpu_suite.json), `make test-gpu`)."
        )
    if memcheck.exists():
        found = json.loads(memcheck.read_text())
        told.append(
            f"compute-sanitizer's memcheck over one launch of each of {found['variants']} kernel variants, on "
            f"{_where(found)}: {found['errors']} errors, in {found['seconds']:.0f} s "
            "([memcheck.json](benchmarks/results/memcheck.json), `make memcheck`)."
        )
    return "\n".join(told) + "\n\n" if told else ""


def _where(found: dict[str, Any]) -> str:
    return f"one {found['device']}, {found['date']}, torch {found['torch']}, triton {found['triton']}"


def main(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> None:
    """Put the sentences between the README's two comments."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + sentences(results) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
