"""A request with several answers is forked: its copies have the codes of the prompt, and the scales of these codes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig

from kvgather.serving import Options, install
from kvgather.serving.models import random_model
from tests.serving.engines import CPU, engine, prompts, tokens

pytestmark = pytest.mark.usefixtures("stopped")


@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
def test_the_answers_of_a_forked_request_are_equal(kind: str) -> None:
    """Greedy, so that all answers are those of the request itself."""
    model = random_model("tiny", device=CPU, dtype=torch.float32)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=96, safety_margin=0.0)
    generation = copy.deepcopy(model.generation_config)
    generation.num_return_sequences = 3
    install(model, Options(scale=kind), batching, generation)
    prompt = list(prompts(1, 41, (0, 0))[0])  # two whole blocks, which are shared, and one that is copied
    first, *others = tokens(
        list(model.generate_batch([prompt], generation_config=generation, max_new_tokens=8).values())
    )
    assert others == [first, first]


@pytest.mark.parametrize("kind", ["per-page-head", "per-token-head"])
def test_a_block_is_copied_with_its_scales(kind: str) -> None:
    geometry = engine(options=Options(scale=kind))._existing_cache().layer_pool(0).geometry
    shape = (geometry.num_blocks, geometry.num_kv_heads, geometry.page_size)[: 2 if kind == "per-page-head" else 3]
    given = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in (1, 2)]
    before = [scale.clone() for scale in given]
    cache = engine(options=Options(scale=kind, k_scale=given[0], v_scale=given[1]))._existing_cache()
    for layer, name in ((0, "sliding_attention"), (1, "full_attention")):
        pool, source, dest = cache.layer_pool(layer), [3, 4], [9, 7]
        assert pool.k_scale is not None and pool.v_scale is not None
        pool.key_cache.view(torch.uint8).random_(0, 100)
        cache.perform_cache_copy({name: (source, dest)})
        for copied in (pool.key_cache.view(torch.uint8), pool.k_scale, pool.v_scale):
            assert torch.equal(copied[dest], copied[source]) and not torch.equal(copied[3], copied[4])
        unchanged = [block for block in range(geometry.num_blocks) if block not in dest]
        assert torch.equal(pool.k_scale[unchanged], before[0][unchanged])
    assert torch.equal(given[0], before[0]) and torch.equal(given[1], before[1]), "the caller's scales do not change"
