"""The records of the checks on a GPU: the machine's description, the JSON files, and the README's sentences about them.

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
print(json.dumps([gigabytes, torch.cuda.device_count(), machine("cuda" if gpu else "cpu")]))
"""


def with_path(*folders: Path) -> dict[str, str]:
    """The environment with `folders` at the front of PYTHONPATH."""
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine() -> tuple[float, int, dict[str, str]]:
    """The first GPU's memory in 10^9 bytes, 0 without one; the number of GPUs; the columns of `bench.machine`."""
    child = subprocess.run([sys.executable, "-c", _MACHINE], env=with_path(ROOT), capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"torch or kvgather cannot be imported: {child.stderr[-600:]}")
    gigabytes, gpus, description = json.loads(child.stdout.splitlines()[-1])
    return gigabytes, gpus, description


def write(record: dict[str, Any], out: Path) -> None:
    """Write a JSON file under a temporary name and rename it, so that `out` is never incomplete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(out)


def sentences(results: Path = RESULTS) -> str:
    """The README's sentences about the records in a folder; empty if the folder has no records."""
    lines = []
    suite, memcheck = results / "gpu_suite.json", results / "memcheck.json"
    if suite.exists():
        record = json.loads(suite.read_text())
        lines.append(
            f"The tests that need a GPU, on {_machine_text(record, record['gpus'])}: {record['passed']} passed, "
            f"{record['failed']} failed, {record['errors']} errors, {record['skipped']} skipped, in "
            f"{record['seconds']:.0f} s "
            "([gpu_suite.json](benchmarks/results/gpu_suite.json), `make test-gpu`)."
        )
    if memcheck.exists():
        record = json.loads(memcheck.read_text())
        lines.append(
            f"compute-sanitizer's memcheck over one launch of each of {record['variants']} kernel variants, on "
            f"{_machine_text(record, 1)}: {record['errors']} errors, in {record['seconds']:.0f} s "
            "([memcheck.json](benchmarks/results/memcheck.json), `make memcheck`)."
        )
    return "\n".join(lines) + "\n\n" if lines else ""


def _machine_text(record: dict[str, Any], gpus: int) -> str:
    number = "one" if gpus == 1 else f"{gpus} ×"
    return f"{number} {record['device']}, {record['date']}, torch {record['torch']}, triton {record['triton']}"


def main(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> None:
    """Write the sentences between the README's begin and end comments."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + sentences(results) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
