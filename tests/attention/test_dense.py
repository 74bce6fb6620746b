"""Dense attention against the reference: plain torch here, every backend on a GPU, and what all of them refuse.

PyTorch's GPU kernels have strict ways of their own. Stand-ins that keep to them, in plain torch, show on a CPU that
the calls do too.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather.attention import dense_cudnn, dense_flash, dense_torch
from kvgather.attention.dense import choose_backend, dense_attention, possible
from kvgather.attention.dense_call import Dense
from kvgather.attention.reference import reference_attention
from tests.attention.cases import HEADS, MODELS, relative_error
from tests.where import nothing_waits

MIXES: dict[str, tuple[list[int], list[int]]] = {  # rows of q, keys
    "ragged": ([9, 1, 4, 2], [9, 34, 7, 140]),
    "nothing cached": ([5, 3], [5, 3]),
    "decode": ([1, 1, 1], [1, 6, 139]),
    "empty": ([3, 0, 2, 0, 1], [7, 4, 2, 0, 1]),
    "no keys": ([2, 3], [0, 5]),
    "fewer keys than rows": ([4, 3, 2], [1, 2, 6]),
    "all alike": ([16, 16], [24, 24]),
    "as many keys, ragged rows": ([3, 0, 17], [24, 24, 24]),
}


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def made(
    lens_q: list[int],
    lens_k: list[int],
    heads: str = "4/2x16",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare: int = 0,
    lengths: bool = True,
) -> dict[str, Any]:
    """Arguments; with `spare` rows of NaN past the sequences, and bounds that are above what is needed."""
    (q_heads, kv_heads), (dim, v_dim) = HEADS[heads]
    rows = ((sum(lens_q), q_heads, dim), (sum(lens_k), kv_heads, dim), (sum(lens_k), kv_heads, v_dim))
    q, k, v = (
        torch.cat((torch.randn(shape), torch.full((spare, *shape[1:]), torch.nan))).to(device, dtype) for shape in rows
    )
    known = {"seqlens_q": lens_q, "seqlens_k": lens_k} if lengths else {}
    return {
        "q": q, "k": k, "v": v, "cu_seqlens_q": offsets(lens_q, device), "cu_seqlens_k": offsets(lens_k, device),
        "max_q": max(lens_q, default=0) + spare, "max_k": max(lens_k, default=0) + spare, "softmax_scale": 0.2, **known,
    }  # fmt: skip


def wanted(
    call: dict[str, Any], lens_q: list[int], lens_k: list[int], causal: bool = True, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The reference; without a mask, which it does not have, the formula."""
    q, k, v = (call[name][:n] for name, n in (("q", sum(lens_q)), ("k", sum(lens_k)), ("v", sum(lens_k))))
    if causal:
        cu = (offsets(lens, str(q.device)) for lens in (lens_q, lens_k))
        return reference_attention(q, k, v, *cu, softmax_scale=0.2, window=window)
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    outs, lses = [], []
    for rows, keys, values in zip(q.double().split(lens_q), k.split(lens_k), v.split(lens_k), strict=True):
        scores = torch.einsum("ihd,jhd->ihj", rows, keys) * 0.2
        outs.append(torch.einsum("ihj,jhd->ihd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses)


def assert_right(got: tuple[Tensor, Tensor], call: dict[str, Any], expected: tuple[Tensor, Tensor]) -> None:
    out, lse = got
    used, exact = len(expected[0]), out.dtype == torch.float32
    assert out.dtype == call["q"].dtype and lse.dtype == torch.float32
    assert out.shape == (*call["q"].shape[:2], call["v"].shape[2]) and lse.shape == out.shape[:2]
    assert relative_error(out[:used], expected[0]) <= (1e-5 if exact else 1e-2)
    torch.testing.assert_close(lse[:used].double(), expected[1], rtol=1e-5, atol=1e-5 if exact else 1e-3)
    assert out[used:].eq(0).all() and lse[used:].eq(-math.inf).all(), "rows that belong to no sequence"
    blind = expected[1] == -math.inf
    assert out[:used][blind].eq(0).all()


MASKS = [(True, None), (True, 1), (True, 3), (True, 128), (False, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    for causal, window in MASKS:
        for spare in (0, 3):
            call = made(*MIXES[mix], dtype=dtype, spare=spare)
            got = dense_attention(**call, causal=causal, window=window)
            assert_right(got, call, wanted(call, *MIXES[mix], causal, window))


@pytest.mark.parametrize("heads", MODELS)
def test_head_shapes(heads: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for causal, window in ((True, None), (True, 1), (True, 128), (False, None)):
            lens = [3, 1], [131, 2]
            call = made(*lens, heads, dtype)
            assert_right(
                dense_attention(**call, causal=causal, window=window), call, wanted(call, *lens, causal, window)
            )


@pytest.mark.parametrize("mix", MIXES)
def test_bounds_give_what_lengths_give_with_few_scores_at_a_time(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU whose lengths the host does not know; here both, with at most 200 scores at a time."""
    monkeypatch.setattr(dense_torch, "_SCORES", 200)
    for way in ("lengths", "bounds"):
        if way == "bounds":
            monkeypatch.setattr(dense_torch, "_known_offsets", lambda call: None)
        for causal, window in MASKS:
            call = made(*MIXES[mix], spare=2)
            got = dense_attention(**call, causal=causal, window=window)
            assert_right(got, call, wanted(call, *MIXES[mix], causal, window))


def test_rows_of_q_k_and_v_may_be_views() -> None:
    lens = [5, 1], [9, 4]
    call = made(*lens)
    for name in "qkv":
        call[name] = torch.stack((call[name], call[name]), -1)[..., 1]
    assert_right(dense_attention(**call), call, wanted(call, *lens))


def test_nan_stays_in_its_sequence() -> None:
    call = made([2, 3, 1], [5, 4, 6])
    call["k"][5:9], call["v"][5:9] = torch.nan, torch.nan
    for causal in (True, False):
        out, lse = dense_attention(**call, causal=causal)
        assert out[2:5].isnan().all() and lse[2:5].isnan().all()
        assert not out[[0, 1, 5]].isnan().any() and not lse[[0, 1, 5]].isnan().any()


@pytest.mark.parametrize("lens", [([], []), ([0, 0], [0, 0]), ([0, 0], [3, 0])], ids=str)
def test_nothing_to_do(lens: tuple[list[int], list[int]]) -> None:
    for spare in (0, 2):
        call = made(*lens, spare=spare)
        out, lse = dense_attention(**call)
        assert out.shape == (spare, 4, 16) and lse.shape == (spare, 4)
        assert out.eq(0).all() and lse.eq(-math.inf).all()


GOOD = made([2, 3], [4, 3])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": torch.zeros(5, 4)}, ValueError, r"q has shape \[5, 4\]; accepted: 3 dimensions"),
        ({"q": GOOD["q"].double()}, TypeError, r"q has dtype float64; accepted: bfloat16, float16, float32"),
        ({"k": GOOD["k"].half()}, TypeError, r"k has dtype float16; accepted: float32"),
        ({"v": GOOD["v"].to("meta")}, ValueError, r"v is on meta; accepted: cpu"),
        ({"k": torch.zeros(7, 3, 16)}, ValueError, r"k has shape \[7, 3, 16\]; accepted for q .*a divisor of 4 heads"),
        ({"k": torch.zeros(7, 2, 8)}, ValueError, r"k has shape \[7, 2, 8\]; accepted for q .*, 16\]"),
        ({"v": torch.zeros(6, 2, 16)}, ValueError, r"v has shape \[6, 2, 16\]; accepted for k of shape \[7, 2, 16\]"),
        ({"cu_seqlens_q": torch.zeros(3)}, TypeError, r"cu_seqlens_q has dtype float32; accepted: int32"),
        ({"cu_seqlens_k": offsets([7], "cpu")}, ValueError, r"cu_seqlens_k has shape \[2\]; accepted: .* which has 3"),
        ({"seqlens_q": [5]}, ValueError, r"seqlens_q has 1 lengths; accepted: 2"),
        ({"seqlens_k": [4, 4]}, ValueError, r"seqlens_k sum to 8; accepted: at most the rows of k, 7"),
        ({"max_q": -1}, ValueError, r"max_q is -1; accepted: 0 to"),
        ({"softmax_scale": math.inf}, ValueError, r"softmax_scale is inf; accepted: a finite number"),
        ({"window": 0}, ValueError, r"window is 0; accepted: 1 to"),
        ({"window": 4, "causal": False}, ValueError, r"window is 4, and causal False; accepted: a window with causal"),
        ({"backend": "best"}, ValueError, r"backend is 'best'; accepted: auto, cudnn, flash, torch"),
        ({"backend": "flash"}, ValueError, r"'flash'; accepted here: torch, because it is a GPU's, and q is on cpu"),
        ({"backend": "cudnn"}, ValueError, r"'cudnn'; accepted here: torch, because it is a GPU's, and q is on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    dense_attention(**GOOD)
    with pytest.raises(error, match=message):
        dense_attention(**{**GOOD, **wrong})


# Stand-ins for the GPU's kernels.


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float, window_size_left: int | None, window_size_right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the flash kernel is: one dim, a multiple of 8; rows of no sequence are garbage; +inf for a row of nothing."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert all(t.stride(-1) == 1 for t in (q, k, v)) and dropout == 0.0 and not debug
    assert max_q > 1, "at 1 it has a way of its own, for one row in each sequence"
    assert causal or (window_size_left is None) == (window_size_right is None)
    out, lse = torch.full_like(q, 7.0), torch.full((q.shape[1], q.shape[0]), 7.0)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) and int(cu_q[-1]) <= len(q)
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        lens = [int(cu_q[b + 1] - cu_q[b])], [int(cu_k[b + 1] - cu_k[b])]
        assert lens[0][0] <= max_q and lens[1][0] <= max_k
        if lens[0][0] == 0:
            continue
        masked = causal or window_size_left is not None
        one = {"q": q[rows], "k": k[keys], "v": v[keys]}
        window = None if window_size_left is None else window_size_left + 1
        part, part_lse = wanted_at(one, *lens, masked, window, scale)
        out[rows], lse[:, rows] = part.to(q.dtype), part_lse.float().t()
    return out, lse.masked_fill(lse.isinf() | lse.isnan(), math.inf)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, compute_log_sumexp: bool, dropout: float, causal: bool, debug: bool,
    *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As cuDNN's kernel is: `[batch, heads, rows, dim]` of strided tensors, grouped heads, no padding."""
    assert bias is None and compute_log_sumexp and dropout == 0.0 and not causal and not debug
    assert q.shape[0] == k.shape[0] == v.shape[0] and all(t.stride(-1) == 1 for t in (q, k, v))
    rows = q.shape[2]
    parts = [
        wanted_at(
            {"q": q[b].transpose(0, 1), "k": k[b].transpose(0, 1), "v": v[b].transpose(0, 1)}, [rows], [k.shape[2]],
            False, None, scale,
        )
        for b in range(q.shape[0])
    ]  # fmt: skip
    out = torch.stack([part[0] for part in parts]).to(q.dtype)
    return out.transpose(1, 2), torch.stack([part[1] for part in parts]).float().transpose(1, 2)[..., None]


def wanted_at(
    one: dict[str, Tensor], lens_q: list[int], lens_k: list[int], causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`wanted`, at another scale."""
    return wanted({**one, "q": one["q"].double() * (scale / 0.2)}, lens_q, lens_k, causal, window)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, stand_in in ((dense_flash, flash), (dense_cudnn, cudnn)):
        monkeypatch.setattr(module, "_entry_point", lambda stand_in=stand_in: stand_in)
        monkeypatch.setattr(module, "why_no_gpu_kernel", lambda call: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("heads", ["4/2x16", "4/2x32:16", "5/1x80"])
@pytest.mark.parametrize("mix", MIXES)
def test_calls_keep_to_the_kernels_ways(mix: str, heads: str) -> None:
    tried = set()
    for causal, window in MASKS:
        for spare, lengths in ((0, True), (3, True), (3, False)):
            call = made(*MIXES[mix], heads, torch.bfloat16, spare=spare, lengths=lengths)
            expected = wanted(call, *MIXES[mix], causal, window)
            for backend in possible(bound(call, causal, window)):
                tried.add(backend)
                assert_right(dense_attention(**call, causal=causal, window=window, backend=backend), call, expected)
    assert tried == ({"torch", "flash", "cudnn"} if len(set(MIXES[mix][1])) == 1 else {"torch", "flash"})


def test_ragged_rows_are_padded_to_one_of_few_lengths() -> None:
    assert [dense_cudnn._padded_rows(n) for n in (1, 2, 3, 17, 64, 65, 128, 129, 257)] == [
        1, 2, 4, 32, 64, 128, 128, 256, 384,
    ]  # fmt: skip


@pytest.mark.usefixtures("stand_ins")
def test_dims_that_a_kernel_does_not_take_as_they_are() -> None:
    """12 and 20 are padded to 24 for flash, and refused by cuDNN; 264 is too wide for both."""
    lens = [3, 3], [5, 5]
    call = made(*lens, dtype=torch.bfloat16)
    call["q"], call["k"], call["v"] = torch.randn(6, 4, 12), torch.randn(10, 2, 12), torch.randn(10, 2, 20)
    call |= {name: call[name].bfloat16() for name in "qkv"}
    for causal in (True, False):
        assert possible(bound(call, causal)) == ("flash", "torch")
        expected = wanted(call, *lens, causal)
        assert_right(dense_attention(**call, causal=causal, backend="flash"), call, expected)
    call["v"] = torch.zeros(10, 2, 264, dtype=torch.bfloat16)
    assert possible(bound(call)) == ("torch",)
    with pytest.raises(ValueError, match=r"accepted here: torch, because its head dims end at 256, and .* 12 and 264"):
        dense_attention(**call, backend="flash")


@pytest.mark.usefixtures("stand_ins")
def test_nan_is_seen_by_whoever_merges() -> None:
    """The flash kernel has +inf for a row of NaN as for one of nothing."""
    call = made([2, 3, 1], [6, 6, 6], dtype=torch.bfloat16)
    call["k"][6:12], call["v"][6:12] = torch.nan, torch.nan
    for backend in ("flash", "cudnn"):
        out, lse = dense_attention(**call, causal=False, backend=backend)
        assert out[2:5].isnan().all() and lse[2:5].isnan().all(), backend
        assert not out[[0, 1, 5]].isnan().any() and not lse[[0, 1, 5]].isnan().any(), backend


def bound(call: dict[str, Any], causal: bool = True, window: int | None = None) -> Dense:
    known = [call.get(name) and tuple(call[name]) for name in ("seqlens_q", "seqlens_k")]
    tensors = [call[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    return Dense(*tensors, call["max_q"], call["max_k"], call["softmax_scale"], causal, window, *known)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("lens", "more", "backend"),
    [
        (([16, 16], [2048, 2048]), {"causal": False}, "cudnn"),
        (([16, 13], [1024, 1024]), {"causal": False}, "cudnn"),  # 32 rows instead of 29
        (([16, 1], [1024, 1024]), {"causal": False}, "flash"),  # 32 instead of 17
        (([16, 16], [2048, 1024]), {"causal": False}, "flash"),
        (([16, 16], [1000, 1000]), {"causal": False}, "flash"),  # a length of many
        (([16, 16], [2048, 2048]), {}, "flash"),
        (([16, 16], [2048, 2048]), {"window": 7}, "flash"),
    ],
)
def test_the_choice(lens: tuple[list[int], list[int]], more: dict[str, Any], backend: str) -> None:
    assert choose_backend(bound(made(*lens, dtype=torch.bfloat16), **more)) == backend
    unknown = choose_backend(bound(made(*lens, dtype=torch.bfloat16, lengths=False), **more))
    assert unknown == "flash"


def test_the_choice_where_there_is_no_gpu() -> None:
    assert choose_backend(bound(made([16], [1024], dtype=torch.bfloat16), False)) == "torch"
    assert possible(bound(made([16], [1024], dtype=torch.bfloat16), False)) == ("torch",)


# On a GPU.

GPU_MIXES = {
    **MIXES,
    "long": ([1, 200, 65, 128], [3000, 1025, 65, 131]),
    "equal, decode": ([1] * 4, [1024] * 4),
    "equal, short": ([16] * 3, [2048] * 3),
    "equal, long": ([130, 512, 300], [1024] * 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", MODELS)
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
def test_nan_stays_in_its_sequence_on_the_gpu(backend: str) -> None:
    call = made([20, 30, 10], [1024] * 3, "64/8x64", torch.bfloat16, "cuda")
    call["k"][1024:2048], call["v"][1024:2048] = torch.nan, torch.nan
    for causal in (False,) if backend == "cudnn" else (False, True):
        out, lse = dense_attention(**call, causal=causal, backend=backend)
        assert out[20:50].isnan().all() and lse[20:50].isnan().all()
        for rows in (slice(0, 20), slice(50, 60)):
            assert not out[rows].isnan().any() and not lse[rows].isnan().any()


@pytest.mark.gpu
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


@pytest.mark.gpu
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
