"""What `import kvgather` offers, and the example that the design promises."""

from __future__ import annotations

import inspect

import pytest
import torch

import kvgather as kg


def test_the_public_names() -> None:
    assert set(kg.__all__) >= {
        "BackendError", "BlockPool", "CaptureError", "GatherPlan", "OutOfBlocksError", "PagedKVCache", "PlanError",
        "PrefixBatch", "SlotError", "cp_mha_gather_cache", "cu_seqlens", "device", "gather", "merge_states",
        "prefix_attention",
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
    assert parameters(kg.PrefixBatch.build) == {
        "block_table": required, "cu_seqlens_q": required, "cu_seqlens_k": required, "page_size": required,
        "num_blocks": required, "total_q": None, "total_k": None, "max_q": None, "max_k": None, "seqlens_q": None,
        "seqlens_k": None, "windows": (), "share": None,
    }  # fmt: skip
    assert parameters(kg.prefix_attention) == {
        "q": required, "k_new": required, "v_new": required, "cache": required, "batch": required,
        "softmax_scale": None, "sinks": None, "window": None, "workspace_tokens": None, "path": "auto",
        "return_lse": False,
    }  # fmt: skip
    assert parameters(kg.PrefixBatch.prepare) == {
        "self": required, "cache": required, "num_q_heads": required, "window": None, "dtype": torch.bfloat16,
        "workspace_tokens": None, "path": "auto",
    }  # fmt: skip
    assert list(parameters(kg.merge_states)) == ["out_a", "lse_a", "out_b", "lse_b"]
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


@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_two_prompts_one_prefix(layout: str) -> None:
    """As an engine would call it: the second prompt's blocks are the first one's, and only its suffix is computed."""
    pool = kg.BlockPool(num_blocks=8, page_size=16)
    cache = kg.PagedKVCache(8, 16, 2, 32, layout=layout, scale="per-token-head", device="cpu")
    for prompt, cached in ((list(range(20)), 0), ([*range(16), 7, 7, 7], 16)):
        seq = pool.allocate(prompt)
        new = seq.num_tokens - seq.num_cached_tokens
        assert seq.num_cached_tokens == cached
        batch = kg.PrefixBatch.build(
            pool.block_table([seq]), torch.tensor([0, new]), torch.tensor([0, seq.num_tokens]), page_size=16,
            num_blocks=8, total_q=new, total_k=seq.num_tokens,
        )  # fmt: skip
        q, k, v = (torch.randn(new, heads, 32, dtype=torch.bfloat16) for heads in (6, 2, 2))
        out = kg.prefix_attention(q, k, v, cache, batch)
        pool.commit(seq)
        assert isinstance(out, torch.Tensor) and out.shape == (new, 6, 32) and out.dtype == torch.bfloat16
        first = out[0, ::3].float() if cached == 0 else None
        if first is not None:  # the first token sees itself alone
            torch.testing.assert_close(first, v[0].float(), rtol=0.07, atol=0.01)
    parts = [torch.randn(5, 6, 32), torch.randn(5, 6)]
    assert torch.equal(kg.merge_states(*parts, parts[0], torch.full((5, 6), -torch.inf))[0], parts[0])


def test_errors_are_value_and_type_errors() -> None:
    from kvgather.device import BackendError
    from kvgather.scatter import SlotError

    for error in (kg.PlanError, SlotError, BackendError):
        assert issubclass(error, ValueError)
