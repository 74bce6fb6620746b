"""With FP32 pools the engine gives the tokens of `generate`: sharing on and off, odd budgets, preemption, families."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig

from kvgather.serving import Options, install
from kvgather.serving.models import random_model
from tests.serving.engines import CPU, FP32, answers, engine, expected, prompts, tokens

pytestmark = pytest.mark.usefixtures("stopped")


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("budget", [17, 33, 96, 4096])
def test_budgets_and_sharing(budget: int, sharing: bool) -> None:
    manager = engine(max_batch_tokens=budget, allow_block_sharing=sharing)
    assert tokens(answers(manager, prompts(), 8)) == expected("tiny", prompts(), 8)
    cache = manager.cache
    assert cache is not None and cache.use_prefix_sharing is sharing
    assert (cache.hits > 0) is (sharing and budget < 4096), "in one large step nothing is cached before"


@pytest.mark.parametrize("blocks", [20, 12, 10])
def test_preemption(blocks: int) -> None:
    """The requests do not fit together: some are put back, and compute their tokens again."""
    manager = engine(num_blocks=blocks)
    assert tokens(answers(manager, prompts(), 8)) == expected("tiny", prompts(), 8)
    cache = manager.cache
    assert cache is not None and cache.lookups > len(prompts()), "a preempted request looks its prompt up again"


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_other_families(name: str) -> None:
    manager = engine(name, max_batch_tokens=64)
    assert tokens(answers(manager, prompts(), 6)) == expected(name, prompts(), 6)
    assert manager.cache is not None and manager.cache.hits > 0


@pytest.mark.parametrize("layout", ["HND", "SHUFFLE"])
def test_layouts(layout: str) -> None:
    manager = engine(options=Options(dtype=torch.float32, layout=layout))
    assert tokens(answers(manager, prompts(), 4)) == [answer[:4] for answer in expected("tiny", prompts(), 8)]


def test_generate_batch() -> None:
    """Transformers' own entry point finds the engine, twice, and the model gets its attention back."""
    model = random_model("tiny", device=CPU, dtype=torch.float32)
    own = model.config._attn_implementation
    install(model, FP32, ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=96, safety_margin=0.0))
    for _ in range(2):
        results = model.generate_batch([list(prompt) for prompt in prompts()], max_new_tokens=8)
        assert tokens(list(results.values())) == expected("tiny", prompts(), 8)
    assert model.config._attn_implementation == own


def test_outside_of_the_engine_the_attention_is_refused() -> None:
    model = random_model("tiny", device=CPU, dtype=torch.float32)
    install(model, FP32)
    with pytest.raises(ValueError, match=r"attn_implementation is 'kvgather' outside of continuous batching"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.triton
@pytest.mark.parametrize("path", ["direct", "hybrid"])
def test_paths_of_a_gpu(path: str) -> None:
    """Straight from the pages, under the interpreter: with window layers, sinks, chunks, and a cached prefix."""
    manager = engine(options=Options(dtype=torch.float32, path=path), max_batch_tokens=64)
    assert tokens(answers(manager, prompts()[:3], 2)) == [answer[:2] for answer in expected("tiny", prompts(), 8)[:3]]
    assert manager.cache is not None and manager.cache.hits == 2
