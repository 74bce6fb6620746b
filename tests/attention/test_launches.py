"""Prepared launches of the attention: what is launched by addresses is what is launched by tensors, and what tells
two calls apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import prefix
from kvgather.attention.direct import DirectCall, Tile
from kvgather.batch.contents import Sizes
from kvgather.batch.reference import batch_tensors, window_offsets
from kvgather.batch.refused import refuse_rows
from kvgather.kernels.launch import PreparedLaunch
from tests.attention.batches import Setup, assert_close, setup
from tests.attention.direct_cases import filled
from tests.attention.test_direct import attend
from tests.where import CPU, GPU, on_each_device

pytestmark = pytest.mark.triton


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far; each launch's addresses are compared with its tensors."""
    names: list[str] = []
    call = PreparedLaunch.__call__

    def checked(self: PreparedLaunch, programs: int, tensors: Any, addresses: Any, numbers: Any) -> None:
        at = [tensor.data_ptr() if isinstance(tensor, Tensor) else tensor for tensor in tensors]
        assert at == list(addresses), self._kernel
        arguments = len(tensors) + len(numbers) + len(self._strides)
        names_of_constants = list(self._kernel.arg_names[arguments:])
        assert [name for name in self._kernel.arg_names if name in self._constants] == names_of_constants
        names.append(self._kernel.fn.__name__)
        call(self, programs, tensors, addresses, numbers)

    monkeypatch.setattr(PreparedLaunch, "__call__", checked)
    monkeypatch.setattr(PreparedLaunch, "again", lambda *_: False)
    return names


@on_each_device
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("extra", ["nothing", "sinks", "begin", "state", "all"])
def test_addresses_are_those_of_the_tensors(extra: str, splits: int, where: str, launched: list[str]) -> None:
    made = filled([3, 0, 2], [17, 4, 3], heads=(2, 1), dims=(16, 5), kinds=("per-token-head", "per-tensor"),
                  dtype=torch.float8_e4m3fn, device=where, spare=1)  # fmt: skip
    rows, more = len(made.q), {}
    if extra in ("sinks", "all"):
        more["sinks"] = torch.zeros(2, device=where)
    if extra in ("begin", "state", "all"):
        more["begin"] = torch.tensor([5, 0, 0], dtype=torch.int32, device=where)
    if extra in ("state", "all"):
        more["state"] = torch.zeros(rows, 2, 5, device=where), torch.zeros(rows, 2, device=where)
    attend(made, (16, splits), **more)
    kernels = [name for name in launched if name in ("direct_kernel", "combine_kernel")]
    assert kernels == (["direct_kernel"] if splits == 1 else ["direct_kernel", "combine_kernel"])


@on_each_device
def test_addresses_of_the_small_kernels(where: str, launched: list[str]) -> None:
    for batch in (1, 3, 6):
        offsets = torch.arange(batch + 1, device=where)
        table = torch.zeros(batch, 5, dtype=torch.int64, device=where)
        made = batch_tensors(table, offsets, offsets * 7, Sizes(4, 9, batch + 1, 7 * batch, 1, 20), "triton")
        window_offsets(made.cu_q, made.cu_k, 1, 3, 100, "triton")
        out, lse = torch.zeros(batch, 2, 5, device=where), torch.zeros(batch, 2, device=where)
        refuse_rows(out, lse, made.cu_q, 0, "triton")
        assert out.isnan().all() and lse.isnan().all()
    assert launched == ["batch_kernel", "window_kernel", "refuse_rows_kernel"] * 3


def call_of(made: Setup, batch: kg.PrefixBatch, **more: Any) -> DirectCall:
    fields: dict[str, Any] = {
        "q": made.q, "cache": made.cache, "batch": batch, "sinks": None, "window": None, "begin": None, "state": None,
        "tile": Tile(16, 16, 4, 2, 1), "interpreted": True,
    }  # fmt: skip
    fields |= more
    return DirectCall(**fields, likeness=fields["cache"].likeness)


def signed(call: DirectCall) -> object:
    tensors = call.tensors()
    return call.signature([0 if tensor is None else tensor.data_ptr() for tensor in tensors], call.tiles)


def shifted(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16."""
    step = 4 // tensor.element_size() or 1
    memory = torch.empty(tensor.numel() + step, dtype=tensor.dtype, device=tensor.device)
    return memory[step:].view(tensor.shape).copy_(tensor)


def test_calls_that_need_another_kernel_are_told_apart() -> None:
    from dataclasses import replace

    made = filled([3, 2], [17, 3], heads=(4, 2), dims=(16, 16), dtype=torch.float8_e4m3fn)
    batch = made.batch()
    base = call_of(made, batch)
    state = torch.zeros(5, 4, 16), torch.zeros(5, 4)
    begin, sinks = torch.zeros(2, dtype=torch.int32), torch.zeros(4)
    cache = made.cache
    pools = {"layout": "NHD", "k_scale": cache.k_scale, "v_scale": cache.v_scale}

    def other(key: Tensor, value: Tensor, **more: Any) -> kg.PagedKVCache:
        return kg.PagedKVCache.from_tensors(key, value, **{**pools, **more})

    key, value = cache.key_cache, cache.value_cache
    wide = torch.zeros(2 * key.shape[0], *key.shape[1:]).to(key.dtype)
    variants: dict[str, DirectCall] = {
        "tile": call_of(made, batch, tile=Tile(16, 32, 4, 2, 1)),
        "splits": call_of(made, batch, tile=Tile(16, 16, 4, 2, 2)),
        "window": call_of(made, batch, window=3),
        "interpreter": call_of(made, batch, interpreted=False),
        "q's dtype": call_of(made, batch, q=made.q.bfloat16()),
        "q's heads": call_of(made, batch, q=made.q[:, :2].contiguous()),
        "q's strides": call_of(made, batch, q=torch.zeros(5, 8, 16)[:, ::2]),
        "q's address": call_of(made, batch, q=shifted(made.q)),
        "begin": call_of(made, batch, begin=begin),
        "begin's address": call_of(made, batch, begin=shifted(begin)),
        "state": call_of(made, batch, begin=begin, state=state),
        "state's dtype": call_of(made, batch, begin=begin, state=(state[0].bfloat16(), state[1])),
        "state's address": call_of(made, batch, begin=begin, state=(shifted(state[0]), state[1])),
        "its log-sum-exp's address": call_of(made, batch, begin=begin, state=(state[0], shifted(state[1]))),
        "sinks": call_of(made, batch, sinks=sinks),
        "sinks' dtype": call_of(made, batch, sinks=sinks.bfloat16()),
        "sinks' address": call_of(made, batch, sinks=shifted(sinks)),
        "the table's address": call_of(made, replace(batch, block_table=shifted(batch.block_table))),
        "offsets' address": call_of(made, replace(batch, cu_seqlens_q=shifted(batch.cu_seqlens_q))),
        "further offsets' address": call_of(made, replace(batch, cu_seqlens_k=shifted(batch.cu_seqlens_k))),
        "K's strides": call_of(made, batch, cache=other(wide[::2], value)),
        "V's strides": call_of(made, batch, cache=other(key, wide[::2])),
        "K's address": call_of(made, batch, cache=other(shifted(key), value)),
        "V's address": call_of(made, batch, cache=other(key, shifted(value))),
        "pools' dtype": call_of(made, batch, cache=other(key.float(), value.float(), k_scale=None, v_scale=None)),
        "the FP8 format": call_of(made, batch, cache=other(*(p.float().to(torch.float8_e5m2) for p in (key, value)))),
        "K's scale": call_of(made, batch, cache=other(key, value, k_scale=torch.ones(2))),
        "V's scale": call_of(made, batch, cache=other(key, value, v_scale=torch.ones(key.shape[0], 2))),
        "no scale": call_of(made, batch, cache=other(key, value, v_scale=None)),
        "the layout": call_of(made, batch, cache=other(key.transpose(1, 2), value.transpose(1, 2), layout="HND")),
    }  # fmt: skip
    signatures = {"the base": signed(base), **{name: signed(call) for name, call in variants.items()}}
    same = [
        (one, other) for i, (one, first) in enumerate(signatures.items())
        for other, second in list(signatures.items())[:i] if first == second
    ]  # fmt: skip
    assert not same
    assert signed(base) == signed(call_of(made, made.batch(), q=made.q.clone()))
    assert hash(signed(base)) == hash(signed(call_of(made, made.batch())))


@pytest.mark.parametrize("where", [CPU, GPU])
@pytest.mark.parametrize("path", ["gather", "direct"])
def test_a_call_like_one_before_is_checked_for_what_may_differ(path: str, where: str) -> None:
    made = setup([5, 1], [4, 19], heads=(4, 2), device=where)
    batch, (k, v) = made.batch(), made.new_tokens()
    sinks = torch.zeros(4, device=where)

    def call(**more: Any) -> Any:
        arguments = {"q": made.q, "k_new": k, "v_new": v, "cache": made.cache, "batch": batch, "path": path,
                     "sinks": sinks, "window": 1, "softmax_scale": 1, "return_lse": True}  # fmt: skip
        return kg.prefix_attention(**{**arguments, **more})

    for _ in range(2):
        assert_close(call(), made.wanted(raw=True, window=1, sinks=sinks, softmax_scale=1.0))
    for wrong, error, message in (
        ({"window": True}, TypeError, "window is bool True"),
        ({"window": 1.0}, TypeError, "window is float 1.0"),
        ({"softmax_scale": True}, TypeError, "softmax_scale is bool True"),
        ({"workspace_tokens": 0}, ValueError, "workspace_tokens is 0"),
        ({"path": ["direct"]}, TypeError, r"path is list \['direct'\]"),
        ({"q": made.q.double()}, TypeError, "q has dtype float64"),
        ({"q": made.q[:5]}, ValueError, r"q has shape \[5, 4, 8\]"),
        ({"q": made.q.tolist()}, TypeError, "q is list"),
        ({"q": made.q.to_sparse()}, ValueError, "q has layout torch.sparse_coo"),
        ({"k_new": k[:, :, :7]}, ValueError, r"k_new has shape \[6, 2, 7\]"),
        ({"k_new": None}, TypeError, "k_new is None and v_new is not"),
        ({"v_new": v.int()}, TypeError, "v_new has dtype int32"),
        ({"sinks": sinks.int()}, TypeError, "sinks has dtype int32"),
        ({"sinks": sinks[:3]}, ValueError, r"sinks has shape \[3\]"),
        ({"cache": None}, TypeError, "cache is NoneType None"),
        ({"batch": None}, TypeError, "batch is NoneType None"),
    ):
        with pytest.raises(error, match=message):
            call(**wrong)
    other = setup([5, 1], [4, 19], heads=(4, 2), page_size=8, device=where)
    with pytest.raises(ValueError, match="batch was made for page_size 4; accepted: the cache's, 8"):
        call(cache=other.cache)
    for name in ("q", "k_new", "v_new", "sinks"):
        tensor = {"q": made.q, "k_new": k, "v_new": v, "sinks": sinks}[name].clone()
        call(**{name: tensor})
        tensor.untyped_storage().resize_(8)
        with pytest.raises(ValueError, match=f"{name} with shape .* reaches byte"):
            call(**{name: tensor})
    assert_close(call(), made.wanted(raw=True, window=1, sinks=sinks, softmax_scale=1.0))


def test_arguments_are_checked_once_for_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup([5, 1], [4, 19])
    batch, checks = made.batch(), []
    check = prefix._check_tensors
    monkeypatch.setattr(prefix, "_check_tensors", lambda *arguments: (checks.append(arguments), check(*arguments)))
    for _ in range(3):
        made.attend(batch)
    made.attend(batch, window=3)
    assert len(checks) <= 4, "new tokens are copied anew for each call, and may be at another kind of address"
    tokens = made.new_tokens()
    checks.clear()
    for _ in range(3):
        kg.prefix_attention(made.q, *tokens, made.cache, batch, window=5)
    assert len(checks) == 1


@on_each_device
@pytest.mark.parametrize("name", ["key_cache", "value_cache", "k_scale", "v_scale"])
@pytest.mark.parametrize("path", ["gather", "direct"])
def test_a_cache_whose_memory_went_away_is_refused(path: str, name: str, where: str) -> None:
    made = filled([3, 2], [17, 3], ("per-token-head", "per-page-head"), dtype=torch.float8_e4m3fn, device=where)
    batch = made.batch()
    for _ in range(2):
        kg.prefix_attention(made.q, None, None, made.cache, batch, path=path)
    getattr(made.cache, name).untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=f"{name} with shape .* reaches byte"):
        kg.prefix_attention(made.q, None, None, made.cache, batch, path=path)


@pytest.mark.gpu
@pytest.mark.parametrize(("cached", "kernels"), [(40, 2), (5000, 3)])
def test_a_decode_step_is_a_write_and_one_or_two_launches(cached: int, kernels: int) -> None:
    """Keys that are split over programs are merged by a launch of their own."""
    made = setup(
        [1, 1], [cached] * 2, heads=(8, 1), dims=(64, 64), page_size=16, dtype=torch.float8_e4m3fn,
        q_dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    batch, tokens = made.batch(), made.new_tokens()

    def step() -> None:
        kg.prefix_attention(made.q, *tokens, made.cache, batch, path="direct", sinks=None)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events]
    assert len(names) == kernels and "scatter_kernel" in names[0] and "direct_kernel" in names[1], names


def test_caches_that_are_alike_have_one_number() -> None:
    """So that the layers of a model share what was checked and prepared."""

    def cache(**more: Any) -> kg.PagedKVCache:
        return kg.PagedKVCache(
            **{"num_blocks": 9, "page_size": 4, "num_kv_heads": 2, "head_dim": 8, "device": "cpu", **more}
        )

    one, other = cache(), cache()
    assert one.likeness == one.likeness == other.likeness
    different = [cache(num_blocks=8), cache(page_size=8), cache(dtype=torch.float8_e5m2), cache(layout="HND"),
                 cache(scale="per-head"), cache(scale=("per-tensor", "none"))]  # fmt: skip
    assert len({one.likeness, *(each.likeness for each in different)}) == 7
    scale = torch.ones(1)
    shared = kg.PagedKVCache.from_tensors(one.key_cache, other.value_cache, layout="NHD", k_scale=scale, v_scale=scale)
    assert shared.likeness == one.likeness == shared.likeness
    number = one.likeness
    one.value_cache = torch.zeros_like(one.value_cache)
    assert one.likeness == number, "another tensor, which is alike"
    one.value_cache.data = torch.zeros(9, 4, 2, 16, dtype=one.value_cache.dtype)[..., :8]
    assert one.likeness != number, "other strides"
    one.value_cache.transpose_(0, 1)
    with pytest.raises(ValueError, match="value_cache has 4 blocks, page 9, 2 heads; accepted: the sizes of key_cache"):
        one.likeness  # noqa: B018
