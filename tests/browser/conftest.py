"""A running `make lab` in a clone whose path has a space, and a headless Chromium to look at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvgather.workbook import launch

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\S*token=\w+")


@dataclass
class Lab:
    """A JupyterLab that runs in a child process."""

    root: Path
    process: subprocess.Popen[str]
    taken_port: int
    lines: list[str] = field(default_factory=list)
    address: str = ""

    def read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            found = ADDRESS.search(line)
            if found and not self.address:
                self.address = found[0]

    def open(self, path: str) -> str:
        """The address that opens one file, given from the clone's root, in a workspace of its own."""
        base, token = re.split(r"/lab\S*\?", self.address)
        return f"{base}/lab/workspaces/{Path(path).stem}/tree/{path}?{token}"


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of a condition, which is asked until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    clone = tmp_path_factory.mktemp("a clone") / "kv gather"
    for part in ("kvgather", "notebooks", "benchmarks"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    home = clone.parent / "home"
    home.mkdir()
    # Nothing of the machine's own Jupyter settings, and the clone's package rather than the installed one.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(clone), "PYTHONUNBUFFERED": "1"}
    with socket.socket() as taken:  # the port that JupyterLab is to try first, so that it has to find another
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "kvgather.workbook.launch",
                "--no-browser",
                "--expose-app-in-browser",
                f"--ServerApp.port={port}",
            ],
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell starts background jobs with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        lab = Lab(clone, process, port)
        reader = threading.Thread(target=lab.read)
        reader.start()
        try:
            wait_for("JupyterLab's address", lambda: lab.address or process.poll() is not None, 90)
            assert lab.address, "".join(lab.lines)
            yield lab
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(30)  # one Ctrl-C ends it, also after a page was open
            finally:
                process.kill()
                process.wait()
            reader.join(10)
            assert process.stdout
            process.stdout.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and chromedriver, and this machine lacks one of them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,1600",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield window
    finally:
        window.quit()


@pytest.fixture(scope="session")
def first_chapter(lab: Lab) -> str:
    return launch.first_chapter(lab.root)
