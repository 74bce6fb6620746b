"""Faults of the stock engine that ours does not have, blocks that come back, errors that reach every request."""

from __future__ import annotations

import gc
import time

import psutil
import pytest
import torch

from kvgather.serving import EngineManager, EngineStopped, Options, RequestRefused
from tests.serving.engines import answers, engine, expected, prompts, tokens, wait

pytestmark = pytest.mark.usefixtures("stopped")


def free_share(manager: EngineManager) -> float:
    """The free share of the cache, without blocks that only wait to be found again."""
    cache = manager.cache
    assert cache is not None
    cache.evict_cached_blocks()
    return float(cache.compute_free_capacity())


def test_a_request_that_never_fits_is_refused_and_harms_nobody() -> None:
    manager = engine(num_blocks=10)
    manager.start()
    assert manager.cache is not None and manager.cache.largest_request == 160
    names = [manager.add_request(list(prompt), max_new_tokens=8) for prompt in prompts()]
    with pytest.raises(RequestRefused, match=r"has 160 tokens, and 2 may be generated; accepted: 160 tokens"):
        manager.add_request([5] * 160, max_new_tokens=2)
    with pytest.raises(RequestRefused, match="the prompt has no tokens"):
        manager.add_request([], max_new_tokens=2)
    assert tokens(wait(manager, names)) == expected("tiny", prompts(), 8)


def test_a_request_is_checked_before_the_engine_starts() -> None:
    manager = engine(num_blocks=10)
    with pytest.raises(RequestRefused, match="the prompt has 400 tokens"):
        manager.add_request([5] * 400, max_new_tokens=2)
    assert tokens(answers(manager, prompts()[:2], 8)) == expected("tiny", prompts(), 8)[:2]


def test_the_largest_request_completes() -> None:
    manager = engine(num_blocks=10, max_batch_tokens=33)
    ids = list(prompts(1, 140, (10, 10))[0])
    (result,) = answers(manager, [ids], 11)
    assert result.error is None and len(result.generated_tokens) == 11  # 150 + 11 - 1 tokens, all of the cache


def test_no_limit_means_what_fits() -> None:
    manager = engine(num_blocks=4)
    manager.generation_config.max_new_tokens = None
    manager.start()
    (result,) = wait(manager, [manager.add_request([7] * 40)])
    assert result.error is None and len(result.generated_tokens) == 64 - 40 + 1


def test_after_the_end_requests_are_refused_with_the_reason() -> None:
    def broken(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError('an "illegal memory access" was encountered\nmore may be reported later')

    manager = engine(options=Options(gather=broken))
    results = answers(manager, prompts(), 4)
    assert {result.error for result in results} == {"an 'illegal memory access' was encountered"}
    with pytest.raises(EngineStopped, match="takes no requests: an 'illegal memory access' was encountered"):
        manager.add_request([1, 2, 3], max_new_tokens=1)


def test_a_stopped_engine_refuses_and_can_start_again() -> None:
    manager = engine()
    first = tokens(answers(manager, prompts()[:2], 4))
    manager.stop(timeout=10)
    with pytest.raises(EngineStopped, match="takes no requests: it has stopped, or is stopping"):
        manager.add_request([1, 2, 3], max_new_tokens=1)
    assert manager.cache is None
    manager.switch_to_cb_friendly_attn(manager.model)
    manager.start()
    assert tokens(answers(manager, prompts()[:2], 4)) == first


def test_cancelled_requests_free_their_blocks_and_get_a_result() -> None:
    manager = engine()
    manager.start()
    keep = manager.add_request(list(prompts()[0]), max_new_tokens=8)
    name = manager.add_request(list(prompts()[1]), max_new_tokens=600, streaming=True)
    waiting = manager.add_request(list(prompts()[2]), max_new_tokens=600)
    finals = {}
    while len(finals) < 3:
        result = manager.get_result(timeout=30)
        assert result is not None
        if result.is_finished():
            finals[result.request_id] = result
        elif len(result.generated_tokens) == 3:  # in the middle of the stream
            manager.cancel_request(str(name))
            manager.cancel_request(str(waiting))
    assert finals[str(keep)].generated_tokens == expected("tiny", prompts(), 8)[0]
    assert {finals[str(n)].error for n in (name, waiting)} == {"the request was cancelled"}
    assert 3 <= len(finals[str(name)].generated_tokens) < 600
    assert free_share(manager) == 1.0


def test_a_thousand_requests_leak_no_block_and_no_memory() -> None:
    manager = engine("llama", max_batch_tokens=256, num_blocks=256)
    process, sizes = psutil.Process(), []
    for turn in range(25):
        answers(manager, prompts(40, 32, (3, 9), seed=turn), 2)
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert manager.cache is not None
    assert manager.cache.lookups == 1000 and manager.cache.hits > 500, manager.cache.hits
    assert free_share(manager) == 1.0
    assert not any(allocator.block_table for allocator in manager.cache.cache_allocators.values())
    assert not manager.output_router.result_handlers and manager.output_router.output_queue.empty()
    assert sizes[-1] - sizes[5] < 4 * 2**20, [size // 2**10 for size in sizes]


def test_counters() -> None:
    """Prefix sharing cuts the computed tokens by what the counters claim."""
    shared, alone = engine(), engine(allow_block_sharing=False)
    for manager in (shared, alone):
        answers(manager, prompts()[:1], 2)  # so that the prefix is cached
        answers(manager, prompts()[1:], 2)
    assert shared.cache is not None
    total = sum(map(len, prompts()))
    assert alone.counters.prefill_tokens == total
    assert shared.counters.prefill_tokens == total - shared.cache.hit_tokens
    assert shared.cache.hits == 7 and shared.cache.hit_tokens == 7 * 64
    assert shared.counters.num_steps == len(shared.counters.steps)
    begins = [step.begin for step in shared.counters.steps]
    assert begins == sorted(begins) and begins[-1] <= time.perf_counter()
    paths = shared.cache.paths.as_json()
    assert set(paths) == {"full", "window 24"}
    assert paths["full"] == {"steps": {"gather": shared.counters.num_steps}, "expected_us": {}}
    paths["full"]["steps"]["gather"] = 0  # of a copy: the engine notes paths while a client reads them
    assert shared.cache.paths.as_json()["full"]["steps"] == {"gather": shared.counters.num_steps}
