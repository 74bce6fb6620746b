"""The Hopper kernel compiles without a GPU, fits into shared memory, and keeps its tensor cores busy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvgather.lab.child import environment

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not triton.__version__.startswith("3.6."),
        reason=f"the kernel needs Triton 3.6, and this is {triton.__version__}; `make test-triton` runs both",
    ),
]
SPILLED = {"FEW 64": 0, "FEW 128": 16, "MANY 64": 0, "MANY 128": 240}
"""Bytes a thread at most: those of producers, which have few registers, and none of a consumer's loop."""
SHARED = 232_448


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("triton")
    env = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    command = [sys.executable, "-P", "-m", "tests.hopper._aot_child"]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    answers = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(SPILLED), child.stderr[-2000:]
    return {answer["form"]: answer for answer in answers}


@pytest.mark.parametrize("form", SPILLED)
def test_it_compiles(form: str, compiled: dict[str, dict[str, Any]]) -> None:
    said = compiled[form]
    assert said["spilled"] <= SPILLED[form] and 0 < said["shared"] <= SHARED
    assert said["warnings"] == [], "ptxas serializes wgmma"
