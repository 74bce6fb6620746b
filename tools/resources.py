"""Whether kernels keep their registers and shared memory: `python3 tools/resources.py --write FILE`, `--compare FILE`.

Compiles gathers, direct attention and a batch's kernels for an H100, and some of them for an MI300, without a GPU
(`tests/digests/resources.py`). The exit status is 0 if all numbers are the recorded ones, 1 if not, and 2 if this
Triton has no record.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    sys.exit(importlib.import_module("tests.digests.resources").main(__doc__))
