"""Which rank is missing, from the processes that live and from who has answered in torchrun's store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from kvgather.serving import missing
from kvgather.serving.missing import missing_ranks

TIMED_OUT = "[gloo] Timed out waiting 4000ms for send operation to complete"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of torchrun's."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(missing, "SECONDS", 0.5)
    yield
    del server


@pytest.fixture
def processes() -> Iterator[list[int]]:
    """This one, as rank 0, and another one."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield [os.getpid(), other.pid]
    other.kill()
    other.wait()


def test_a_rank_that_does_not_answer(processes: list[int]) -> None:
    assert missing_ranks(processes, 0, TIMED_OUT) == "rank 1 does not answer"


def test_a_rank_that_answered_is_not_missing(processes: list[int]) -> None:
    assert missing_ranks(processes, 1, "CUDA out of memory") == ""
    assert missing_ranks(processes, 0, TIMED_OUT) == ""


def test_an_answer_of_an_earlier_engine_does_not_count(processes: list[int]) -> None:
    missing_ranks(processes, 1, "CUDA out of memory", engine=1)
    assert missing_ranks(processes, 0, TIMED_OUT, engine=2) == "rank 1 does not answer"


def test_an_answer_of_an_earlier_process_does_not_count(processes: list[int]) -> None:
    missing_ranks([processes[0], 1], 1, "CUDA out of memory")
    assert missing_ranks(processes, 0, TIMED_OUT) == "rank 1 does not answer"


def test_a_dead_process_is_named_at_once(processes: list[int]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert missing_ranks([processes[0], ended.pid, processes[1]], 0, TIMED_OUT) == "rank 1 died"


def test_another_error_names_nobody(processes: list[int]) -> None:
    assert missing_ranks(processes, 0, "CUDA out of memory") == ""
