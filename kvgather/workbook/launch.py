"""`make lab`: print the doctor's report, copy the notebooks for the reader, open JupyterLab.

The originals in notebooks/ do not change, so a solved exercise does not fail a test. The copies are in a folder of the
same depth, so a link such as ../kvgather/plan.py works from both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ORIGINALS = "notebooks"
COPIES = "my-notebooks"
RECORD = ".originals.json"  # in the copy: digests of the originals at the time of their last copy
WORKSPACES = ".workspaces"  # in the copy: which files and panels JupyterLab shows
# JupyterLab opens its file panel in a workspace that has no layout yet, so the first one has a layout: a closed panel.
LAYOUT = {"main": {"dock": None}, "left": {"collapsed": True, "visible": True, "widgets": []}}


class LaunchError(ValueError):
    """JupyterLab cannot be opened; the message gives the reason and the fix."""


def find_root() -> Path:
    """The repository that this package was installed from.

    Raises:
        LaunchError: the package is not in a clone, which has the notebooks.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ORIGINALS).is_dir():
        raise LaunchError(f"there is no {ORIGINALS} folder in {root}; accepted: a clone of the repository")
    return root


def copy_notebooks(root: Path) -> list[str]:
    """Bring the reader's copy of the notebooks up to date without overwriting a file in it.

    A missing chapter is copied. A chapter whose original changed is copied next to the reader's own, as
    `NN_name.new.ipynb`, once for each change.

    Args:
        root: the repository; reads `root/notebooks`, and creates or extends `root/my-notebooks`.

    Returns:
        Sentences about the copied files; empty if no file was copied.

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
    messages, copied = [], 0
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
            messages.append(f"{name.as_posix()} has a new version; it is next to yours, as {copy.name}")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)
        seen[name.as_posix()] = digest
        # After each file, so that an interrupted copy does not repeat a file.
        record.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if copied:
        files = "1 file" if copied == 1 else f"{copied} files"
        messages.insert(0, f"{files} copied from {ORIGINALS}/ to {COPIES}/, which is yours to write in")
    return messages


def _read_record(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (
        FileNotFoundError,
        TypeError,
        ValueError,
    ):  # a damaged record: a chapter may be copied twice
        return {}


def _free_name(copy: Path) -> Path:
    free = copy.with_name(f"{copy.stem}.new{copy.suffix}")
    number = 2
    while free.exists():
        free = copy.with_name(f"{copy.stem}.new-{number}{copy.suffix}")
        number += 1
    return free


def close_file_panel(root: Path) -> None:
    """Give JupyterLab's default workspace a layout whose file panel is closed, unless it has a layout already.

    Args:
        root: the repository; writes to `root/my-notebooks/.workspaces`, which `lab_arguments` names.

    Raises:
        LaunchError: the layout cannot be written.
    """
    from jupyterlab_server.workspaces_handler import WorkspacesManager

    folder = root / COPIES / WORKSPACES
    content = {"data": {"layout-restorer:data": LAYOUT}, "metadata": {"id": "default"}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            WorkspacesManager(str(folder)).save("default", json.dumps(content))
    except OSError as error:
        raise LaunchError(
            f"{folder} cannot be written ({error.strerror}); accepted: a clone you may write in"
        ) from error


def first_chapter(root: Path) -> str:
    """The path of the first chapter in the reader's copy, relative to the repository, with forward slashes."""
    chapters = sorted(path.name for path in (root / ORIGINALS).glob("[0-9]*.ipynb"))
    return f"{COPIES}/{chapters[0]}" if chapters else COPIES


def lab_arguments(root: Path, *, browser: bool, extra: Sequence[str] = ()) -> list[str]:
    """JupyterLab's command line for the reader's copy.

    Args:
        root: the repository; the server's root folder, so that links to the package's files open.
        browser: whether to open a browser window.
        extra: arguments for JupyterLab that override these.

    Returns:
        The arguments of `jupyter lab`. JupyterLab chooses the port: 8888, or another free one.
    """
    arguments = [
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{first_chapter(root)}",
        f"--LabApp.workspaces_dir={root / COPIES / WORKSPACES}",
        "--LabApp.log_level=ERROR",  # the address is logged as CRITICAL
        "--ServerApp.log_level=ERROR",
        "--ServerApp.answer_yes=True",  # one Ctrl-C ends it, without a question
    ]
    if not browser:
        arguments.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    given = {argument.split("=")[0] for argument in extra}  # JupyterLab refuses a repeated option
    return [argument for argument in arguments if argument.split("=")[0] not in given] + [*extra]


def has_display() -> bool:
    """Whether a browser window would be visible: not over ssh, and not on Linux without a display."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def say_seconds(step: str, start: float) -> None:
    """Print a finished step and its seconds since `start`, a time of `time.perf_counter`."""
    print(f"kvgather: {step}: {time.perf_counter() - start:.1f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the doctor's report, copy the notebooks, and run JupyterLab until it is stopped; print the seconds of each.

    Args:
        argv: the command line without the program's name; None takes it from `sys.argv`. `--no-browser` only prints
            the address, `--copy-only` stops before JupyterLab; all other arguments go to JupyterLab.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m kvgather.workbook.launch", allow_abbrev=False)
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no window")
    parser.add_argument("--copy-only", action="store_true", help="bring your copy up to date and stop")
    options, extra = parser.parse_known_args(argv)
    try:
        root = find_root()
        # In a child process, so that its GPU context does not outlive it.
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kvgather", "doctor"], cwd=root, check=False)
        say_seconds("checking this machine", start)
        start = time.perf_counter()
        for line in copy_notebooks(root):
            print(line)
        say_seconds("copying chapters", start)
    except LaunchError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return 1
    if options.copy_only:
        return 0
    print(f"JupyterLab opens {first_chapter(root)}; Ctrl-C ends it.", flush=True)
    return run_lab(root, lab_arguments(root, browser=has_display() and not options.no_browser, extra=extra))


def run_lab(root: Path, arguments: list[str]) -> int:
    """Run JupyterLab in this process until it is stopped.

    Args:
        root: the repository.
        arguments: from `lab_arguments`.

    Returns:
        The exit status.
    """
    start = time.perf_counter()
    try:
        import zmq
        from jupyter_client.manager import KernelManager
        from jupyterlab.labapp import LabApp
    except ImportError:
        print("kvgather: JupyterLab is not installed; accepted: `pip install -e .[notebooks]`", file=sys.stderr)
        return 1
    # The kernels of this environment, not the user's kernels of the same name.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # One setting: JupyterLab does not ask about news and does not look for updates.
    config = str(Path(__file__).parent / "jupyter")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, [config, os.environ.get("JUPYTER_CONFIG_PATH")]))
    if hasattr(KernelManager, "transport_encryption") and zmq.has("curve"):
        # Otherwise every kernel warns at its start that its messages on this machine are not encrypted.
        arguments = ["--KernelManager.transport_encryption=auto", *arguments]
    try:
        close_file_panel(root)
    except LaunchError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return 1
    initialize = LabApp.initialize_server

    def initialize_and_say(*given: Any, **options: Any) -> Any:
        server = initialize(*given, **options)
        say_seconds("starting JupyterLab", start)
        return server

    LabApp.initialize_server = initialize_and_say
    LabApp.launch_instance(arguments)
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:  # during the doctor's report
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # JupyterLab is shut down here, but an open page leaves a thread that Python would wait for indefinitely.
    os._exit(status)
