"""Requests that an exchange between ranks has taken from the queue when it fails: their callers get the reason.

One process stands for rank 0 of two; the exchange is replaced.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus, drain_queue

from kvgather.serving import EngineManager
from kvgather.serving.manager import CountingManager
from kvgather.serving.models import random_model
from kvgather.serving.serve import Sizes, start_engine
from kvgather.serving.taken import TakenQueue, keep_requests
from tests.serving.engines import CPU, FP32, expected, prompts, tokens, wait

REASON = "rank 1 has left"
ENGINES = pytest.mark.parametrize("options", [FP32, None], ids=["ours", "stock"])


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], CountingManager]]:
    """Starts an engine that takes itself for rank 0 of two; the exchange is that of one."""
    init = CountingManager.__init__

    def two(self: CountingManager, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.processes *= 2

    monkeypatch.setattr(CountingManager, "__init__", two)
    started: list[CountingManager] = []

    def start(options: Any) -> CountingManager:
        model = random_model("tiny", device=CPU, dtype=torch.float32)
        started.append(start_engine(model, Sizes(num_blocks=64, max_batched_tokens=96), options))
        return started[-1]

    yield start
    for manager in started:
        if manager.is_running():
            manager.stop(timeout=10, hard_stop=True)


def failing(monkeypatch: pytest.MonkeyPatch, manager: CountingManager, part: str, stop: bool = False) -> None:
    """Make the next exchange of requests fail, in one of its parts, or stop the engine as another rank would."""
    helper = manager.distributed_helper
    exchange = getattr(helper, part)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if part == "tp_all_reduce_state" and not kwargs.get("payload_size"):
            return exchange(*args, **kwargs)
        if not stop:
            raise RuntimeError(REASON)
        return exchange(*args, **kwargs | {"stop_status": BackgroundThreadStatus.HARD_STOP})

    monkeypatch.setattr(helper, part, fails)


@ENGINES
@pytest.mark.parametrize("part", ["tp_all_reduce_state", "tp_broadcast_object_from_rank_0"])
def test_a_failed_exchange(
    options: Any, part: str, of_two: Callable[[Any], CountingManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = of_two(options)
    assert isinstance(manager, EngineManager) == (options is not None)
    assert tokens(wait(manager, [manager.add_request(list(prompts()[0]), max_new_tokens=4)]))
    failing(monkeypatch, manager, part)
    (result,) = wait(manager, [manager.add_request(list(prompts()[1]), max_new_tokens=4)], 10)
    assert result.error == REASON


@ENGINES
def test_another_rank_stops_the_engine(
    options: Any, of_two: Callable[[Any], CountingManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = of_two(options)
    failing(monkeypatch, manager, "tp_all_reduce_state", stop=True)
    (result,) = wait(manager, [manager.add_request(list(prompts()[0]), max_new_tokens=4)], 10)
    assert "finished before this request completed" in result.error


@ENGINES
def test_requests_of_a_good_exchange_are_not_put_back(options: Any, of_two: Callable[[Any], CountingManager]) -> None:
    manager = of_two(options)
    names = [manager.add_request(list(prompt), max_new_tokens=4) for prompt in prompts()]
    assert tokens(wait(manager, names)) == expected("tiny", prompts(), 4)


def test_put_back_before_later_requests_and_beyond_the_bound() -> None:
    requests: queue.Queue[int] = queue.Queue(maxsize=3)
    for request in (1, 2, 3):
        requests.put(request)
    taken = TakenQueue(requests)
    assert drain_queue(taken) == [1, 2, 3] and taken.empty()
    for request in (4, 5, 6):
        requests.put(request)
    taken.put_back()
    assert list(requests.queue) == [1, 2, 3, 4, 5, 6]
    drain_queue(taken)
    taken.accept()
    taken.put_back()
    assert requests.empty()


def test_a_processor_is_changed_once_and_on_rank_0_alone() -> None:
    processor = SimpleNamespace(input_queue=queue.Queue(), _update_tp_group_state=lambda: False)
    keep_requests(processor)
    changed = processor.input_queue, processor._update_tp_group_state
    keep_requests(processor)
    assert (processor.input_queue, processor._update_tp_group_state) == changed
    follower = SimpleNamespace(input_queue=None, _update_tp_group_state=bool)
    keep_requests(follower)
    assert follower.input_queue is None and follower._update_tp_group_state is bool
