"""`install`, and what ends an engine: the model gets its attention back, and an engine that failed can start again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig

from kvgather.serving import EngineManager, install
from kvgather.serving.attention import NAME
from kvgather.serving.models import random_model
from tests.serving.engines import CPU, FP32, answers, engine, expected, prompts, tokens

pytestmark = pytest.mark.usefixtures("stopped")
REASON = "CUDA out of memory"


def fail(manager: EngineManager) -> None:
    """Let a request fail in the middle of a step, before the first layer; the engine ends."""

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError(REASON)

    embedding = manager.model.model.embed_tokens
    embedding.forward = broken
    manager.add_request(list(prompts()[0]), max_new_tokens=4)
    manager.start()
    manager.wait()
    del embedding.forward
    result = manager.get_result(timeout=10)
    assert result is not None and result.error == REASON


def assert_own_attention(model: Any) -> None:
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.shape == (1, 3, 128)


@pytest.mark.parametrize("end", ["not started", "requests were added", "running", "failed"])
def test_destroy_restores_the_attention_and_frees_the_cache(end: str) -> None:
    manager = engine("llama")
    model = manager.model
    assert model.config._attn_implementation == NAME
    if end == "requests were added":
        manager.add_request([5, 6, 7], max_new_tokens=1)
    elif end == "running":
        answers(manager, [[5, 6, 7]], 1)
    elif end == "failed":
        fail(manager)
    for _ in range(2):
        model.destroy_cached_continuous_batching_manager()
        assert not manager.is_running() and manager.cache is None
        assert_own_attention(model)
        manager.destroy()


def test_a_second_install_ends_the_first_engine() -> None:
    first = engine("llama")
    model = first.model
    first.start()
    name = first.add_request([5, 6, 7], max_new_tokens=4)
    second = install(model, FP32, ContinuousBatchingConfig(page_size=16, num_blocks=64, safety_margin=0.0))
    assert not first.is_running() and first.cache is None
    result = first.get_result(name, timeout=1)
    assert result is not None and result.error is None and len(result.generated_tokens) == 4
    assert tokens(answers(second, prompts()[:2], 6)) == expected("llama", prompts()[:2], 6)
    model.destroy_cached_continuous_batching_manager()
    assert_own_attention(model)


def test_a_refused_configuration_leaves_the_attention() -> None:
    model = random_model("llama", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="page_size must be at least"):
        install(model, FP32, ContinuousBatchingConfig(page_size=0))
    assert_own_attention(model)


def test_the_generation_configuration_does_not_change() -> None:
    model = random_model("llama", device=CPU, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=64, safety_margin=0.0)
    manager = install(model, FP32, batching)
    assert model.generation_config.eos_token_id is None and manager.generation_config.eos_token_id == -1
    assert tokens(answers(manager, prompts()[:1], 6)) == expected("llama", prompts()[:2], 6)[:1]


def test_an_engine_that_failed_in_a_step_can_start_again() -> None:
    manager = engine()
    fail(manager)
    manager.start()
    assert tokens(answers(manager, prompts(), 8)) == expected("tiny", prompts(), 8)
