"""Calls like one before: which ones repeat its launches from addresses alone, and from which addresses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import direct, prefix
from kvgather.attention.direct import Tile
from kvgather.batch.share import Share
from kvgather.kernels.guards import guard_of
from kvgather.kernels.launch import PreparedLaunch
from kvgather.parallel.exchange import Exchange
from tests.attention.batches import Setup, assert_close, setup
from tests.where import interpreted, on_each_device

pytestmark = pytest.mark.triton
Launch = tuple[str, int, tuple[Any, ...], tuple[int, ...]]
"""A kernel's name, programs, addresses and numbers."""


def made_of(splits: int, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> Setup:
    monkeypatch.setattr(direct, "tile_of", lambda *_: Tile(16, 16, 4, 2, splits))
    return setup(
        [3, 0, 2], [17, 4, 30], heads=(4, 2), dims=(16, 8), page_size=16, dtype=torch.float8_e4m3fn, spare=1,
        device=device,
    )  # fmt: skip


@on_each_device
@pytest.mark.parametrize("want_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_repeated_call_returns_what_a_first_one_does(
    splits: int, has_sinks: bool, want_lse: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(splits, monkeypatch, where)
    sinks = torch.linspace(-1, 1, 4, device=where) if has_sinks else None
    repeated: list[bool] = []
    again = PreparedLaunch.again

    def counted(self: PreparedLaunch, *launch: Any) -> bool:
        repeated.append(again(self, *launch))
        return repeated[-1]

    monkeypatch.setattr(PreparedLaunch, "again", counted)

    def call(q: Tensor, batch: Any) -> list[Tensor]:
        result: Any = kg.prefix_attention(
            q, *made.new_tokens(), made.cache, batch, None, sinks, path="direct", return_lse=want_lse
        )
        return list(result) if want_lse else [result]

    batch, other = made.batch(), made.q.flip(0).contiguous()
    call(made.q, batch)
    repeated.clear()
    for q in (other, made.q):
        for got, expected in zip(call(q, batch), call(q, made.batch()), strict=True):
            assert torch.equal(got, expected)
    # Kernels are launched from addresses alone where they are compiled.
    assert any(repeated) is (where == "cuda")


@interpreted
@pytest.mark.parametrize("into", [False, True], ids=["returned", "stored"])
@pytest.mark.parametrize("want_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_repeated_call_launches_what_the_first_one_does(
    splits: int, has_sinks: bool, want_lse: bool, into: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if into and not want_lse:
        return  # a state has a log-sum-exp
    made = made_of(splits, monkeypatch)
    batch, (k, v) = made.batch(share=Share(0, 2) if into else None), made.new_tokens()
    sinks = torch.zeros(4) if has_sinks else None
    exchange = Exchange(Share(0, 2), batch.device)

    def call() -> tuple[Tensor, Tensor | None]:
        if into:
            prefix.partial_state(made.q, k, v, made.cache, batch, None, sinks, None, None, "direct", exchange)
            return exchange.form.view(exchange.buffers, 0)
        result: Any = kg.prefix_attention(
            made.q, k, v, made.cache, batch, None, sinks, path="direct", return_lse=want_lse
        )
        return result if want_lse else (result, None)

    by_tensors: list[Launch] = []
    launch = PreparedLaunch.__call__

    def launched(self: PreparedLaunch, programs: int, tensors: Any, addresses: Any, numbers: Any) -> None:
        by_tensors.append((self._kernel.fn.__name__, programs, addresses, numbers))
        launch(self, programs, tensors, addresses, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(PreparedLaunch, "__call__", launched)
        call()
    by_addresses: list[Launch] = []

    def again(self: PreparedLaunch, programs: int, addresses: Any, numbers: Any) -> bool:
        by_addresses.append((self._kernel.fn.__name__, programs, addresses, numbers))
        return True

    monkeypatch.setattr(PreparedLaunch, "again", again)
    out, lse = call()
    kernels = ["direct_kernel", "combine_kernel"][: 1 if splits == 1 else 2]  # new tokens are written in torch here
    assert [name for name, *_ in by_addresses] == [name for name, *_ in by_tensors] == kernels
    for ours, theirs in zip(by_addresses, by_tensors, strict=True):
        assert (ours[1], ours[3]) == (theirs[1], theirs[3])
    ours, theirs = by_addresses[0][2], by_tensors[0][2]
    assert ours[:6] == theirs[:6] and ours[10:] == theirs[10:] and ours[6:8] == ours[8:10]
    results = out.data_ptr(), None if lse is None else lse.data_ptr()
    if splits == 1:
        assert ours[8] == results[0] and (lse is None or ours[9] == results[1])
    else:
        combined = by_addresses[1][2]
        assert combined[:2] == ours[8:10] and combined[3] == results[0] and (lse is None or combined[4] == results[1])
        assert combined[2] == by_tensors[1][2][2] and all(address % 16 == 0 for address in combined)


@interpreted
def test_a_repeated_write_launches_what_the_first_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(1, monkeypatch)
    (k, v), slots = made.new_tokens(), made.batch().slots
    by_tensors: list[Any] = []
    by_addresses: list[Any] = []
    launch = PreparedLaunch.__call__

    def launched(self: PreparedLaunch, programs: int, tensors: Any, addresses: Any, numbers: Any) -> None:
        at = tuple(tensor.data_ptr() for tensor in tensors)
        assert at == addresses
        by_tensors.append((programs, at, numbers))
        launch(self, programs, tensors, addresses, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(PreparedLaunch, "__call__", launched)
        made.cache.write(k, v, slots, backend="triton")
    monkeypatch.setattr(PreparedLaunch, "again", lambda self, *launch: by_addresses.append(launch) or True)
    made.cache.write(k, v, slots, backend="triton")
    assert by_addresses == by_tensors and len(by_tensors) == 1


def shifted(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@interpreted
def test_what_tells_two_calls_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that needs another kernel, or has not passed the checks, does not repeat the launches of the first."""
    made = made_of(1, monkeypatch)
    batch, (k, v), sinks = made.batch(), made.new_tokens(), torch.zeros(4)

    def checked(q: Tensor = made.q, sinks: Tensor | None = sinks, **more: Any) -> Any:
        options = {"softmax_scale": None, "window": None, "workspace_tokens": None, "path": "direct"} | more
        return prefix._checked_call(q, k, v, made.cache, batch, sinks=sinks, **options)

    first = checked()
    assert checked(made.q.clone(), sinks.clone()) is first
    wide = torch.zeros(len(made.q), 8, 16)[:, ::2]
    variants = {
        "q's address": checked(shifted(made.q)), "q's strides": checked(wide), "q's dtype": checked(made.q.bfloat16()),
        "the sinks' address": checked(sinks=shifted(sinks)), "the sinks' dtype": checked(sinks=sinks.bfloat16()),
        "no sinks": checked(sinks=None), "the window": checked(window=5), "the scale": checked(softmax_scale=0.5),
    }  # fmt: skip
    assert [name for name, call in variants.items() if call is first] == []
    assert len({id(call) for call in variants.values()}) == len(variants)
    assert [checked(shifted(made.q)), checked(sinks=shifted(sinks))] == [*variants.values()][0:4:3]
    assert checked() is first
    made.q.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=r"q with shape .* reaches byte"):
        checked()


@interpreted
def test_few_kinds_of_tensors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are checked by their signatures."""
    made = made_of(1, monkeypatch)
    batch = made.batch()
    for rows in range(2 * prefix.MOST_KNOWN):
        q = torch.zeros(len(made.q), 4 + rows, 16)[:, :4]
        for _ in range(2):
            kg.prefix_attention(q, None, None, made.cache, batch, path="direct")
    (kept,) = [calls for key, calls in batch._host_decisions.items() if key[0] == "known"]
    assert len(kept) == prefix.MOST_KNOWN


@interpreted
def test_a_moved_table_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(1, monkeypatch)
    batch = made.batch()
    for _ in range(2):
        kg.prefix_attention(made.q, *made.new_tokens(), made.cache, batch, path="direct")
    table = batch.block_table.clone()
    batch.block_table.set_(table)
    table_at: list[int] = []
    monkeypatch.setattr(PreparedLaunch, "again", lambda self, programs, addresses, numbers: table_at.append(
        addresses[1]) or False)  # fmt: skip
    got = kg.prefix_attention(made.q, *made.new_tokens(), made.cache, batch, path="direct", return_lse=True)
    assert table.data_ptr() in table_at
    assert_close(got, made.wanted(), made.rows)


def test_a_guard_is_created_once_for_tensors_that_are_alike() -> None:
    one, other = torch.zeros(2, 3), torch.zeros(3)
    found = guard_of((one, other))
    assert found is not None and found is guard_of((one.clone(), other.clone()))
    assert found(one, other) and not found(other, one) and not found(one, None)
    assert guard_of((one, one)) is None
    with torch.inference_mode():
        inside = torch.zeros(2, 3), torch.zeros(3)
        found = guard_of(inside)
        assert found is not None and found(*inside)
