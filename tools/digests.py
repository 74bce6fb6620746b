"""Whether every result keeps its bits: `python3 tools/digests.py --write FILE`, a change, then `--compare FILE`.

Runs calls of the whole public interface (`tests/digests/cases.py`), on the GPU if there is one, else in Triton's
interpreter and torch on the CPU. The exit status is 0 if nothing differs, 1 if something does, and 2 if the file's
device or versions are others.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    sys.exit(importlib.import_module("tests.digests.digest").main(__doc__))
