"""The server as a child process: started, watched, asked, stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..lab import child

HOST = "127.0.0.1"
SHUTDOWN = 3
"""Seconds that torchrun leaves the other ranks when one has ended, or when it is stopped itself; then it kills them."""
FIRST_RANK = re.compile(r"Root Cause.*?rank +: (?P<rank>\d+) .*?exitcode +: (?P<code>-?\d+)", re.DOTALL)
"""In torchrun's last words: which rank has ended first, and how."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's proxy, which cannot reach this machine's servers."""
LAUNCHER = "torch/distributed/elastic"
"""In each line of torchrun's log."""


class ServerError(RuntimeError):
    """The server did not start; the message ends with the last lines that it printed."""


class ServerProcess:
    """A server such as `kvgather serve` in a child process. Used as a context, it ends the child.

    Attributes:
        port: where it listens.
        process: the child.
    """

    def __init__(self, arguments: Sequence[str], seconds: float, ranks: int = 1) -> None:
        """Start the child.

        Args:
            arguments: the module and its arguments, which are followed by host and port.
            seconds: the child ends itself after this time, even if this process has ended.
            ranks: processes that run the model together: the child is then torchrun, and rank 0 listens.
        """
        self.port, self._ranks = free_port(), ranks
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = child.command(
            *arguments, "--host", HOST, "--port", str(self.port), seconds=seconds,
            options=("-X", "faulthandler"),
        )  # fmt: skip
        if ranks > 1:
            launcher = ("--nproc-per-node", f"{ranks}", "--master-addr", HOST, "--master-port", f"{free_port()}")
            command = child.command("torch.distributed.run", *launcher, "--no-python", *command, seconds=seconds)
        self.process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=child.environment(HF_HUB_OFFLINE="1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT=f"{SHUTDOWN}"),
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_ready(self, seconds: float) -> None:
        """Return when the server answers, which is after its engine has started.

        Raises:
            ServerError: the child has ended, or the time is over.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.death():
                raise ServerError(f"the server did not start: it {self.death()}\n{self.last_lines()}")
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.1)
        raise ServerError(f"the server did not start within {seconds:g} s\n{self.last_lines()}")

    def status(self) -> dict[str, Any]:
        """What the engine has done; empty if it does not answer."""
        try:
            answer: dict[str, Any] = json.loads(self._get("/kvgather"))
            return answer
        except (OSError, ValueError):
            return {}

    def death(self) -> str:
        """How the child has ended: "died of SIGSEGV", "ended with status 1"; empty while it runs.

        With several ranks: how the first of them did, such as "died of SIGKILL (rank 1)".
        """
        code = self.process.poll()
        if code is None:
            return ""
        rank = ""
        if self._ranks > 1 and (first := FIRST_RANK.search(self._text())):
            rank, code = f" (rank {first['rank']})", int(first["code"])
        if code < 0:
            return f"died of {signal.Signals(-code).name}{rank}"
        return f"ended with status {code}{rank}"

    def wait_for_death(self, seconds: float = SHUTDOWN + 2.0) -> str:
        """`death` of a child that has stopped to answer, and may be about to end; empty if it still runs then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.death()

    def _text(self) -> str:
        """What the child has printed until now."""
        self._output.seek(0)
        return self._output.read()

    def last_lines(self, count: int = 12) -> str:
        """The last lines that the child has printed; after a fault, its first lines: the kernel's are on top.

        What torchrun says about the end of its ranks is left out: `death` has it.
        """
        lines = self._text().splitlines(keepends=True)
        if self._ranks > 1:
            lines = list(itertools.takewhile(lambda line: LAUNCHER not in line, lines))
        fault = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        return "".join(lines[-count:] if fault is None else lines[fault : fault + count]).rstrip()

    def _get(self, path: str) -> str:
        with DIRECT.open(self.url + path, timeout=5) as answer:
            return str(answer.read().decode())

    def stop(self) -> None:
        """End the child."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5 if self._ranks == 1 else 40)  # a torchrun that knows no SHUTDOWN waits 30 s
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._output.close()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
