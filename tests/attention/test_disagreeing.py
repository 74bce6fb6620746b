"""Host lengths that are not the device's: rows may be the wrong ones, `check()` says so, and no index is out of bounds.

On a CPU such an index raises IndexError; on a GPU it trips an assertion that ends the process's context.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import dense, pieces
from kvgather.attention.batch import PrefixBatch
from kvgather.attention.dense import dense_attention
from tests.attention.batches import Setup, assert_close, gather_first, hybrid, setup
from tests.attention.rows import cudnn, made, short_flash, stand_in
from tests.where import GPU

NEW, CACHED = [4, 1, 3], [36, 40, 37]
LIES: dict[str, dict[str, list[int]]] = {  # what the host says; on the device it is NEW and NEW + CACHED
    "new tokens, split otherwise": {"seqlens_q": [1, 6, 1], "seqlens_k": [40, 41, 40]},
    "more new tokens": {"seqlens_q": [4, 4, 3], "seqlens_k": [40, 41, 40]},
    "more new tokens first": {"seqlens_q": [9, 1, 3], "seqlens_k": [40, 41, 40]},
    "fewer new tokens": {"seqlens_q": [1, 1, 1], "seqlens_k": [40, 41, 40]},
    "none where there are some": {"seqlens_q": [0, 8, 0], "seqlens_k": [40, 41, 40]},
    "tokens, split otherwise": {"seqlens_q": NEW, "seqlens_k": [20, 62, 39]},
    "more tokens": {"seqlens_q": NEW, "seqlens_k": [60, 60, 60]},
    "fewer tokens": {"seqlens_q": NEW, "seqlens_k": [4, 5, 6]},
    "both": {"seqlens_q": [8, 8, 8], "seqlens_k": [60, 8, 9]},
}
CALLS: dict[str, dict[str, Any]] = {
    "gather": {"path": "gather"},
    "window": {"path": "gather", "window": 5},
    "workspace": {"path": "gather", "workspace_tokens": 26},
    "small workspace": {"path": "gather", "workspace_tokens": 3},
    "workspace and window": {"path": "gather", "workspace_tokens": 7, "window": 3},
    "direct": {"path": "direct"},
}


def lied(case: Setup, lie: dict[str, list[int]], spare: int = 0) -> PrefixBatch:
    """The batch with other lengths; total_q and total_k are the host's, or what the device needs, if that is more."""
    g = case.cache.geometry
    return PrefixBatch.build(
        case.block_table, *case.offsets, page_size=g.page_size, num_blocks=g.num_blocks,
        total_q=max(sum(lie["seqlens_q"]), case.rows) + spare, total_k=max(sum(lie["seqlens_k"]), sum(case.total)),
        **lie,
    )  # fmt: skip


def call_with(case: Setup, batch: PrefixBatch, **more: Any) -> Tensor:
    q, k, v = (
        torch.cat((rows, rows.new_zeros(batch.total_q - len(rows), *rows.shape[1:])))
        for rows in (case.q, *case.new_tokens())
    )
    out = kg.prefix_attention(q, k, v, case.cache, batch, **more)
    assert isinstance(out, Tensor) and out.shape == (batch.total_q, *case.q.shape[1:])
    return out


def a_case(where: str, q_dtype: torch.dtype) -> Setup:
    case = setup(NEW, CACHED, heads=(4, 2), dims=(16, 16), page_size=4, device=where, q_dtype=q_dtype)
    padding = case.block_table.new_full((3, 6), 10**6)  # room for the lengths that the host says
    case.block_table = torch.cat((case.block_table, padding), 1)
    return case


@pytest.fixture
def kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, flash=short_flash, cudnn=cudnn)
    small_steps(monkeypatch)


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "STEP", 4)  # equal ranges of what is cached in all, by cuDNN
    monkeypatch.setattr(dense, "_CUDNN_KEYS", 4)


@pytest.mark.usefixtures("kernels_of_a_gpu")
@pytest.mark.parametrize("call", [name for name in CALLS if name != "direct"])
@pytest.mark.parametrize("lie", LIES)
def test_no_index_is_out_of_bounds(lie: str, call: str) -> None:
    for spare in (0, 2):
        case = a_case("cpu", torch.bfloat16)
        batch = lied(case, LIES[lie], spare)
        call_with(case, batch, **CALLS[call])
        with pytest.raises(kg.PlanError, match=r"seqlens_[qk]\[\d\] is \d+, and cu_seqlens_[qk] says \d+"):
            batch.check()


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
@pytest.mark.usefixtures("kernels_of_a_gpu")
def test_dense_attention_of_other_lengths(backend: str, lie: str) -> None:
    wrong_rows(backend, LIES[lie], "cpu")


def wrong_rows(backend: str, lie: dict[str, list[int]], where: str) -> None:
    call = made(NEW, [40, 41, 40], "4/2x16", torch.bfloat16, where, spare=60)
    call |= lie | {"max_q": max(lie["seqlens_q"]), "max_k": max(lie["seqlens_k"])}
    for causal in (False, True):
        if backend != "cudnn" or not causal:
            if backend == "cudnn":
                call["seqlens_k"] = [40, 40, 40]
            out, lse = dense_attention(**call, causal=causal, backend=backend)
            assert out.shape == call["q"].shape and lse.shape == out.shape[:2]


@pytest.mark.parametrize("where", [GPU])
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lie", LIES)
def test_the_gpu_goes_on(lie: str, q_dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is waited for, and a batch that tells the truth is right after all of them."""
    small_steps(monkeypatch)
    case = a_case(where, q_dtype)
    for spare in (0, 2):
        for call in CALLS.values():
            call_with(case, lied(case, LIES[lie], spare), **call)
            torch.cuda.synchronize()
    for length in (4, 8):
        gather_first(monkeypatch, length)
        hybrid(case, lied(case, LIES["tokens, split otherwise"]), 0.25)
        torch.cuda.synchronize()
    if q_dtype == torch.bfloat16:
        for backend in ("cudnn", "flash", "torch"):
            wrong_rows(backend, LIES[lie], where)
            torch.cuda.synchronize()
    for call in CALLS.values():
        assert_close(case.attend(case.batch(), **call), case.wanted(window=call.get("window")))
