"""The child process of `kvgather.lab.isolated`: calls a function that was pickled, or runs a script.

python -m kvgather.lab._isolated_child function FILE
python -m kvgather.lab._isolated_child script SCRIPT ARGUMENTS…
"""

from __future__ import annotations

import pickle
import runpy
import sys
import types
from pathlib import Path

from kvgather.lab.child import leave_no_core
from kvgather.lab.script import run_in_place


def call(file: Path) -> None:
    """Call the function in a file that `run_function` wrote, with its arguments."""
    path, main, payload = pickle.loads(file.read_bytes())
    sys.path[:] = path
    if main is not None:
        _import_main(*main)
    function, arguments = pickle.loads(payload)
    function(*arguments)


def _import_main(kind: str, name: str) -> None:
    """Run the caller's main module under another name, so that it does not start over, and let pickle find it."""
    module = types.ModuleType("__mp_main__")
    run = runpy.run_path if kind == "path" else runpy.run_module
    module.__dict__.update(run(name, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def main() -> None:
    leave_no_core()
    kind, file, *arguments = sys.argv[1:]
    if kind == "function":
        call(Path(file))
    else:
        run_in_place(Path(file), arguments)


if __name__ == "__main__":
    main()
