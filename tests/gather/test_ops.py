"""The two operators: what opcheck and torch.compile make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import Built, Case, build
from kvgather.formats.checks import dtype_name
from kvgather.gather import ops
from tests.gather.oracle import assert_same
from tests.where import CPU, GPU

CASES = [
    Case(lengths=(9,), starts=(3,)),
    Case(lengths=(9,), starts=(3,), layout="SHUFFLE", k_kind="per-token-head", v_kind="none", dtype=torch.bfloat16),
    Case(lengths=(9,), starts=(3,), layout="HND", k_kind="per-head", v_kind="per-page-head", pool_style="stepped"),
]
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("triton", *CPU.values, marks=CPU.marks),
    pytest.param("triton", *GPU.values, marks=GPU.marks),
]


def operands(built: Built) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    cache = built.cache
    pools = [ops.as_operand(pool) for pool in (cache.key_cache, cache.value_cache)]
    tensors = (*pools, cache.k_scale, cache.v_scale, built.plan.records)
    return tensors, (built.case.layout, dtype_name(built.case.dtype), cache.k_kind, cache.v_kind)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_opcheck(case: Case, backend: str, where: str) -> None:
    built = build(case, where, values="normal")
    tensors, meaning = operands(built)
    sizes = (case.total_tokens, case.num_heads, case.k_dim, case.v_dim, case.out_dtype)
    torch.library.opcheck(ops.gather_new, (*tensors, *sizes, *meaning, backend))
    torch.library.opcheck(ops.gather_new, (*tensors, *sizes, *meaning, backend, True))
    outs = [torch.zeros(case.total_tokens, 2, 16, dtype=case.out_dtype, device=where) for _ in range(2)]
    torch.library.opcheck(ops.gather_out, (*tensors, *outs, *meaning, backend))


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_the_operators_give_what_gather_gives(backend: str, where: str) -> None:
    for case in CASES:
        built = build(case, where)
        tensors, meaning = operands(built)
        wanted = built.cache.gather(built.plan, backend="torch")
        sizes = (case.total_tokens, case.num_heads, case.k_dim, case.v_dim, case.out_dtype)
        assert_same(ops.gather_new(*tensors, *sizes, *meaning, backend), wanted)
        outs = torch.empty_like(wanted[0]), torch.empty_like(wanted[1])
        assert ops.gather_out(*tensors, *outs, *meaning, backend) is None
        assert_same(outs, wanted)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_compiles_without_a_graph_break(backend: str, where: str, given: bool) -> None:
    for case in CASES[1:]:
        built = build(case, where)
        cache, plan = built.cache, built.plan
        wanted = cache.gather(plan, backend="torch")

        def step(key_cache: Tensor, value_cache: Tensor, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
            k, v = kg.gather(
                key_cache, value_cache, plan, layout=case.layout, k_scale=cache.k_scale, v_scale=cache.v_scale,  # noqa: B023
                out=out, backend=backend,
            )  # fmt: skip
            return k + 0, v + 0

        torch.compiler.reset()
        out = (torch.empty_like(wanted[0]), torch.empty_like(wanted[1])) if given else None
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(cache.key_cache, cache.value_cache, out)
        assert_same(got, (wanted[0] + 0, wanted[1] + 0))
        if out is not None:
            assert_same(out, wanted)


def test_a_compiled_cache_gathers_too() -> None:
    built = build(CASES[0])
    torch.compiler.reset()
    step = torch.compile(lambda cache, plan: cache.gather(plan, backend="torch"), fullgraph=True, backend="aot_eager")
    assert_same(step(built.cache, built.plan), built.cache.gather(built.plan, backend="torch"))


def test_errors_come_through_a_compiled_call() -> None:
    built = build(CASES[0])
    torch.compiler.reset()
    step = torch.compile(
        lambda scale: kg.gather(built.cache.key_cache, built.cache.value_cache, built.plan, k_scale=scale),
        backend="eager",
    )
    with pytest.raises(ValueError, match=r"k_scale has shape \[7\]; accepted"):
        step(torch.ones(7))


@pytest.mark.gpu
def test_inductor_compiles_it() -> None:
    built = build(CASES[0], "cuda", values="normal")
    torch.compiler.reset()
    step = torch.compile(lambda plan: built.cache.gather(plan)[0] * 2, fullgraph=True)
    assert torch.equal(step(built.plan), built.cache.gather(built.plan)[0] * 2)
