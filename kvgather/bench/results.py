"""The folder of committed results."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks") / "results"


def find_results() -> Path:
    """The folder of committed results, in the clone of this package or of the working directory.

    Raises:
        FileNotFoundError: neither is inside a clone.
    """
    for folder in (ROOT, Path.cwd(), *Path.cwd().parents):
        if (folder / RESULTS).is_dir():
            return folder / RESULTS
    raise FileNotFoundError(f"no folder {RESULTS} in {ROOT} or above {Path.cwd()}; accepted: a clone of the repository")
