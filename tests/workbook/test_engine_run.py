"""The runs of chapter 09: equal arguments give equal steps, and the engine finds what the exercise's rule says."""

from __future__ import annotations

import asyncio
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

from kvgather.replay.clients import Workload, ask_all
from kvgather.serving import Options
from kvgather.serving.serve import Sizes
from kvgather.workbook.engine_run import EngineRun
from kvgather.workbook.figures import png
from kvgather.workbook.timeline_picture import timeline_picture

OPTIONS = Options(dtype=torch.float32)
SIZES = Sizes(num_blocks=64, max_batched_tokens=50)
EARLIER = list(range(20, 70))  # 50 tokens: the whole first step


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (EARLIER, 48),
        (EARLIER[:48], 32),
        (EARLIER[:17], 16),
        (EARLIER[:16], 0),
        ([*EARLIER[:40], 3, 4], 32),
        ([3, *EARLIER[1:]], 0),
    ],
)
def test_a_prompt_finds_whole_blocks_and_never_all_of_itself(prompt: list[int], found: int) -> None:
    run = EngineRun(OPTIONS, [EARLIER, prompt], 2, SIZES).run()
    assert (run.hit_tokens, run.hits, run.prompt_tokens) == (found, int(found > 0), 50 + len(prompt))
    assert next(step.prefill_tokens for step in run.steps if step.prefills) == 50


def test_runs_repeat_and_can_be_drawn() -> None:
    prompts = [EARLIER, [*EARLIER[:33], 5], [*EARLIER[:20], 6]]
    one, two = (EngineRun(OPTIONS, prompts, 3, SIZES).run() for _ in range(2))
    assert one.tokens == two.tokens and one.differing(two) == [] and [len(tokens) for tokens in one.tokens] == [3] * 3
    steps = [[(s.prefills, s.decodes, s.prefill_tokens, s.cached_tokens) for s in run.steps] for run in (one, two)]
    assert steps[0] == steps[1]
    two.tokens[1] = [0, 0, 0]
    assert one.differing(two) == [1]
    assert png(timeline_picture(one.steps)).startswith(b"\x89PNG")


def test_a_failed_request_is_an_error_with_its_reason() -> None:
    def broken(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("this gather is broken")

    with pytest.raises(RuntimeError, match="this gather is broken"):
        EngineRun(Options(gather=broken), [EARLIER, [*EARLIER[:32], 3, 4]], 2, SIZES).run()


def test_clients_also_run_where_a_loop_runs() -> None:
    """As in a notebook's cell. Nobody listens, so every client gets a reason."""

    async def cell() -> list[str]:
        workload = Workload("none", ["a", "b"], 1, False, 5.0)
        return [answer.error for answer in ask_all("http://127.0.0.1:9", workload, lambda: "ended with status 1")]

    assert asyncio.run(cell()) == ["the engine's process ended with status 1"] * 2
