"""Which layers the Hopper kernel attends: decisions by a table, on a CPU that is taken for an H100."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.attention.batch import PrefixBatch
from kvgather.batch.share import Share
from kvgather.blocks import cu_seqlens
from kvgather.hopper import plan

FN = torch.float8_e4m3fn
PROCESSORS = 132


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available", lambda device: True)
    monkeypatch.setattr(plan, "interpreting", lambda: False)
    properties = type("Properties", (), {"multi_processor_count": PROCESSORS})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def cache_of(**changes: Any) -> kg.PagedKVCache:
    given = {"num_blocks": 8, "page_size": 16, "num_kv_heads": 2, "head_dim": 64, "dtype": FN, "device": "cpu"}
    return kg.PagedKVCache(**{**given, **changes})


def batch_of(
    cache: kg.PagedKVCache, new: list[int], total: list[int], lengths: bool = True, **more: Any
) -> PrefixBatch:
    g = cache.geometry
    columns = max(-(-n // g.page_size) for n in total)
    known = {"seqlens_q": new, "seqlens_k": total} if lengths else {"max_q": max(new), "max_k": max(total)}
    return PrefixBatch.build(
        torch.zeros(len(new), columns, dtype=torch.int32), cu_seqlens(new, "cpu"), cu_seqlens(total, "cpu"),
        page_size=g.page_size, num_blocks=g.num_blocks, total_q=sum(new), total_k=sum(total), **known, **more,
    )  # fmt: skip


def runs(
    cache: kg.PagedKVCache, q_heads: int = 16, dtype: torch.dtype = torch.bfloat16, window: int | None = None
) -> bool:
    return plan.runs(cache, batch_of(cache, [16], [40]), q_heads, dtype, window)


@pytest.mark.parametrize(
    ("changes", "layer", "expected"),
    [
        ({}, {}, True),
        ({"head_dim": 128}, {}, True),
        ({"page_size": 48}, {"dtype": torch.float16}, True),
        ({"scale": "none"}, {}, True),
        ({"scale": ("per-tensor", "none")}, {"window": 40}, True),
        ({"num_kv_heads": 1}, {"q_heads": 5}, True),
        ({"head_dim": 96}, {}, False),
        ({"head_dim": 128, "v_head_dim": 64}, {}, False),
        ({"page_size": 24}, {}, False),
        ({"page_size": 1}, {}, False),
        ({"layout": "HND"}, {}, False),
        ({"layout": "SHUFFLE"}, {}, False),
        ({"dtype": torch.float8_e5m2}, {}, False),
        ({"dtype": torch.float8_e4m3fnuz}, {}, False),
        ({"dtype": torch.bfloat16, "scale": "none"}, {}, False),
        ({"scale": "per-head"}, {}, False),
        ({"scale": ("per-tensor", "per-token-head")}, {}, False),
        ({"scale": ("per-page-head", "none")}, {}, False),
        ({}, {"dtype": torch.float32}, False),
        ({}, {"window": 39}, False),
    ],
)  # fmt: skip
def test_what_it_runs(changes: dict[str, Any], layer: dict[str, Any], expected: bool, hopper: None) -> None:
    assert runs(cache_of(**changes), **layer) is expected


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((8, 16, 2, 64), (4096, 128, 64, 1), 0, True),  # K and V block by block
        ((8, 16, 2, 64), (3072, 192, 64, 1), 64, True),  # behind a head
        ((8, 16, 2, 64), (2304, 144, 72, 1), 0, False),  # rows that begin at multiples of 8 bytes
        ((8, 16, 2, 64), (2048, 128, 64, 1), 8, False),
        ((8, 16, 2, 64), (4096, 256, 128, 2), 0, False),
        ((8, 16, 2, 64), (2056, 128, 64, 1), 0, False),
    ],
)
def test_16_bytes_can_be_loaded_at_once(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, expected: bool, hopper: None
) -> None:
    memory = torch.zeros(40000, dtype=torch.uint8).view(FN)
    assert memory.data_ptr() % 16 == 0
    pools = memory.as_strided(shape, strides, offset), torch.zeros(shape, dtype=torch.uint8).view(FN)
    for pair in (pools, pools[::-1]):
        cache = kg.PagedKVCache.from_tensors(*pair, layout="NHD", k_scale=1.0, v_scale=1.0)
        assert runs(cache) is expected


def test_a_share_and_other_machines_leave_it_to_the_direct_kernel(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of()
    assert not plan.runs(cache, batch_of(cache, [16], [40], share=Share(0, 2)), 16, torch.bfloat16, None)
    monkeypatch.setattr(plan, "interpreting", lambda: True)
    assert not runs(cache)
    monkeypatch.undo()
    assert not runs(cache) and not plan.available(torch.device("cpu"))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("version", ["3.5.1", "3.6.0", "3.7.1"])
def test_where_it_is_available(capability: tuple[int, int], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    available = plan.available.__wrapped__(torch.device("cuda", 0))
    assert available is (capability == (9, 0) and version == "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not plan.available.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("new", "dim", "kv_heads", "q_heads", "expected"),
    [
        ([16] * 16, 64, 8, 64, plan.MANY[64]),  # 128 programs on 132 processors
        ([128] * 16, 64, 8, 64, plan.MANY[64]),
        ([8] * 16, 64, 8, 64, plan.FEW[64]),
        ([9] * 16, 64, 8, 64, plan.MANY[64]),  # 72 rows
        ([3] * 16, 64, 8, 64, plan.FEW[64]),
        ([2] * 16, 64, 8, 64, None),  # 16 rows
        ([1] * 64, 64, 8, 64, None),
        ([1] * 128, 64, 1, 32, None),  # decode, 32 rows
        ([32] * 16, 128, 8, 32, plan.FEW[128]),
        ([33] * 16, 128, 8, 32, plan.MANY[128]),
        ([512] * 16, 128, 8, 32, plan.MANY[128]),
        ([16] * 16, 128, 8, 32, plan.FEW[128]),
        ([5] * 16, 128, 8, 32, plan.FEW[128]),  # 20 rows
        ([4] * 16, 128, 8, 32, None),  # 16 rows
        ([8] * 12, 64, 8, 64, plan.FEW[64]),  # 96 programs
        ([8] * 11, 64, 8, 64, None),  # 88 programs
        ([16] * 12, 128, 8, 32, plan.FEW[128]),
        ([16] * 11, 128, 8, 32, None),
        ([16] * 14, 64, 8, 64, plan.MANY[64]),
        ([16] * 13, 64, 8, 64, None),
        ([16] * 17, 64, 8, 64, None),  # 136 programs: a second wave for 4
        ([16] * 32, 64, 8, 64, plan.MANY[64]),
        ([512], 128, 8, 32, plan.MANY[128]),  # one sequence: 128 programs
        ([320], 128, 8, 32, plan.MANY[128]),  # 80 programs
        ([288], 128, 8, 32, None),  # 72 programs
        ([40] * 10, 128, 8, 32, plan.MANY[128]),  # 160 programs: two waves
        ([1024, 1], 128, 8, 32, plan.MANY[128]),
    ],
)
@pytest.mark.parametrize("lengths", [True, False])
def test_what_it_takes(
    new: list[int], dim: int, kv_heads: int, q_heads: int, expected: plan.Form | None, lengths: bool, hopper: None
) -> None:
    cache = cache_of(num_kv_heads=kv_heads, head_dim=dim)
    batch = batch_of(cache, new, [n + 2048 for n in new], lengths)

    def chosen(forced: bool = False) -> plan.Form | None:
        return plan.chosen_form(cache, batch, sum(new), q_heads, torch.bfloat16, None, cache.likeness, forced)

    assert chosen() == expected and chosen() == expected
    assert chosen(True) == plan.form_for(dim, max(new) * q_heads // kv_heads)


@pytest.mark.parametrize(
    ("dim", "new", "lengths", "total", "taken"),
    [
        (64, 16, True, [2048] * 16, True),
        (64, 16, True, [2048] * 15 + [2047], False),
        (64, 16, True, [4080] * 8 + [16] * 8, True),  # 2,048 on average
        (64, 16, False, [2047] * 16, False),
        (64, 16, False, [2048] * 16, True),
        (64, 16, False, [30000] + [16] * 15, False),  # the host knows the sum
        (64, 8, True, [2047] * 16, False),
        (128, 16, True, [1024] * 16, True),
        (128, 16, True, [1023] * 16, False),
        (128, 64, True, [512] * 16, True),
        (128, 64, True, [511] * 16, False),
    ],
)
def test_programs_with_few_keys_are_left_to_the_direct_kernel(
    dim: int, new: int, lengths: bool, total: list[int], taken: bool, hopper: None
) -> None:
    cache = cache_of(num_kv_heads=8, head_dim=dim)
    batch = batch_of(cache, [new] * 16, total, lengths)
    form = plan.chosen_form(cache, batch, 16 * new, 4096 // dim, torch.bfloat16, None, cache.likeness)
    assert form == (plan.form_for(dim, new * 512 // dim) if taken else None)


def test_without_lengths_programs_are_counted_from_the_sum_of_new_tokens(hopper: None) -> None:
    """By the longest sequence alone, the first batch would have 1,024 programs; it has 184, in two waves of 132."""
    cache = cache_of(num_kv_heads=8)
    for new, taken in ([256] + [1] * 7, False), ([256] * 8, True):
        for lengths in (True, False):
            batch = batch_of(cache, new, [n + 4096 for n in new], lengths)
            form = plan.chosen_form(cache, batch, sum(new), 64, torch.bfloat16, None, cache.likeness)
            assert form == (plan.MANY[64] if taken else None), (new, lengths)


def test_the_decision_is_made_once(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(num_kv_heads=8)
    batch = batch_of(cache, [16] * 16, [2064] * 16)
    asked: list[int] = []
    monkeypatch.setattr(plan, "runs", lambda *layer: asked.append(1) or len(asked) % 2 == 0)
    for _ in range(3):
        assert plan.chosen_form(cache, batch, 256, 64, torch.bfloat16, None, cache.likeness) is None
    assert len(asked) == 1
