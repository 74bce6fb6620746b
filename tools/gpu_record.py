"""Where a record of the GPU's was made, and how it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MACHINE = """
import json, torch
from kvgather.bench.runner import machine
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
