"""The replay with NCCL, one process for each GPU; the tokens are compared on a CPU, in test_tensor_parallel."""

from __future__ import annotations

import pytest
import torch

from kvgather import cli
from tests.parallel.killed import check_replay_with_a_killed_rank, figure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; test_tensor_parallel.py has gloo"),
]
REPLAY = ["replay", "--device", "cuda", "--commit", "abc", "--ranks", "2", "--config", "tiny-6", "--limit", "300"]


@pytest.mark.parametrize("options", [[], ["--scale", "per-token-head", "--layout", "SHUFFLE"]], ids=["NHD", "SHUFFLE"])
def test_replay(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main([*REPLAY, *options])
    text = capsys.readouterr().out
    assert status == cli.OK, text
    assert (figure(text, "completed"), figure(text, "engine")) == ("65", "alive")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_server_and_every_client_knows_why(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU waits for the dead rank until torchrun ends its process: in 3 s, in older versions of torch in 30 s."""
    check_replay_with_a_killed_rank(rank, [*REPLAY, "--new", "300"], 60, capsys, monkeypatch)
