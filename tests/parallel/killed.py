"""A replay whose server loses a rank in the middle of its answers."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from kvgather import cli
from kvgather.replay import run
from kvgather.replay.process import ServerProcess

VARIABLE = "NCCL_NVLS_ENABLE"
"""Of machines whose multicast must stay off: every rank has it."""


def figure(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)
    return str(found)


def check_replay_with_a_killed_rank(
    rank: int, arguments: list[str], within: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client has an answer, which names the rank, and the exit status is that of a dead engine."""
    killed: list[float] = []
    seen: list[str] = []

    class Killed(ServerProcess):
        """The server, and a thread that kills the rank."""

        def wait_until_ready(self, seconds: float) -> None:
            super().wait_until_ready(seconds)
            threading.Thread(target=self.kill, daemon=True).start()

        def kill(self) -> None:
            while (status := self.status()).get("num_steps", 0) < 10:
                if self.death():
                    return
                time.sleep(0.02)
            environment = Path(f"/proc/{status['processes'][rank]}/environ")  # of Linux
            seen.append(environment.read_text() if environment.is_file() else f"{VARIABLE}=0")
            os.kill(status["processes"][rank], signal.SIGKILL)
            killed.append(time.monotonic())

    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setattr(run, "ServerProcess", Killed)
    status = cli.main(arguments)
    text = capsys.readouterr().out
    assert killed, text
    seconds = time.monotonic() - killed[0]
    assert status == cli.NOT_AS_EXPECTED and seconds < within, (seconds, text)
    assert [figure(text, name) for name in ("completed", "failed", "timed out")] == ["0", "65", "0"]
    assert f"{VARIABLE}=0" in seen[0]
    assert figure(text, "engine") in (f"died: the process died of SIGKILL (rank {rank})", f"died: rank {rank} died")
    reasons = {f"the engine's process died of SIGKILL (rank {rank})", f"rank {rank} died"}
    assert set(re.findall(r"^\d+ × +(.*)$", text, re.MULTILINE)) <= reasons
