"""What `make lab` runs: says what this machine can do, copies the notebooks for the reader, opens JupyterLab.

The originals in notebooks/ stay as they are, so that a solved exercise never turns a test red. The copy lies
beside them, in a folder of the same depth: a link such as ../kvgather/plan.py leads to one file from both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ORIGINALS = "notebooks"
COPIES = "my-notebooks"
RECORD = ".originals.json"  # in the copy: the digest of each original when it was copied or last offered


class LaunchError(ValueError):
    """JupyterLab cannot be opened from here; the message says why and what to do."""


def find_root() -> Path:
    """The repository that this package was installed from.

    Raises:
        LaunchError: the package lies outside a clone, so that there are no notebooks beside it.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ORIGINALS).is_dir():
        raise LaunchError(f"there is no {ORIGINALS} folder in {root}; accepted: a clone of the repository")
    return root


def copy_notebooks(root: Path) -> list[str]:
    """Bring the reader's copy of the notebooks up to date without ever overwriting a file in it.

    A chapter that the reader lacks, or deleted, is copied. One whose original changed since is put beside
    the reader's own, as `NN_name.new.ipynb`, once for each change.

    Args:
        root: the repository; `root/notebooks` is read, `root/my-notebooks` is made or added to.

    Returns:
        What was done, in sentences; empty when nothing was.

    Raises:
        LaunchError: the copy cannot be written.
    """
    originals, copies = root / ORIGINALS, root / COPIES
    try:
        copies.mkdir(exist_ok=True)
        return _copy_changed(originals, copies)
    except OSError as error:
        raise LaunchError(
            f"{copies} cannot be written ({error.strerror}); accepted: a clone you may write in"
        ) from error


def _copy_changed(originals: Path, copies: Path) -> list[str]:
    record = copies / RECORD
    seen = _read_record(record)
    done, copied = [], 0
    for original in sorted(path for path in originals.rglob("*") if path.is_file()):
        name = original.relative_to(originals)
        if any(part.startswith((".", "__")) for part in name.parts):
            continue
        digest = hashlib.sha256(original.read_bytes()).hexdigest()
        copy = copies / name
        if not copy.exists():
            copied += 1
        elif seen.get(name.as_posix()) == digest:
            continue
        elif hashlib.sha256(copy.read_bytes()).hexdigest() != digest:
            copy = _free_name(copy)
            done.append(f"{name.as_posix()} has a new version; it lies beside yours as {copy.name}")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)
        seen[name.as_posix()] = digest
        # After each file, so that an interrupted copy offers nothing twice.
        record.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if copied:
        files = "1 file" if copied == 1 else f"{copied} files"
        done.insert(0, f"{files} copied from {ORIGINALS}/ to {COPIES}/, which is yours to write in")
    return done


def _read_record(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (
        FileNotFoundError,
        TypeError,
        ValueError,
    ):  # a damaged one only means that a chapter may be offered twice
        return {}


def _free_name(copy: Path) -> Path:
    offered = copy.with_name(f"{copy.stem}.new{copy.suffix}")
    number = 2
    while offered.exists():
        offered = copy.with_name(f"{copy.stem}.new-{number}{copy.suffix}")
        number += 1
    return offered


def first_chapter(root: Path) -> str:
    """The first chapter in the reader's copy: its path from the repository, with forward slashes."""
    chapters = sorted(path.name for path in (root / ORIGINALS).glob("[0-9]*.ipynb"))
    return f"{COPIES}/{chapters[0]}" if chapters else COPIES


def lab_arguments(root: Path, *, browser: bool, extra: Sequence[str] = ()) -> list[str]:
    """JupyterLab's command line for the reader's copy.

    Args:
        root: the repository; it becomes the server's root folder, so that links to the package's files open.
        browser: whether to open a browser window.
        extra: further arguments for JupyterLab, which win over ours.

    Returns:
        The arguments that follow `jupyter lab`. The port is JupyterLab's choice: 8888, or another free one.
    """
    arguments = [
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{first_chapter(root)}",
        "--LabApp.log_level=ERROR",  # the address is logged as CRITICAL
        "--ServerApp.log_level=ERROR",
        "--ServerApp.answer_yes=True",  # one Ctrl-C ends it, with no question
    ]
    if not browser:
        arguments.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    given = {argument.split("=")[0] for argument in extra}  # JupyterLab refuses an option that it gets twice
    return [argument for argument in arguments if argument.split("=")[0] not in given] + [*extra]


def has_display() -> bool:
    """Whether a browser window opened here would be seen: not over ssh, nor on Linux without a display."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Print the doctor's report, copy the notebooks, and run JupyterLab until it is stopped.

    Args:
        argv: the command line without the program's name; None is that of `sys.argv`. `--no-browser` only
            prints the address, `--copy-only` stops before JupyterLab; everything else goes to JupyterLab.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m kvgather.workbook.launch", allow_abbrev=False)
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no window")
    parser.add_argument("--copy-only", action="store_true", help="bring your copy up to date and stop")
    options, extra = parser.parse_known_args(argv)
    try:
        root = find_root()
        # In a process of its own, which takes its GPU context with it when it ends.
        subprocess.run([sys.executable, "-m", "kvgather.cli", "doctor"], cwd=root, check=False)
        print()
        for line in copy_notebooks(root):
            print(line)
    except LaunchError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return 1
    if options.copy_only:
        return 0
    print(f"JupyterLab opens {first_chapter(root)}; Ctrl-C ends it.", flush=True)
    return run_lab(lab_arguments(root, browser=has_display() and not options.no_browser, extra=extra))


def run_lab(arguments: list[str]) -> int:
    """Run JupyterLab in this process until it is stopped.

    Args:
        arguments: what `lab_arguments` made.

    Returns:
        The exit status.
    """
    try:
        import zmq
        from jupyter_client.manager import KernelManager
        from jupyterlab.labapp import LabApp
    except ImportError:
        print("kvgather: JupyterLab is not installed; accepted: `pip install -e .[notebooks]`", file=sys.stderr)
        return 1
    # The kernels of this environment, not a user's own of the same name.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # One setting: JupyterLab neither asks for leave to fetch its news nor looks for its updates.
    ours = str(Path(__file__).parent / "jupyter")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("JUPYTER_CONFIG_PATH")]))
    if hasattr(KernelManager, "transport_encryption") and zmq.has("curve"):
        # Else every kernel that starts warns that its messages on this machine are not encrypted.
        arguments = ["--KernelManager.transport_encryption=auto", *arguments]
    LabApp.launch_instance(arguments)
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:  # while the doctor was looking
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # JupyterLab is shut down by now, but a page that was open leaves a thread for which Python would wait for ever.
    os._exit(status)
