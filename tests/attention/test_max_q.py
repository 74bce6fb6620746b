"""A sequence with more new tokens than `max_q` says: all its rows are NaN on every path, and no others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.blocks import cu_seqlens
from kvgather.device import has_gpu, interpreting
from kvgather.lab.trace import trace
from tests.attention.batches import Setup, assert_close, gather_first, hybrid, setup
from tests.attention.rows import cudnn, short_flash, stand_in
from tests.attention.test_direct import attend
from tests.where import CPU, GPU, interpreted, on_each_device

NEW, CACHED = [2, 9, 0, 1, 2], [14, 33, 5, 0, 3]
TOO_MANY = slice(2, 11)  # rows of the second sequence
TRACED_ON = "cuda" if has_gpu() and not interpreting() else "cpu"
CALLS: dict[str, dict[str, Any]] = {
    "gather": {"path": "gather"},
    "window": {"path": "gather", "window": 4},
    "workspace": {"path": "gather", "workspace_tokens": 20},
    "workspace and window": {"path": "gather", "workspace_tokens": 20, "window": 3},
    "direct": {"path": "direct"},
    "direct, window": {"path": "direct", "window": 4},
}


def made_on(where: str, spare: int = 2, **more: Any) -> Setup:
    return setup(NEW, CACHED, heads=(4, 2), dims=(16, 16), device=where, spare=spare, **more)


def assert_refused(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], made: Setup) -> None:
    """The second sequence is NaN, the others are right, and rows of no sequence are empty."""
    out, lse = got
    assert out[TOO_MANY].isnan().all() and lse[TOO_MANY].isnan().all()
    others = torch.ones(made.rows, dtype=torch.bool, device=out.device)
    others[TOO_MANY] = False
    used = out[: made.rows], lse[: made.rows]
    assert_close((used[0][others], used[1][others]), tuple(t[: made.rows][others] for t in wanted))
    assert out[made.rows :].eq(0).all()


@pytest.mark.parametrize("where", [pytest.param("cpu", marks=[pytest.mark.triton, interpreted]), GPU])
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_all_its_rows_are_nan(call: str, q_dtype: torch.dtype, where: str) -> None:
    for max_q, sinks in ((8, None), (2, torch.linspace(-1, 1, 4, device=where))):
        made = made_on(where, q_dtype=q_dtype)
        batch = made.batch(lengths=False, max_q=max_q, max_k=42)
        arguments = {**CALLS[call], "sinks": sinks}
        before = made.cache.key_cache.clone()
        got = made.attend(batch, **arguments)
        slots = made.all_slots[made.is_new][TOO_MANY]
        g = made.cache.geometry
        held = made.cache.key_cache[slots // g.page_size, slots % g.page_size]
        assert torch.equal(held, before[slots // g.page_size, slots % g.page_size]), "nothing was written for it"
        made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
        assert_refused(got, made.wanted(sinks=sinks, window=CALLS[call].get("window")), made)
        with pytest.raises(kg.PlanError, match=rf"sequence 1 has 9 tokens; accepted: at most max_q, {max_q}"):
            batch.check()


@pytest.mark.parametrize("where", [CPU, GPU])
@pytest.mark.parametrize("max_q", [0, 1])
@pytest.mark.parametrize("path", ["gather", "direct"])
def test_one_new_token_or_none(path: str, max_q: int, where: str) -> None:
    """With `max_q=1` no causal mask is launched, with 0 nothing."""
    made = setup([1, 2, 0], [5, 0, 3], heads=(2, 1), device=where, spare=1)
    out, lse = made.attend(made.batch(lengths=False, max_q=max_q), path=path)
    nan = [max_q == 0, True, True, False]
    assert out.isnan().all((1, 2)).tolist() == nan and lse.isnan().all(1).tolist() == nan
    assert out[3].eq(0).all() and lse[3].eq(-math.inf).all()


@on_each_device
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("max_q", [1, 4, 8])
def test_more_rows_than_the_direct_kernel_has_tiles_for(max_q: int, splits: int, where: str) -> None:
    made = setup([40, 1], [20, 7], heads=(4, 2), device=where, spare=3)  # 80 rows of 16
    batch = made.batch(lengths=False, max_q=max_q)
    made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
    wanted = made.wanted()
    out, lse = attend(made, (16, splits), batch=batch)
    assert out[:40].isnan().all() and lse[:40].isnan().all()
    assert_close((out[40:41], lse[40:41]), (wanted[0][40:41], wanted[1][40:41]))
    assert out[41:].eq(0).all() and lse[41:].eq(-math.inf).all()


@on_each_device
def test_the_hybrid_path(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup([2, 9, 1], [14, 33, 9], heads=(2, 1), dims=(16, 16), spare=2, device=where, q_dtype=torch.bfloat16)
    known = made.batch()
    made.attend(known)
    wanted = made.wanted()
    offsets = cu_seqlens([2, 9, 1], where), cu_seqlens(made.total, where)
    lied = kg.PrefixBatch.build(  # the host says 2 new tokens for the second sequence, the device 9
        made.block_table, *offsets, page_size=4, num_blocks=made.cache.geometry.num_blocks, total_q=14,
        total_k=sum(made.total), seqlens_q=[2, 2, 1], seqlens_k=made.total,
    )  # fmt: skip
    gather_first(monkeypatch, 8)
    out, lse = hybrid(made, lied, 16**-0.5)
    assert out[2:11].isnan().all() and lse[2:11].isnan().all()
    assert_close((out[11:12], lse[11:12]), (wanted[0][11:12], wanted[1][11:12]))


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("call", [name for name, call in CALLS.items() if call["path"] == "gather"])
def test_the_kernels_of_a_gpu_leave_them_as_they_are(call: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those launch programs for `max_q` rows; whatever is left of a longer sequence's memory is not returned."""

    stand_in(monkeypatch, **{backend: {"flash": short_flash, "cudnn": cudnn}[backend]})
    made = made_on("cpu", q_dtype=torch.bfloat16)
    got = made.attend(made.batch(lengths=False, max_q=8, max_k=42), **CALLS[call])
    made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
    assert_refused(got, made.wanted(window=CALLS[call].get("window")), made)


@pytest.mark.triton
def test_no_access_is_outside_its_tensor() -> None:
    made = setup([40, 1, 7], [20, 7, 0], heads=(6, 2), dims=(24, 40), device=TRACED_ON, spare=3)
    batch = made.batch(lengths=False, max_q=2)
    with trace(strict=True) as t:
        attend(made, (16, 1), batch=batch)
        attend(made, (16, 2), batch=batch)
    assert not t.violations, t.report()
    stored = [access for access in t.select("out_ptr", kind="store") if access.launch == 0]
    assert sum(int(access.mask.sum()) for access in stored) == 51 * 6 * 40  # every element, and once
