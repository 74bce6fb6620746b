"""`cp_mha_gather_cache`, called as engines call it: argument for argument, and with every scale they may pass."""

from __future__ import annotations

import inspect
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import Case, build
from kvgather.formats.layout import LAYOUTS
from tests.gather.oracle import assert_same, first_difference, untouched

BLOCKS, PAGE, HEADS, K_DIM, V_DIM, TOKENS = 6, 16, 2, 32, 16, 24
NAMES = (
    "key_cache", "value_cache", "key", "value", "block_tables", "k_scales", "v_scales", "cu_seqlens_kv",
    "token_to_batch", "seq_starts", "dequant", "kv_cache_layout", "total_tokens", "per_token_quant",
)  # fmt: skip


def per_token() -> Tensor:
    return torch.rand(BLOCKS, HEADS, PAGE) + 0.5


def call(layout: str = "NHD", dtype: torch.dtype = torch.float8_e4m3fn, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of a call, and nothing wrong with them; `changes` replace some."""
    case = Case(
        layout=layout, dtype=dtype, k_kind="none", v_kind="none", num_blocks=BLOCKS, k_dim=K_DIM, v_dim=V_DIM,
        lengths=(19, 5), starts=(3, 16),
    )  # fmt: skip
    built = build(case, seed=5)
    return {
        "key_cache": built.cache.key_cache, "value_cache": built.cache.value_cache,
        "key": untouched((TOKENS, HEADS, K_DIM), torch.bfloat16),
        "value": untouched((TOKENS, HEADS, V_DIM), torch.bfloat16),
        "block_tables": built.block_table, "k_scales": torch.tensor([0.5]), "v_scales": torch.tensor([2.0]),
        "cu_seqlens_kv": built.cu_seqlens_k, "token_to_batch": torch.tensor([0] * 19 + [1] * 5, dtype=torch.int32),
        "seq_starts": built.seq_starts, "dequant": True, "kv_cache_layout": layout, "total_tokens": TOKENS, **changes,
    }  # fmt: skip


def wanted(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a call should fill in, by `gather`."""
    scales = (arguments["k_scales"], arguments["v_scales"]) if arguments["dequant"] else (None, None)
    key_cache, value_cache = arguments["key_cache"], arguments["value_cache"]
    if arguments["kv_cache_layout"] == "SHUFFLE" and key_cache.ndim == 4:
        x = 16 // key_cache.element_size()
        key_cache = key_cache.reshape(-1, HEADS, K_DIM // x, PAGE, x)
        value_cache = value_cache.reshape(-1, HEADS, PAGE // x, V_DIM, x)
    plan = kg.GatherPlan.build(
        arguments["block_tables"], arguments["cu_seqlens_kv"], page_size=PAGE, num_blocks=BLOCKS,
        total_tokens=arguments["total_tokens"], seq_starts=arguments["seq_starts"],
    )  # fmt: skip
    out = tuple(rows.clone() for rows in (arguments["key"], arguments["value"]))
    return kg.gather(
        key_cache, value_cache, plan, layout=arguments["kv_cache_layout"], k_scale=scales[0], v_scale=scales[1],
        out_dtype=out[0].dtype, out=out, backend="torch",
    )  # fmt: skip


def assert_fills(arguments: dict[str, Any]) -> None:
    expected = wanted(arguments)
    assert first_difference(arguments["key"], expected[0])  # nothing is there yet
    assert kg.cp_mha_gather_cache(**arguments) is None
    assert_same((arguments["key"], arguments["value"]), expected)


def test_the_signature_is_the_engines() -> None:
    parameters = inspect.signature(kg.cp_mha_gather_cache).parameters
    assert tuple(parameters) == NAMES
    assert parameters["per_token_quant"].default is True
    assert all(p.default is inspect.Parameter.empty for n, p in parameters.items() if n != "per_token_quant")
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_by_position_and_by_name() -> None:
    for flag in ({}, {"per_token_quant": False}, {"per_token_quant": True}):
        arguments = call(**flag)
        expected = wanted(arguments)
        kg.cp_mha_gather_cache(*(arguments[name] for name in NAMES if name in arguments))
        assert_same((arguments["key"], arguments["value"]), expected)
        assert_fills(call(**flag))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    "scales",
    [
        {"k_scales": torch.tensor([0.5]), "v_scales": torch.tensor(2.0)},
        {"k_scales": 0.5, "v_scales": 2},
        {"k_scales": torch.tensor([[[0.25]]]), "v_scales": torch.tensor([0.5, 3.0])},
        {"k_scales": torch.tensor([0.5, 3.0]), "v_scales": torch.tensor([1.5])},
    ],
)
def test_scales_for_which_the_flag_does_not_matter(layout: str, flag: bool, scales: dict[str, Any]) -> None:
    """The crash: one element with the flag at its default was read as [block, head, slot]."""
    assert_fills(call(layout, per_token_quant=flag, **scales))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_token_scales_and_mixtures(layout: str) -> None:
    assert_fills(call(layout, k_scales=per_token(), v_scales=per_token()))
    assert_fills(call(layout, k_scales=torch.tensor([0.5]), v_scales=per_token()))
    assert_fills(call(layout, k_scales=per_token(), v_scales=torch.rand(HEADS) + 0.5))
    assert_fills(call(layout, k_scales=per_token().transpose(1, 2).contiguous().transpose(1, 2), v_scales=1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.bfloat16, torch.float32])
def test_without_dequant_no_scale_is_read(layout: str, dtype: torch.dtype) -> None:
    nonsense: Any = torch.tensor([float("nan")] * 7)
    assert_fills(call(layout, dtype, dequant=False, k_scales=None, v_scales=None))
    assert_fills(call(layout, dtype, dequant=False, k_scales=nonsense, v_scales="?"))
    rows = {name: untouched((TOKENS, HEADS, dim), dtype) for name, dim in (("key", K_DIM), ("value", V_DIM))}
    assert_fills(call(layout, dtype, dequant=False, k_scales=None, v_scales=None, **rows))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_shuffled_pools_in_the_shape_of_nhd(dtype: torch.dtype) -> None:
    five = call("SHUFFLE", dtype)
    expected = wanted(five)
    four = call(
        "SHUFFLE",
        dtype,
        key_cache=five["key_cache"].view(BLOCKS, PAGE, HEADS, K_DIM),
        value_cache=five["value_cache"].view(BLOCKS, PAGE, HEADS, V_DIM),
    )
    kg.cp_mha_gather_cache(**four)
    assert_same((four["key"], four["value"]), expected)
    assert_fills(four | {"key": untouched((TOKENS, HEADS, K_DIM), torch.bfloat16)})
    wide = torch.stack((four["key_cache"].flatten(1), four["key_cache"].flatten(1)), 1)  # blocks with a gap
    four["key_cache"] = wide[:, 1].unflatten(1, (PAGE, HEADS, K_DIM))
    kg.cp_mha_gather_cache(**four)
    assert_same((four["key"], four["value"]), expected)


def test_a_dim_of_v_that_no_group_divides_in_the_shape_of_nhd() -> None:
    five = torch.randint(0, 256, (BLOCKS, HEADS, 1, 24, 16), dtype=torch.uint8).view(torch.float8_e5m2)
    rows = [untouched((TOKENS, HEADS, 24), torch.float32) for _ in range(2)]
    keys = untouched((TOKENS, HEADS, K_DIM), torch.float32)
    for pool, out in ((five, rows[0]), (five.view(BLOCKS, PAGE, HEADS, 24), rows[1])):
        arguments = call("SHUFFLE", torch.float8_e5m2, key=keys, value=out, value_cache=pool)
        if pool.ndim == 4:
            arguments["key_cache"] = arguments["key_cache"].view(BLOCKS, PAGE, HEADS, K_DIM)
        kg.cp_mha_gather_cache(**arguments)
    assert not first_difference(rows[0], rows[1])


def test_optional_arguments() -> None:
    arguments = call(seq_starts=None, token_to_batch=None)
    assert_fills(arguments)


def test_outputs_larger_than_the_batch() -> None:
    arguments = call()
    arguments["key"] = untouched((TOKENS + 8, HEADS, K_DIM), torch.bfloat16)
    arguments["value"] = untouched((TOKENS + 1, HEADS, V_DIM), torch.bfloat16)
    assert_fills(arguments)
    assert not first_difference(arguments["key"][TOKENS:], untouched((8, HEADS, K_DIM), torch.bfloat16))


def test_no_tokens() -> None:
    arguments = call(total_tokens=0, cu_seqlens_kv=torch.tensor([0, 0, 0]))
    kg.cp_mha_gather_cache(**arguments)
    assert not first_difference(arguments["key"], untouched((TOKENS, HEADS, K_DIM), torch.bfloat16))


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float16(0.5), Fraction(1, 2), np.int64(2), 2], ids=repr)
def test_a_scale_may_be_any_number(scale: float) -> None:
    assert_fills(call(k_scales=scale, v_scales=scale))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flag", [True, False])
def test_on_a_gpu(layout: str, flag: bool) -> None:
    for scales in ({}, {"k_scales": torch.rand(HEADS) + 1}, {"v_scales": per_token()} if flag else {}):
        arguments = call(layout, per_token_quant=flag, **scales)
        expected = wanted(arguments)
        moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        kg.cp_mha_gather_cache(**moved)
        assert_same((moved["key"], moved["value"]), expected)


ACCEPTED = r"accepted for 2 heads, 6 blocks, page 16: one element \(per-tensor\), \[2\]"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"k_scales": per_token(), "per_token_quant": False}, ValueError,
         rf"k_scales has shape \[6, 2, 16\], per-token-head, with per_token_quant=False; {ACCEPTED}"),
        ({"v_scales": per_token(), "per_token_quant": False}, ValueError, r"v_scales .* with per_token_quant=False"),
        ({"v_scales": torch.ones(6, 2)}, ValueError,
         rf"v_scales has shape \[6, 2\], per-page-head, with per_token_quant=True; {ACCEPTED}"),
        ({"k_scales": torch.ones(3)}, ValueError, rf"k_scales has shape \[3\]; {ACCEPTED}"),
        ({"v_scales": torch.ones(6, 16, 2)}, ValueError, rf"v_scales has shape \[6, 16, 2\]; {ACCEPTED}"),
        ({"k_scales": torch.ones(6 * 2 * 16)}, ValueError, r"k_scales has shape \[192\]"),
        ({"k_scales": None}, ValueError, r"k_scales is None; accepted with dequant=True: a scale"),
        ({"v_scales": "auto"}, TypeError, r"v_scales is str 'auto'; accepted: a tensor or a float"),
        ({"k_scales": torch.ones(1).half()}, TypeError, r"k_scales has dtype float16; accepted: float32"),
        ({"k_scales": torch.tensor([0.0])}, ValueError, r"k_scales is 0.0 at \[0\]; accepted: finite values above 0"),
        ({"k_scales": True}, TypeError, r"k_scales is bool True; accepted: a tensor or a float"),
        ({"k_scales": np.float32("nan")}, ValueError, r"k_scales is nan; accepted: finite values above 0"),
        ({"v_scales": -2.0}, ValueError, r"v_scales is -2.0; accepted: finite values above 0"),
        ({"dequant": None}, TypeError, r"dequant is NoneType None; accepted: True or False"),
        ({"per_token_quant": 1}, TypeError, r"per_token_quant is int 1; accepted: True or False"),
        ({"kv_cache_layout": "BHSD"}, ValueError, r"kv_cache_layout is 'BHSD'; accepted: NHD, SHUFFLE, HND"),
        ({"kv_cache_layout": "SHUFFLE", "key_cache": torch.ones(6, 10, 2, 32), "value_cache": torch.ones(6, 10, 2, 16)},
         ValueError, r"key_cache has page 10 and head_dim 32; accepted in SHUFFLE with 4-byte elements: mult"),
        ({"kv_cache_layout": "SHUFFLE", "key_cache": torch.ones(6, 16, 2, 30), "value_cache": torch.ones(6, 16, 2, 16)},
         ValueError, r"key_cache has page 16 and head_dim 30; accepted in SHUFFLE"),
        ({"kv_cache_layout": "SHUFFLE", "key_cache": torch.ones(6, 16, 4, 32)[:, :, ::2],
          "value_cache": torch.ones(6, 16, 2, 16)},
         ValueError, r"key_cache has strides .*; accepted for SHUFFLE in 4 dimensions: blocks whose elements are cont"),
        ({"total_tokens": -1}, ValueError, r"total_tokens is -1; accepted: 0 to"),
        ({"total_tokens": 25}, ValueError, r"(key|token_to_batch) has shape \[24.*; accepted: at least"),
        ({"token_to_batch": torch.zeros(3, dtype=torch.int32)}, ValueError,
         r"token_to_batch has shape \[3\]; accepted: at least \[24\]"),
        ({"token_to_batch": torch.zeros(24)}, TypeError, r"token_to_batch has dtype float32; accepted: int32, int64"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens_kv? has shape \[3\]; acc"),
        ({"cu_seqlens_kv": None}, TypeError, r"cu_seqlens_kv is NoneType None; accepted: a torch.Tensor"),
        ({"cu_seqlens_kv": torch.zeros(3)}, TypeError, r"cu_seqlens_kv? has dtype float32"),
        ({"key": torch.zeros(24, 2, 16)}, ValueError, r"key has shape \[24, 2, 16\]; accepted: at least 24 rows of"),
        ({"value": torch.zeros(24, 2, 16)}, TypeError, r"value has dtype float32; accepted: bfloat16"),
        ({"key": torch.zeros(24, 2, 32, dtype=torch.int8)}, TypeError, r"key's dtype is int8; accepted: bfloat16"),
        ({"value": None}, TypeError, r"value is NoneType None; accepted: a torch.Tensor"),
        ({"key_cache": torch.zeros(6, 16, 2)}, ValueError, r"key_cache has shape \[6, 16, 2\]; accepted for lay"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = call(**wrong)
    before = [arguments[name].clone() for name in ("key", "value") if isinstance(arguments[name], Tensor)]
    with pytest.raises(error, match=message):
        kg.cp_mha_gather_cache(**arguments)
    after = [arguments[name] for name in ("key", "value") if isinstance(arguments[name], Tensor)]
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
