"""What `import kvgather` offers, and the example that the design promises."""

from __future__ import annotations

import inspect

import pytest
import torch

import kvgather as kg


def test_the_public_names() -> None:
    assert set(kg.__all__) >= {
        "BlockPool", "GatherPlan", "PagedKVCache", "PlanError", "cp_mha_gather_cache", "device", "gather",
    }  # fmt: skip
    assert sorted(kg.__all__) == sorted(set(kg.__all__))
    for name in kg.__all__:
        assert getattr(kg, name).__doc__, name


def test_gather_is_the_function_also_after_its_package_was_imported() -> None:
    import kvgather.gather.reference  # noqa: F401

    assert inspect.isfunction(kg.gather) and inspect.isfunction(kg.cp_mha_gather_cache)


def parameters(function: object) -> dict[str, object]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]


def test_signatures_are_the_designs() -> None:
    required = inspect.Parameter.empty
    assert parameters(kg.gather) == {
        "key_cache": required, "value_cache": required, "plan": required, "layout": "NHD", "k_scale": None,
        "v_scale": None, "k_kind": None, "v_kind": None, "out_dtype": torch.bfloat16, "out": None, "backend": "auto",
    }  # fmt: skip
    assert parameters(kg.PagedKVCache) == {
        "num_blocks": required, "page_size": required, "num_kv_heads": required, "head_dim": required,
        "v_head_dim": None, "layout": "NHD", "dtype": torch.float8_e4m3fn, "scale": "per-tensor", "k_scale": None,
        "v_scale": None, "device": None,
    }  # fmt: skip
    assert parameters(kg.GatherPlan.build) == {
        "block_table": required, "cu_seqlens_k": required, "page_size": required, "num_blocks": required,
        "total_tokens": None, "seq_starts": None,
    }  # fmt: skip
    assert list(parameters(kg.PagedKVCache.from_tensors)) == [
        "key_cache", "value_cache", "layout", "k_scale", "v_scale", "k_kind", "v_kind",
    ]  # fmt: skip
    assert list(parameters(kg.PagedKVCache.write)) == ["self", "k", "v", "slots", "backend"]


@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_allocate_write_gather(layout: str) -> None:
    pool = kg.BlockPool(num_blocks=8, page_size=16)
    cache = kg.PagedKVCache(8, 16, 2, 32, layout=layout, scale="per-token-head", device="cpu")
    seq = pool.allocate(list(range(20)))
    slots = torch.tensor([seq.block_ids[i // 16] * 16 + i % 16 for i in range(20)])
    k, v = torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    cache.write(k, v, slots)
    plan = kg.GatherPlan.build(torch.tensor([seq.block_ids]), torch.tensor([0, 20]), page_size=16, num_blocks=8)
    k_all, v_all = cache.gather(plan, out_dtype=torch.float32)
    assert k_all.shape == v_all.shape == (20, 2, 32)
    torch.testing.assert_close(k_all, k, rtol=0.07, atol=0.01)
    torch.testing.assert_close(v_all, v, rtol=0.07, atol=0.01)
    same = kg.gather(
        cache.key_cache, cache.value_cache, plan, layout=layout, k_scale=cache.k_scale, v_scale=cache.v_scale,
        out_dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(same[0], k_all) and torch.equal(same[1], v_all)
    assert cache.gather(plan)[0].dtype == torch.bfloat16


def test_errors_are_value_and_type_errors() -> None:
    from kvgather.device import BackendError
    from kvgather.scatter import SlotError

    for error in (kg.PlanError, SlotError, BackendError):
        assert issubclass(error, ValueError)
