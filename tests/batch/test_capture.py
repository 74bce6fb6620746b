"""A CUDA graph's capture leaves nothing in a batch, and finds there what was prepared.

On a CPU nothing is captured: there a stand-in says that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import batch as batch_module
from kvgather.attention.choose import common_of
from kvgather.batch import capture
from tests.attention.batches import Setup, assert_close, setup
from tests.where import GPU

NEW, CACHED = [5, 1], [14, 33]
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"window": 4, "path": "gather"},
    "workspace": {"workspace_tokens": 20, "path": "gather"},
    "workspace and window": {"workspace_tokens": 8, "window": 3, "path": "gather"},
}
Capture = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """A block of which the code believes that a CUDA graph captures it."""

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in (capture, batch_module):
                patch.setattr(module, "capturing", lambda device: True)
            yield

    return block


def kept(batch: kg.PrefixBatch) -> tuple[int, ...]:
    return len(batch._device_objects), len(batch.windows)


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_first_use_in_a_capture_raises_and_leaves_nothing(layer: str, lengths: bool, captured: Capture) -> None:
    made = setup(NEW, CACHED)
    batch = made.batch(lengths)
    before, pool = kept(batch), made.cache.key_cache.clone()
    for _ in range(2):
        with captured(), pytest.raises(kg.CaptureError, match=r"captured, .*PrefixBatch.prepare\(\.\.\.\).*windows="):
            made.attend(batch, **LAYERS[layer])
    assert kept(batch) == before and torch.equal(made.cache.key_cache, pool), "nothing was kept, or written"
    assert issubclass(kg.CaptureError, ValueError)
    got = made.attend(batch, **LAYERS[layer])
    assert_close(got, made.wanted(raw=True, window=LAYERS[layer].get("window")))


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_was_prepared_is_found_and_nothing_is_added(layer: str, lengths: bool, captured: Capture) -> None:
    made = setup(NEW, CACHED)
    batch = made.batch(lengths)
    batch.prepare(made.cache, 4, dtype=torch.float32, **LAYERS[layer])
    before = kept(batch)
    with captured():
        got = made.attend(batch, **LAYERS[layer])
    assert kept(batch) == before
    assert_close(got, made.wanted(raw=True, window=LAYERS[layer].get("window")))


def test_windows_of_build_and_an_earlier_eager_layer_do_as_well(captured: Capture) -> None:
    made = setup(NEW, CACHED)
    with_window, used = made.batch(windows=(4,)), made.batch()
    used.for_window(4)
    for batch in (with_window, used):
        with captured():
            assert_close(made.attend(batch, window=4), made.wanted(raw=True, window=4))
            with pytest.raises(kg.CaptureError, match="the plan of window 5"):
                batch.for_window(5)


def test_what_all_have_cached_is_not_kept_either(captured: Capture) -> None:
    batch = setup(NEW, CACHED).batch()
    with captured(), pytest.raises(kg.CaptureError, match="the piece of 4 tokens that all sequences have cached"):
        common_of(batch, 4)
    assert kept(batch) == (0, 0)
    common = common_of(batch, 4)
    with captured():
        assert common_of(batch, 4) is common


def test_a_batch_that_was_built_in_a_capture_lives_there(captured: Capture) -> None:
    made = setup(NEW, CACHED)
    with captured():
        batch = made.batch(windows=(3,))
        for window in (None, 3, 4):
            made.attend(batch, window=window)
        batch.prepare(made.cache, 4, window=6)
    for use in (lambda: made.attend(batch), lambda: batch.for_window(5), lambda: batch.prepare(made.cache, 4)):
        with pytest.raises(kg.CaptureError, match="was built while a CUDA graph was captured"):
            use()


def test_prepare_in_a_capture_is_refused(captured: Capture) -> None:
    made = setup(NEW, CACHED)
    batch = made.batch()
    with captured(), pytest.raises(kg.CaptureError, match="before the capture"):
        batch.prepare(made.cache, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"cache": None}, TypeError, r"cache is NoneType None; accepted: a PagedKVCache"),
        ({"num_q_heads": 3}, ValueError, r"num_q_heads is 3; accepted: a multiple of the cache's 2 KV heads"),
        ({"window": 0}, ValueError, r"window is 0; accepted: 1 to"),
        ({"dtype": torch.int8}, TypeError, r"dtype is int8; accepted"),
        ({"workspace_tokens": 0}, ValueError, r"workspace_tokens is 0; accepted: 1 to"),
        ({"workspace_tokens": 4, "window": 5, "path": "gather"}, ValueError, r"workspace_tokens is 4; accepted for a"),
        ({"path": "fast"}, ValueError, r"path is 'fast'; accepted: auto, direct, gather, hybrid"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    made = setup(NEW, CACHED)
    with pytest.raises(error, match=message):
        made.batch().prepare(**{"cache": made.cache, "num_q_heads": 4, **wrong})
    other = setup(NEW, CACHED, page_size=8)
    with pytest.raises(ValueError, match=r"batch was made for page_size 4; accepted: the cache's, 8"):
        made.batch().prepare(other.cache, 4)


GPU_LAYERS: dict[str, dict[str, Any]] = {
    "gather": {"path": "gather"},
    "direct": {"path": "direct"},
    "auto": {},
    "auto, window": {"window": 40},
    **{name: {**layer, **({"workspace_tokens": 300} if "workspace" in name else {})} for name, layer in LAYERS.items()},
}


def on_gpu(where: str, **more: Any) -> Setup:
    return setup(
        [16, 1, 30], [1100, 2048, 1025], heads=(8, 2), dims=(64, 64), page_size=16, dtype=torch.float8_e4m3fn,
        q_dtype=torch.bfloat16, device=where, **more,
    )  # fmt: skip


def ready(made: Setup, call: dict[str, Any]) -> Callable[[kg.PrefixBatch], tuple[Tensor, Tensor]]:
    """`Setup.attend` with the new tokens picked before: to pick them is to wait, which no capture may."""
    tokens = made.new_tokens()

    def attend(batch: kg.PrefixBatch) -> tuple[Tensor, Tensor]:
        return kg.prefix_attention(made.q, *tokens, made.cache, batch, return_lse=True, **call)

    return attend


def graph_of(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call()
    return graph, answer


@pytest.mark.triton
@pytest.mark.parametrize("where", [GPU])
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("layer", GPU_LAYERS)
def test_a_prepared_layer_is_first_run_in_a_capture(layer: str, lengths: bool, where: str) -> None:
    made, call = on_gpu(where), GPU_LAYERS[layer]
    attend = ready(made, call)
    wanted = attend(made.batch(lengths))  # compiles; with a batch of its own
    batch = made.batch(lengths)
    batch.prepare(made.cache, 8, **call)
    torch.cuda.synchronize()
    before, allocated = kept(batch), torch.cuda.memory_allocated()
    graph, got = graph_of(lambda: attend(batch))
    assert kept(batch) == before
    eager = attend(batch)  # before any replay
    assert_close(eager, tuple(t.double() for t in wanted))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(got, tuple(t.double() for t in wanted))
    del graph, got, eager
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated, "nothing that the capture made is kept"


@pytest.mark.triton
@pytest.mark.parametrize("where", [GPU])
@pytest.mark.parametrize("layer", ["window", "workspace", "workspace and window"])
def test_an_unprepared_layer_is_refused_in_a_capture(layer: str, where: str) -> None:
    made, call = on_gpu(where), GPU_LAYERS[layer]
    attend = ready(made, call)
    wanted = attend(made.batch())
    batch, spare = made.batch(), made.batch()
    refusals: list[kg.CaptureError] = []

    def refused() -> Tensor:
        try:
            attend(batch)
        except kg.CaptureError as error:  # the capture goes on: nothing was launched
            refusals.append(error)
        return spare.cu_seqlens_q + 1

    graph, _ = graph_of(refused)
    assert len(refusals) == 1 and "PrefixBatch.prepare" in str(refusals[0])
    got = attend(batch)  # no replay so far
    assert_close(got, tuple(t.double() for t in wanted))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(attend(batch), tuple(t.double() for t in wanted))
