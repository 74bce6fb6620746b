"""The columns of a row about the machine: device, driver, versions, commit and date."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import TypedDict

import torch

from ..device import triton_available
from .report import slug
from .results import RESULTS

COMMIT = "KVGATHER_COMMIT"
"""The environment variable that names the commit where git does not know it."""


class Machine(TypedDict):
    """The columns of a row about the machine, the versions and the date."""

    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


def machine(device_type: str) -> Machine:
    """The machine, the versions, the commit and the date of a measurement."""
    import importlib.metadata

    name, driver = _hardware(device_type)
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton_available() else "",
        "commit": os.environ.get(COMMIT) or _commit_of(Path(__file__).resolve()),
        "date": datetime.date.today().isoformat(),
    }


def default_csv(name: str, device_type: str) -> Path:
    """Where a command keeps its rows by default: `NAME_DEVICE.csv` in the folder of results.

    Args:
        name: what was measured.
        device_type: "cpu", or "cuda" for the current GPU.
    """
    return RESULTS / f"{name}_{'cpu' if device_type == 'cpu' else slug(machine(device_type)['device'])}.csv"


@functools.cache
def _hardware(device_type: str) -> tuple[str, str]:
    """The name of the device, and the version of its driver."""
    if device_type == "cuda":
        name, driver = (
            torch.cuda.get_device_name(),
            _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    else:
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads", ""
    return name, driver


def _commit_of(file: Path) -> str:
    """The commit of the clone of this repository that contains a file of the package; empty without a clone.

    An installed copy may be inside a folder of another repository. That repository does not track the file, or has the
    package below its top folder.
    """
    package = file.parents[1]
    if not _line("git", "-C", str(package), "ls-files", "--error-unmatch", str(file)):
        return ""
    top = _line("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if not top or not Path(top).is_dir() or not package.parent.samefile(top):
        return ""
    return _line("git", "-C", str(package), "rev-parse", "--short", "HEAD")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _line(*command: str) -> str:
    """The first line of a command's output; empty if the command fails or does not exist."""
    try:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (process.stdout.splitlines() or [""])[0].strip()
