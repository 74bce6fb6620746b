"""Dense attention on a GPU: every backend by name, on every shape; nothing waits, graphs replay."""

from __future__ import annotations

import pytest
import torch

from kvgather.attention.dense import dense_attention, possible
from kvgather.cases import MODELS
from tests.attention.rows import MIXES, assert_right, bound, made, wanted
from tests.where import nothing_waits

pytestmark = pytest.mark.gpu

GPU_MIXES = {
    **MIXES,
    "long": ([1, 200, 65, 128], [3000, 1025, 65, 131]),
    "equal, decode": ([1] * 4, [1024] * 4),
    "equal, short": ([16] * 3, [2048] * 3),
    "equal, long": ([130, 512, 300], [1024] * 3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [*MODELS, "8/8x64"])
@pytest.mark.parametrize("mix", GPU_MIXES)
def test_every_backend_of_the_gpu(mix: str, heads: str, dtype: torch.dtype) -> None:
    lens = GPU_MIXES[mix]
    tried = set()
    for causal, window in ((True, None), (True, 1), (True, 128), (False, None)):
        for spare, lengths in ((0, True), (5, True), (5, False)):
            call = made(*lens, heads, dtype, "cuda", spare, lengths)
            expected = wanted(call, *lens, causal, window)
            for backend in ("auto", *possible(bound(call, causal, window))):
                tried.add(backend)
                got = dense_attention(**call, causal=causal, window=window, backend=backend)
                try:
                    assert_right(got, call, expected)
                except AssertionError as wrong:
                    message = f"{backend}, causal {causal}, window {window}, spare {spare}, lengths {lengths}: {wrong}"
                    raise AssertionError(message) from wrong
    kernels = set() if dtype == torch.float32 else {"flash", "cudnn"} if len(set(lens[1])) == 1 else {"flash"}
    assert tried == {"auto", "torch", *kernels}, "run where all of them are"


@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
def test_nan_stays_in_its_sequence_on_the_gpu(backend: str) -> None:
    call = made([20, 30, 10], [1024] * 3, "64/8x64", torch.bfloat16, "cuda")
    call["k"][1024:2048], call["v"][1024:2048] = torch.nan, torch.nan
    for causal in (False,) if backend == "cudnn" else (False, True):
        out, lse = dense_attention(**call, causal=causal, backend=backend)
        assert out[20:50].isnan().all() and lse[20:50].isnan().all()
        for rows in (slice(0, 20), slice(50, 60)):
            assert not out[rows].isnan().any() and not lse[rows].isnan().any()


@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
@pytest.mark.parametrize("rows", [3, 300])
def test_nan_in_a_key_reaches_the_rows_that_see_it(rows: int, backend: str) -> None:
    """Attention rests on it: a bad block's K is NaN, and its V is 0."""
    for causal, window in (
        ((False, None),) if backend == "cudnn" else ((False, None), (True, None), (True, 1), (True, 200))
    ):
        for back in (1, 2, 130, 290, 700):  # the key is so far from the end of the second sequence
            call = made([20, rows, 10], [1024] * 3, "64/8x64", torch.bfloat16, "cuda")
            key = 1024 - back
            call["k"][1024 + key], call["v"][1024 + key] = torch.nan, 0
            position = torch.arange(1024 - rows, 1024, device="cuda")
            sees = torch.ones_like(position, dtype=torch.bool)
            if causal:
                sees = (position >= key) & (position < key + (window or 2048))
            nan = torch.cat((sees.new_zeros(20), sees, sees.new_zeros(10))).tolist()
            out, lse = dense_attention(**call, causal=causal, window=window, backend=backend)
            assert out.isnan().all((1, 2)).tolist() == out.isnan().any((1, 2)).tolist() == nan
            assert lse.isnan().all(1).tolist() == lse.isnan().any(1).tolist() == nan


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
def test_nothing_waits_and_a_graph_replays(backend: str, lengths: bool) -> None:
    if backend == "cudnn" and not lengths:
        pytest.skip("cuDNN's shapes come from the lengths")
    lens = [17, 30, 1], [1024] * 3
    mask = {"causal": backend != "cudnn", "backend": backend}
    call = made(*lens, "32/8x128", torch.bfloat16, "cuda", 3, lengths)
    dense_attention(**call, **mask)
    with nothing_waits():
        dense_attention(**call, **mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        dense_attention(**call, **mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dense_attention(**call, **mask)
    for _ in range(2):
        for name in "qkv":
            call[name][:-3] = torch.randn_like(call[name][:-3])
        graph.replay()
        assert_right(got, call, wanted(call, *lens, backend != "cudnn"))


def test_rows_of_a_packed_projection_on_the_gpu() -> None:
    """Q, K and V side by side in one allocation; and a V that begins where no 16-byte load can."""
    lens = [16, 16], [1024, 1024]
    call = made(*lens, "32/8x128", torch.bfloat16, "cuda")
    kv = torch.randn(2048, 8, 2 * 128 + 4, dtype=torch.bfloat16, device="cuda")
    call["k"], call["v"] = kv[..., :128], kv[..., 132:]
    call["q"] = torch.randn(32, 48, 128, dtype=torch.bfloat16, device="cuda")[:, 8:40]
    for causal in (True, False):
        for backend in possible(bound(call, causal)):
            got = dense_attention(**call, causal=causal, backend=backend)
            assert_right(got, call, wanted(call, *lens, causal))
