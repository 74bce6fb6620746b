"""Small engines, prompts and expected tokens, for the tests of serving."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from kvgather.serving import EngineManager, Options, install
from kvgather.serving.models import random_model

CPU = torch.device("cpu")
FP32 = Options(dtype=torch.float32)
Prompts = tuple[tuple[int, ...], ...]


@cache
def prompts(count: int = 8, shared: int = 75, own: tuple[int, int] = (5, 40), seed: int = 1) -> Prompts:
    """Token ids with a common prefix."""
    chance = random.Random(seed)
    prefix = [chance.randrange(3, 128) for _ in range(shared)]
    return tuple((*prefix, *(chance.randrange(3, 128) for _ in range(chance.randint(*own)))) for _ in range(count))


@cache
def expected(name: str, of: Prompts, new: int) -> list[list[int]]:
    """The tokens of transformers' `generate`, one prompt at a time, with its own cache and attention."""
    model = random_model(name, device=CPU, dtype=torch.float32)
    answers = []
    for prompt in of:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def engine(name: str = "tiny", options: Options = FP32, **sizes: Any) -> EngineManager:
    """An engine that has not started: 64 blocks of 16 tokens, 96 tokens a step."""
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 96, "safety_margin": 0.0} | sizes
    return install(random_model(name, device=CPU, dtype=torch.float32), options, ContinuousBatchingConfig(**sizes))


def answers(manager: EngineManager, of: Sequence[Sequence[int]], new: int, timeout: float = 60.0) -> list[Any]:
    """Start the engine if it does not run, and wait for the results of all prompts, in their order.

    They are queued before the start, so that the first step finds all of them.
    """
    names = [manager.add_request(list(prompt), max_new_tokens=new) for prompt in of]
    manager.start()
    return wait(manager, names, timeout)


def wait(manager: EngineManager, names: Sequence[str | None], timeout: float = 60.0) -> list[Any]:
    """The final results of these requests."""
    results: dict[str, Any] = {}
    while len(results) < len(names):
        result = manager.get_result(timeout=timeout)
        assert result is not None, f"no result within {timeout} s; {len(results)} of {len(names)} came"
        if result.is_finished():
            results[result.request_id] = result
    return [results[str(name)] for name in names]


def tokens(results: Sequence[Any]) -> list[list[int]]:
    assert [result.error for result in results] == [None] * len(results)
    return [result.generated_tokens for result in results]
