"""Which heads a rank holds, its part of the scales, and its pools: as one process' pools, bit by bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

from kvgather import GatherPlan, PagedKVCache, cli
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS, kind_shape
from kvgather.parallel.heads import heads_of, scale_of_heads
from kvgather.serving import Options
from kvgather.serving import serve as server
from kvgather.serving.cache import cache_of
from kvgather.serving.models import CONFIGS
from kvgather.serving.tensor_parallel import plan_of

BLOCKS, PAGE, HEADS, DIM = 5, 16, 6, 32
HEAD_AXIS = {"NHD": 2, "HND": 1, "SHUFFLE": 1}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WITH_HEADS = ("per-head", "per-page-head", "per-token-head")


def scale_of(kind: str) -> Tensor | None:
    """Another value for every entry."""
    if kind == "none":
        return None
    shape = kind_shape(kind, BLOCKS, HEADS, PAGE) or (1,)
    return torch.linspace(0.02, 0.9, int(torch.tensor(shape).prod())).reshape(shape)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """K and V `[n, heads, dim]` of 40 tokens, and their slots, two of them padding."""
    k, v = torch.randn(2, 40, HEADS, DIM) * 3
    slots = torch.randperm(BLOCKS * PAGE)[:40]
    slots[[3, 17]] = -1
    return k, v, slots


def filled(k: Tensor, v: Tensor, slots: Tensor, layout: str, dtype: torch.dtype, kind: str, scale: Any) -> PagedKVCache:
    cache = PagedKVCache(
        BLOCKS, PAGE, k.shape[1], DIM, layout=layout, dtype=dtype, scale=kind, k_scale=scale,
        v_scale=None if scale is None else scale.flip(0) if kind != "per-head" else scale, device="cpu",
    )  # fmt: skip
    cache.write(k, v, slots)
    return cache


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_hold_consecutive_heads_and_together_all(ranks: int) -> None:
    held = [heads_of(HEADS, rank, ranks) for rank in range(ranks)]
    assert [head for heads in held for head in heads] == list(range(HEADS))
    assert {len(heads) for heads in held} == {HEADS // ranks}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, 0, 3), ValueError, "num_kv_heads is 8; accepted for 3 ranks: a multiple of 3"),
        ((1, 1, 2), ValueError, "num_kv_heads is 1; accepted for 2 ranks: a multiple of 2"),
        ((8, 2, 2), ValueError, "rank is 2"),
        ((8, -1, 2), ValueError, "rank is -1"),
        ((8, 0, 0), ValueError, "ranks is 0"),
        ((0, 0, 1), ValueError, "num_kv_heads is 0"),
        ((8.0, 0, 1), TypeError, "num_kv_heads is float 8.0; accepted: an int"),
    ],
)
def test_heads_that_no_rank_can_hold(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        heads_of(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ranks_pool_is_the_slice_of_one_process_pool(layout: str, kind: str, dtype: torch.dtype, ranks: int) -> None:
    """Bytes, computed scales and gathered rows."""
    k, v, slots = tokens()
    scale = scale_of(kind)
    whole = filled(k, v, slots, layout, dtype, kind, None if scale is None else scale.clone())
    plan = GatherPlan.build(
        torch.arange(BLOCKS).view(1, -1), torch.tensor([0, BLOCKS * PAGE]), page_size=PAGE, num_blocks=BLOCKS
    )
    rows = whole.gather(plan, torch.float32)
    for rank in range(ranks):
        heads = heads_of(HEADS, rank, ranks)
        part = slice(heads.start, heads.stop)
        own = scale_of_heads(None if scale is None else scale.clone(), kind, heads, num_kv_heads=HEADS)
        mine = filled(k[:, part], v[:, part], slots, layout, dtype, kind, own)
        for pool, all_heads in ((mine.key_cache, whole.key_cache), (mine.value_cache, whole.value_cache)):
            expected = all_heads.narrow(HEAD_AXIS[layout], heads.start, len(heads))
            assert pool.view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
        for mine_scale, all_scale in ((mine.k_scale, whole.k_scale), (mine.v_scale, whole.v_scale)):
            if kind in WITH_HEADS:
                assert mine_scale is not None and all_scale is not None
                assert mine_scale.equal(scale_of_heads(all_scale, kind, heads))
        for got, expected in zip(mine.gather(plan, torch.float32), rows, strict=True):
            assert got.equal(expected[:, part])


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_a_scale_that_was_not_sliced_or_sliced_twice_is_refused(kind: str) -> None:
    scale, heads = scale_of(kind), heads_of(HEADS, 1, 2)
    assert scale is not None
    with pytest.raises(ValueError, match=r"k_scale has shape .*; accepted for 3 heads"):
        PagedKVCache(BLOCKS, PAGE, len(heads), DIM, dtype=FP8[0], scale=kind, k_scale=scale, device="cpu")
    sliced = scale_of_heads(scale, kind, heads)
    PagedKVCache(BLOCKS, PAGE, len(heads), DIM, dtype=FP8[0], scale=kind, k_scale=sliced, v_scale=sliced, device="cpu")
    for number in (None, HEADS):
        with pytest.raises(ValueError, match=rf"k_scale has shape .*; accepted for kind {kind} and range\(3, 6\)"):
            scale_of_heads(sliced, kind, heads, num_kv_heads=number, name="k_scale")
    with pytest.raises(ValueError, match=r"before it is sliced: a tensor of shape \[(blocks, )?6"):
        scale_of_heads(sliced, kind, heads_of(HEADS, 0, 2), num_kv_heads=HEADS)


@pytest.mark.parametrize("kind", ["per-head", "per-page-head"])
def test_the_slice_of_another_rank_has_the_right_shape_and_gives_other_codes(kind: str) -> None:
    """No shape tells it; the bytes do."""
    (k, v, slots), scale = tokens(), scale_of(kind)
    right, wrong = (scale_of_heads(scale, kind, heads_of(HEADS, rank, 2)) for rank in (1, 0))
    caches = [filled(k[:, 3:], v[:, 3:], slots, "NHD", FP8[0], kind, own) for own in (right, wrong)]
    codes = [cache.key_cache.view(torch.uint8) for cache in caches]
    written = codes[0] != 0
    assert float((codes[0] != codes[1])[written].float().mean()) > 0.9


def test_a_scale_without_heads_is_shared() -> None:
    one = torch.ones(1)
    heads = heads_of(HEADS, 1, 2)
    assert scale_of_heads(one, "per-tensor", heads) is one and scale_of_heads(0.5, "per-tensor", heads) == 0.5
    assert scale_of_heads(None, "none", heads) is scale_of_heads(None, "per-head", heads) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [[0, 1], (0, 2), slice(0, 2), "01", None])
def test_heads_are_a_range(heads: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=r"heads is .*; accepted: a range, from heads_of\("):
        scale_of_heads(scale_of(kind), kind, heads)


def test_a_slice_is_a_view_with_its_strides() -> None:
    scale = torch.ones(BLOCKS, PAGE, HEADS).transpose(1, 2)
    part = scale_of_heads(scale, "per-token-head", heads_of(HEADS, 2, 3))
    assert part.shape == (BLOCKS, 2, PAGE) and part.stride() == scale.stride()
    assert part.data_ptr() == scale[:, 4:].data_ptr()


@pytest.mark.parametrize(
    ("scale", "kind", "heads", "error", "message"),
    [
        (0.5, "per-head", range(3), TypeError, r"scale is float 0.5; accepted for kind per-head and range\(0, 3\)"),
        (torch.ones(5, 6), "per-head", range(3), ValueError, r"scale has shape \[5, 6\]; .* shape \[3 or more\]"),
        (torch.ones(6), "per-page-head", range(3), ValueError, r"scale has shape \[6\]; .* \[blocks, 3 or more\]"),
        (torch.ones(6), "per-head", range(0, 6, 2), ValueError, r"heads is range\(0, 6, 2\); accepted: consecutive"),
        (torch.ones(6), "per-head", range(2, 2), ValueError, "accepted: consecutive heads"),
        (torch.ones(6), "per-block", range(3), ValueError, "kind is 'per-block'; accepted: none, per-tensor"),
    ],
)
def test_wrong_slices(scale: Any, kind: str, heads: range, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scale_of_heads(scale, kind, heads)


class Rank(SimpleNamespace):
    """What the engine's cache asks of its ranks, without ranks."""

    sharded = True

    def are_kv_heads_tp_ed(self) -> bool:
        return self.sharded

    def tp_all_reduce_min(self, value: Tensor) -> Tensor:
        return value


def cache_on(rank: Rank, options: Options) -> Any:
    sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=4, max_batch_tokens=64)
    sizes.max_requests_per_batch, sizes.max_blocks_per_request, sizes.max_memory_percent = 4, 0, 0.5
    return cache_of(options)(
        config=CONFIGS["tiny-6"](), continuous_batching_config=sizes, device=torch.device("cpu"),
        distributed_helper=rank, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engines_pools_have_the_heads_of_the_rank_and_their_scales(layout: str) -> None:
    scale = torch.linspace(0.1, 0.6, HEADS)
    options = Options(layout=layout, scale="per-head", k_scale=scale, v_scale=scale)
    cache = cache_on(Rank(tp_size=3, tp_local_rank=2), options)
    assert cache.heads == range(4, 6) and cache.options.k_scale is scale
    for layer in range(2):
        pool = cache.layer_pool(layer)
        assert (pool.geometry.num_kv_heads, pool.k_kind) == (2, "per-head")
        assert pool.k_scale.tolist() == pool.v_scale.tolist() == scale[4:].tolist()


def test_a_plan_that_leaves_the_attention_whole_leaves_all_heads_on_every_rank() -> None:
    scale = torch.linspace(0.1, 0.6, HEADS)
    rank = Rank(tp_size=3, tp_local_rank=2, sharded=False)
    cache = cache_on(rank, Options(scale="per-head", k_scale=scale, v_scale=scale))
    assert cache.heads == range(6) and cache.layer_pool(0).geometry.num_kv_heads == HEADS


def no_memory(*_: Any, **__: Any) -> Any:
    raise AssertionError("memory was allocated")


def test_heads_that_do_not_divide_raise_before_the_engine_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(ValueError, match="num_kv_heads is 6; accepted for 4 ranks: a multiple of 4"):
        cache_on(Rank(tp_size=4, tp_local_rank=0), Options())
    with pytest.raises(ValueError, match=r"v_scale has shape \[2\]; accepted for kind per-head and range\(0, 2\)"):
        cache_on(
            Rank(tp_size=3, tp_local_rank=0), Options(scale="per-head", k_scale=torch.ones(6), v_scale=torch.ones(2))
        )


@pytest.mark.parametrize("name", ["tiny", "llama", "20b"])
def test_heads_that_do_not_divide_raise_before_the_server_makes_a_model(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "random_model", no_memory)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert cli.main(["serve", "--random-weights", "--config", name, "--device", "cpu"]) == cli.USAGE
    heads = CONFIGS[name]().num_key_value_heads
    assert f"num_kv_heads is {heads}; accepted for 16 ranks: a multiple of 16" in capsys.readouterr().err


def test_plans() -> None:
    """GPT-OSS: attention by heads, experts by expert if the ranks divide them. The others: their own plan."""
    assert plan_of(CONFIGS["20b"](), 4).ep_size == 4 and plan_of(CONFIGS["tiny-6"](), 3).ep_size == 1
    plan = plan_of(CONFIGS["20b"](), 8)
    assert isinstance(plan.tp_plan, dict) and plan.tp_plan["model.layers.*.self_attn.sinks"] == "colwise"
    assert plan_of(CONFIGS["llama-6"](), 2).tp_plan == "auto"
