"""Where the rows go: `out=`, its strides, the rows that nothing may touch; and what never shows in them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvgather as kg
from kvgather.cases import Case, build
from kvgather.device import interpreting
from kvgather.formats.layout import LAYOUTS, Geometry, as_nhd
from tests.gather.oracle import assert_same, first_difference, untouched
from tests.where import on_each_device

CASE = Case(page_size=16, num_heads=3, k_dim=16, v_dim=32, lengths=(19, 5), starts=(3, 16), spare_rows=4)
ROWS = CASE.total_tokens
BACKENDS = ("triton", "torch") if interpreting() else ("torch",)


def outs(rows: int = ROWS, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return untouched((rows, 3, 16), dtype, device), untouched((rows, 3, 32), dtype, device)


@on_each_device
def test_rows_past_the_batch_stay_as_they_are(where: str) -> None:
    built = build(CASE, where)
    for backend in ("triton", "torch"):
        out = outs(ROWS + 5, where)
        returned = built.cache.gather(built.plan, out=out, backend=backend)
        assert returned[0] is out[0] and returned[1] is out[1]
        for rows, blank in zip(out, outs(ROWS + 5, where), strict=True):
            assert not first_difference(rows[24:], blank[24:])
            assert first_difference(rows[:24], blank[:24])
        fresh = built.cache.gather(built.plan, backend=backend)
        assert fresh[0].shape == (ROWS, 3, 16) and fresh[1].shape == (ROWS, 3, 32)
        assert_same((out[0][:24], out[1][:24]), (fresh[0][:24], fresh[1][:24]))


STRIDED = {
    "every other row": lambda t: t.new_empty(2 * ROWS, *t.shape[1:])[::2],
    "heads outside": lambda t: t.new_empty(t.shape[1], t.shape[0], t.shape[2]).transpose(0, 1),
    "dims outside": lambda t: t.new_empty(t.shape[2], t.shape[1], t.shape[0]).permute(2, 1, 0),
    "heads of more": lambda t: t.new_empty(t.shape[0], 7, t.shape[2])[:, 2:5],
    "dims of more": lambda t: t.new_empty(*t.shape[:2], 50)[:, :, 1 : 1 + t.shape[2]],
}


@on_each_device
@pytest.mark.parametrize("style", STRIDED)
def test_strided_outputs(style: str, where: str) -> None:
    built = build(CASE, where)
    wanted = outs(device=where)
    built.cache.gather(built.plan, out=wanted, backend="torch")
    for backend in ("triton", "torch"):
        k_out, v_out = (STRIDED[style](rows) for rows in wanted)
        memory = []
        for rows in (k_out, v_out):
            base = rows.as_strided((rows.untyped_storage().nbytes() // 2,), (1,), 0)
            base.copy_(untouched((len(base),), torch.bfloat16, where))
            memory.append(base)
        built.cache.gather(built.plan, out=(k_out, v_out), backend=backend)
        assert_same((k_out, v_out), wanted)
        for base, rows in zip(memory, (k_out, v_out), strict=True):  # and nothing between the rows
            rows.copy_(untouched(tuple(rows.shape), torch.bfloat16, where))
            assert not first_difference(base, untouched((len(base),), torch.bfloat16, where))


def pool_parts() -> dict[str, Any]:
    built = build(Case(lengths=(8,), starts=(), dtype=torch.float32, page_size=8, num_heads=2, k_kind="none"))
    return {"cache": built.cache, "plan": built.plan, "rows": torch.empty(8, 2, 16), "other": torch.empty(8, 2, 16)}


def wrong_outs() -> dict[str, tuple[Any, type[Exception], str]]:
    good = torch.empty(8, 2, 16)
    one = torch.empty(9, 2, 16)
    flat = torch.empty(8 * 2 * 16 + 8)
    return {
        "one tensor": (good, TypeError, r"out is Tensor; accepted: a pair of tensors \(K, V\)"),
        "three": ((good, good, good), TypeError, r"out is tuple; accepted: a pair"),
        "no tensor": ((good, None), TypeError, r"out\[1\] is NoneType None; accepted: a torch.Tensor"),
        "dtype": ((good, good.half()), TypeError, r"out\[1\] has dtype float16; accepted: float32"),
        "rank": ((good.flatten(1), good), ValueError, r"out\[0\] has shape \[8, 32\]; accepted: 3 dimensions"),
        "too few rows": (
            (good[:7], good), ValueError, r"out\[0\] has shape \[7, 2, 16\]; accepted: at least 8 rows of \[2, 16\]"
        ),
        "heads": ((torch.empty(8, 3, 16), good), ValueError, r"out\[0\] has shape \[8, 3, 16\]; accepted: at least 8"),
        "dims": ((good, torch.empty(8, 2, 17)), ValueError, r"out\[1\] has shape \[8, 2, 17\]; accepted: at least 8"),
        "device": ((good.to("meta"), good), ValueError, r"out\[0\] is on meta; accepted: cpu"),
        "itself": ((good, good), ValueError, r"out\[1\] shares memory with a cache, a scale or the other output"),
        "each other": ((one[:8], one[1:]), ValueError, r"out\[1\] shares memory"),
        "expanded": ((good[:1].expand(8, 2, 16), good), ValueError, r"out\[0\] has strides \[0, 16, 1\]; acc"),
        "sliding": (
            (good, flat.as_strided((8, 2, 16), (17, 16, 1))), ValueError, r"out\[1\] has strides .*do not overlap"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_outs())
def test_wrong_outputs(wrong: str) -> None:
    parts = pool_parts()
    out, error, message = wrong_outs()[wrong]
    for backend in BACKENDS:
        with pytest.raises(error, match=message):
            parts["cache"].gather(parts["plan"], out=out, out_dtype=torch.float32, backend=backend)


def test_an_output_inside_the_cache_is_refused() -> None:
    parts = pool_parts()
    inside = parts["cache"].value_cache.view(-1)[: 8 * 2 * 16].view(8, 2, 16)
    for out in ((inside, parts["other"]), (parts["other"], inside)):
        with pytest.raises(ValueError, match=r"shares memory with a cache"):
            parts["cache"].gather(parts["plan"], out=out, out_dtype=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_device
def test_what_a_page_holds_beside_the_rows_never_shows(layout: str, where: str) -> None:
    """NaN in every slot and block that no token is in, and in its scale: the rows do not change."""
    case = Case(
        layout=layout, dtype=torch.bfloat16, k_kind="per-token-head", v_kind="none", lengths=(19, 5), starts=(3, 16)
    )
    built = build(case, where, values="normal")
    cache = built.cache
    wanted = [rows.clone() for rows in cache.gather(built.plan, backend="torch")]
    assert not any(bool(rows.isnan().any()) for rows in wanted)
    used = torch.zeros(cache.num_slots, dtype=torch.bool, device=where)
    for b, (length, start) in enumerate(zip(case.lengths, case.starts, strict=True)):
        for position in range(start, start + length):
            used[int(built.block_table[b, position // 16]) * 16 + position % 16] = True
    unused = ~used.view(-1, 16)  # [blocks, page]
    for which, pool in (("key", cache.key_cache), ("value", cache.value_cache)):
        if layout == "SHUFFLE":
            grouped = pool.permute(0, 3, 1, 2, 4) if which == "key" else pool.permute(0, 2, 4, 1, 3)
            slots = unused if which == "key" else unused.unflatten(1, (-1, pool.shape[4]))
            grouped[slots] = torch.nan
        else:
            as_nhd(pool, layout, "key" if which == "key" else "value")[unused] = torch.nan
    assert cache.k_scale is not None
    cache.k_scale.transpose(1, 2)[unused] = torch.nan
    for backend in ("triton", "torch"):
        assert_same(cache.gather(built.plan, backend=backend), (wanted[0], wanted[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", ["sliced", "padded", "packed", "permuted", "stepped"])
def test_no_pool_is_copied(style: str, layout: str) -> None:
    case = Case(pool_style=style, layout=layout, num_blocks=4096, num_heads=8, k_dim=64, v_dim=64, lengths=(64,))
    case = Case(**{**case.__dict__, "starts": ()})
    built = build(case, "cuda")
    out = tuple(untouched((64, 8, 64), torch.bfloat16, "cuda") for _ in range(2))
    built.cache.gather(built.plan, out=out)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    built.cache.gather(built.plan, out=out)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20 < built.cache.key_cache.numel()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator made anew."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pool_is_copied_on_a_cpu(backend: str) -> None:
    for layout in LAYOUTS if backend == "torch" else ("SHUFFLE",):  # the mode makes the interpreter slow
        built = build(Case(layout=layout, pool_style="stepped", num_blocks=512, lengths=(3,)))
        with LargestTensor() as largest:
            built.cache.gather(built.plan, backend=backend)
        assert 0 < largest.elements <= 2 * 16 * 2 * 16 < built.cache.key_cache.numel()  # two pages of values
    with LargestTensor() as largest:
        built.cache.key_cache.contiguous()
    assert largest.elements == built.cache.key_cache.numel()  # it would have been seen


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, r"backend is 'cuda'; accepted: auto, triton, torch"),
        ({"backend": None}, TypeError, r"backend is NoneType None; accepted: auto, triton, torch"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype is int8; accepted: bfloat16, float16, float32"),
        ({"out_dtype": torch.float8_e5m2}, TypeError, r"out_dtype is float8_e5m2; accepted: bfloat16"),
        ({"out_dtype": torch.float8_e4m3fn}, TypeError, r"or without scales float8_e4m3fn"),
        ({"out_dtype": "bfloat16"}, TypeError, r"out_dtype is .*bfloat16.*; accepted"),
        ({"plan": None}, TypeError, r"plan is NoneType; accepted: a GatherPlan"),
        ({"layout": "SHUFFLED"}, ValueError, r"layout is 'SHUFFLED'; accepted: NHD, HND, SHUFFLE"),
        ({"k_scale": torch.ones(7)}, ValueError, r"k_scale has shape \[7\]; accepted for 2 heads"),
        ({"v_scale": torch.ones(2).half()}, TypeError, r"v_scale has dtype float16; accepted: float32"),
        ({"v_scale": float("nan")}, ValueError, r"v_scale is nan; accepted: finite values above 0"),
        ({"k_kind": "per-token"}, ValueError, r"k_kind is 'per-token'; accepted"),
        ({"v_kind": "per-head"}, ValueError, r"v_scale has shape \[1\]; accepted .* as per-head: \[2\]"),
        ({"key_cache": torch.empty(2, 2)}, ValueError, r"key_cache has shape \[2, 2\]; accepted for layout NHD"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    built = build(Case())
    good: dict[str, Any] = {
        "key_cache": built.cache.key_cache, "value_cache": built.cache.value_cache, "plan": built.plan,
        "layout": "NHD", "k_scale": built.cache.k_scale, "v_scale": built.cache.v_scale,
    }  # fmt: skip
    kg.gather(**good)
    with pytest.raises(error, match=message):
        kg.gather(**{**good, **wrong})


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "k_scale", "v_scale"])
def test_a_cache_whose_memory_went_away_is_refused(name: str) -> None:
    """Engines free their pools when they sleep; the strides that were checked before reach nowhere then."""
    built = build(Case(k_kind="per-token-head", v_kind="per-head"))
    memory = getattr(built.cache, name).untyped_storage()
    memory.resize_(memory.nbytes() - 1)
    with pytest.raises(ValueError, match=rf"{name} with shape .* reaches byte .* of its memory, which has"):
        built.cache.gather(built.plan)


def test_a_cache_is_not_read_again_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its geometry and scales were checked when it was made; to do it again took half of a gather's host time."""
    built = build(Case(k_kind="per-token-head"))
    wanted = built.cache.gather(built.plan)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(sys.modules["kvgather.gather.dispatch"], "resolve", again)
    monkeypatch.setattr(Geometry, "of", again)
    assert_same(built.cache.gather(built.plan), wanted)


def test_k_and_v_scales_are_not_swapped() -> None:
    pool = torch.ones(1, 4, 1, 8)
    plan = kg.GatherPlan.build(torch.tensor([[0]]), torch.tensor([0, 4]), page_size=4, num_blocks=1)
    for backend in BACKENDS:
        k, v = kg.gather(pool, pool, plan, k_scale=2.0, v_scale=3.0, backend=backend)
        assert (k.unique().tolist(), v.unique().tolist()) == ([2.0], [3.0])


def test_an_error_reads_no_value_of_a_tensor() -> None:
    """A tensor that came where none belongs is told by its shape: its values may lie past its memory."""
    gone = torch.ones(2**20)
    gone.untyped_storage().resize_(0)
    built = build(Case())
    for wrong in ({"layout": gone}, {"backend": gone}, {"out_dtype": gone}, {"plan": gone}, {"k_kind": gone}):
        with pytest.raises(TypeError, match=rf"{next(iter(wrong))} is Tensor( of shape \[1048576\])?; accepted"):
            kg.gather(**{"key_cache": built.cache.key_cache, "value_cache": built.cache.value_cache,
                         "plan": built.plan, "layout": "NHD", **wrong})  # fmt: skip
    for name in ("page_size", "total_tokens"):
        sizes = {"page_size": 16, "num_blocks": 4, name: gone}
        with pytest.raises(TypeError, match=rf"{name} is Tensor of shape \[1048576\]; accepted: an int"):
            kg.GatherPlan.build(built.block_table, built.cu_seqlens_k, **sizes)
    with pytest.raises(TypeError, match=r"k_scale is list with tensors; accepted"):
        kg.gather(built.cache.key_cache, built.cache.value_cache, built.plan, k_scale=[gone])
    with pytest.raises(TypeError, match=r"dtype is Tensor of shape \[1048576\]; accepted: float8_e4m3fn"):
        kg.PagedKVCache(2, 16, 1, 16, dtype=gone, device="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_comes_out(backend: str) -> None:
    built = build(Case(dtype=torch.float32, k_kind="per-token-head", num_blocks=2))
    tensors = (built.cache.key_cache, built.cache.value_cache, built.cache.k_scale, built.cache.v_scale)
    wanted = built.cache.gather(built.plan)
    k_cache, v_cache, k_scale, v_scale = (tensor.clone().requires_grad_() for tensor in tensors if tensor is not None)
    rows = kg.gather(k_cache, v_cache, built.plan, k_scale=k_scale, v_scale=v_scale, backend=backend)
    assert not rows[0].requires_grad and not rows[1].requires_grad
    assert_same(rows, wanted)
    for length in (16, 19):  # a full page, and not
        built = build(Case(num_blocks=2, lengths=(length,), starts=()))
        wanted = built.cache.gather(built.plan)
        out = torch.zeros_like(wanted[0], requires_grad=True), torch.zeros_like(wanted[1], requires_grad=True)
        built.cache.gather(built.plan, out=out, backend=backend)
        assert_same((out[0].detach(), out[1].detach()), wanted)
