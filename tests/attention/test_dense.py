"""Dense attention against the reference: plain torch, the calls of the GPU's kernels, and what all of them refuse.

Those kernels have strict ways of their own. Stand-ins that keep to them, in plain torch, show on a CPU that the calls
do too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvgather.attention import dense, dense_gpu
from kvgather.attention.dense import choose_backend, dense_attention, possible
from kvgather.cases import MODELS
from tests.attention.rows import MIXES, assert_right, bound, cudnn, flash, made, offsets, stand_in, wanted

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
    monkeypatch.setattr(dense, "_SCORES", 200)
    for way in ("lengths", "bounds"):
        if way == "bounds":
            monkeypatch.setattr(dense, "_host_offsets", lambda call: None)
        for causal, window in MASKS:
            call = made(*MIXES[mix], spare=2)
            got = dense_attention(**call, causal=causal, window=window)
            assert_right(got, call, wanted(call, *MIXES[mix], causal, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    for causal in (True, False):
        call = made([5, 1], [9, 40], dtype=dtype)
        plain = dense_attention(**call, causal=causal)
        with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else torch.float16):
            cast = dense_attention(**call, causal=causal)
        for got, expected in zip(cast, plain, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)


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


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, None)])
def test_nan_in_a_key_reaches_the_rows_that_see_it(causal: bool, window: int | None) -> None:
    call = made([2, 4, 1], [5, 6, 6])
    call["k"][5 + 3] = torch.nan  # position 3 of the second sequence, whose rows are at 2 to 5
    out, lse = dense_attention(**call, causal=causal, window=window)
    sees = [not causal or (position >= 3 and (window is None or position < 3 + window)) for position in range(2, 6)]
    assert out[2:6].isnan().all((1, 2)).tolist() == lse[2:6].isnan().all(1).tolist() == sees
    assert int(out.isnan().sum()) == sum(sees) * 4 * 16 and int(lse.isnan().sum()) == sum(sees) * 4


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
        ({"cu_seqlens_k": offsets([7], "cpu")}, ValueError, r"cu_seqlens_k has shape \[2\]; accepted: .* cu_seqlens_q, 3"),
        ({"seqlens_q": [5]}, ValueError, r"seqlens_q has 1 lengths; accepted: 2"),
        ({"seqlens_k": [4, 4]}, ValueError, r"seqlens_k sum to 8; accepted: at most the rows of k, 7"),
        ({"max_q": -1}, ValueError, r"max_q is -1; accepted: 0 to"),
        ({"softmax_scale": math.inf}, ValueError, r"softmax_scale is inf; accepted: a finite number"),
        ({"window": 0}, ValueError, r"window is 0; accepted: 1 to"),
        ({"window": 4, "causal": False}, ValueError, r"window is 4, and causal False; accepted: a window with causal"),
        ({"backend": "best"}, ValueError, r"backend is 'best'; accepted: auto, cudnn, flash, torch"),
        ({"backend": "flash"}, ValueError, r"'flash'; accepted here: torch, because the kernel runs on a GPU"),
        ({"backend": "cudnn"}, ValueError, r"'cudnn'; accepted here: torch, because the kernel runs on a GPU"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    dense_attention(**GOOD)
    with pytest.raises(error, match=message):
        dense_attention(**{**GOOD, **wrong})


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, flash=flash, cudnn=cudnn)


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
    assert [dense_gpu._padded_rows(n) for n in (1, 2, 3, 17, 64, 65, 128, 129, 257)] == [
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
    with pytest.raises(ValueError, match=r"accepted here: torch, because its head dims are at most 256, .* 12 and 264"):
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
