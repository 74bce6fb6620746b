"""The gather before the fix: exact if the flag matches the scales, and wrong if it does not."""

from __future__ import annotations

import inspect

import pytest
import torch

from kvgather.device import has_gpu
from kvgather.lab import before_fix

pytestmark = pytest.mark.triton
LAYOUTS = ("NHD", "SHUFFLE")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_flag_that_matches_the_scale_gives_exact_rows(call, layout, dtype, per_token):
    scale = torch.rand(6, 2, 16) + 0.5 if per_token else torch.tensor([0.75])
    case = call(layout, dtype, scale)
    before_fix.cp_mha_gather_cache(**case.arguments, per_token_quant=per_token)
    for got, want in zip(case.got, case.want, strict=True):
        assert torch.equal(got, want)


def test_without_dequant_no_scale_is_read(call):
    case = call("NHD", torch.bfloat16, torch.tensor([float("nan")]), dequant=False)
    before_fix.cp_mha_gather_cache(**(case.arguments | {"k_scales": None, "v_scales": None}))
    assert torch.equal(case.got[0], case.want[0])


def test_the_default_flag_indexes_a_scalar_by_block_head_and_slot(call):
    device = "cuda" if has_gpu() else "cpu"
    arena = torch.arange(256, dtype=torch.float32, device=device)  # memory after the scalar: element i holds i
    arena[0] = 0.5
    case = call("SHUFFLE", torch.float8_e4m3fn, arena[:1])
    before_fix.cp_mha_gather_cache(**case.arguments)
    block, slot, head = 4, 15, 1
    element = (block * 2 + head) * 16 + slot
    assert torch.equal(case.got[0][0, head], case.want[0][0, head] / 0.5 * element)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shipped_fix_is_exact_for_scalars_with_either_flag(call, layout):
    for flag in (True, False):
        case = call(layout, torch.float8_e4m3fn, torch.tensor([0.5]))
        before_fix.cp_mha_gather_cache_shipped_fix(**case.arguments, per_token_quant=flag)
        assert torch.equal(case.got[0], case.want[0])
        assert torch.equal(case.got[1], case.want[1])


def test_the_shipped_fix_rejects_a_scalar_with_a_larger_scale(call):
    case = call("NHD", torch.float8_e4m3fn, torch.tensor([0.5]), torch.ones(6, 2, 16))
    with pytest.raises(ValueError, match=r"k_scales has 1 elements, v_scales 192; accepted"):
        before_fix.cp_mha_gather_cache_shipped_fix(**case.arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_layout": "HND"}, "kv_cache_layout is 'HND'; accepted: NHD, SHUFFLE"),
        ({"k_scales": None}, "k_scales or v_scales is None"),
        ({"key_cache": torch.zeros(6, 16, 2, 32)[..., ::2]}, "key_cache or value_cache is not contiguous"),
    ],
)
def test_wrong_arguments(call, change, message):
    case = call("NHD", torch.float8_e4m3fn, torch.tensor([0.5]))
    with pytest.raises(ValueError, match=message):
        before_fix.cp_mha_gather_cache(**(case.arguments | change))


def test_no_tokens_launches_nothing(call):
    case = call("NHD", torch.float8_e4m3fn, torch.tensor([0.5]))
    before_fix.cp_mha_gather_cache(**(case.arguments | {"total_tokens": 0}))
    assert not case.got[0].any()


def test_token_to_batch_skips_empty_sequences():
    sequences = before_fix.token_to_batch(torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert sequences.tolist() == [0, 0, 2]
    assert sequences.dtype == torch.int32


def test_the_kernel_has_the_21_parameters_of_upstreams_kernel():
    parameters = inspect.signature(before_fix.gather_one_head_kernel.fn).parameters
    assert len(parameters) == 21
    assert "constexpr" in str(parameters["PAGE_SIZE"].annotation) and "page_size" not in parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_raw_launch_is_one_launch_with_21_arguments(call, layout, monkeypatch):
    case = call(layout, torch.float8_e4m3fn, torch.tensor([0.5]))
    launch = before_fix.raw_launch(**case.arguments, per_token_quant=False)
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((grid, len(args) + len(kwargs)))

    with monkeypatch.context() as patched:
        patched.setattr(before_fix, "gather_one_head_kernel", Kernel())
        launch()
    assert launches == [((3, 2), 21)]
    launch()
    for got, want in zip(case.got, case.want, strict=True):
        assert torch.equal(got, want)
