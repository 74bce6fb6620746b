"""The environment of child processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvgather import device
from kvgather.lab.child import environment


@pytest.mark.triton
def test_a_child_imports_the_same_triton_from_any_folder(tmp_path: Path) -> None:
    """`make test-triton` puts another version of Triton on the path, and children must import that version too."""
    assert device.triton_available()
    import triton

    code = "import kvgather, triton; print(triton.__version__); print(triton.__file__)"
    child = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert child.stdout.splitlines() == [triton.__version__, triton.__file__], child.stderr
