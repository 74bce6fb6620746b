"""The Triton kernel against the reference, bit for bit, over the shared table of cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.cases import SMALL, Case, build
from kvgather.formats.fp8 import FLOATS, FORMATS, decode_table
from kvgather.formats.layout import LAYOUTS
from kvgather.gather import again
from kvgather.gather.again import forget
from tests.gather.oracle import assert_same, untouched
from tests.where import on_each_device


@on_each_device
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_equals_reference(case: Case, where: str) -> None:
    built = build(case, where, seed=1)
    outs = []
    for backend in ("triton", "torch"):
        k_out, v_out = (
            untouched((case.total_tokens + 2, case.num_heads, dim), case.out_dtype, where)
            for dim in (case.k_dim, case.v_dim)
        )
        built.cache.gather(built.plan, out_dtype=case.out_dtype, out=(k_out, v_out), backend=backend)
        outs.append((k_out, v_out))
    assert_same(*outs)


@on_each_device
@pytest.mark.parametrize("software", [False, True], ids=["as_it_is", "in_software"])
@pytest.mark.parametrize("dtype", list(FORMATS))
def test_every_code_is_decoded_exactly(
    dtype: torch.dtype, software: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hardware where it knows the format, and in software on the same hardware."""
    from kvgather.gather import kernel

    if software:
        monkeypatch.setattr(kernel, "fp8_support", lambda device: dict.fromkeys(FORMATS, "software"))
    forget()
    codes = torch.arange(256, dtype=torch.uint8, device=where)
    pool = codes.view(1, 16, 1, 16).view(dtype)
    plan = kg.GatherPlan.build(
        torch.tensor([[0]], device=where), torch.tensor([0, 16], device=where), page_size=16, num_blocks=1
    )
    for out_dtype in FLOATS:
        k, v = kg.gather(pool, pool, plan, v_scale=2.0, out_dtype=out_dtype, backend="triton")
        values = decode_table(dtype).view(16, 1, 16)
        assert_same((k, v), (values.to(out_dtype), (values * 2).to(out_dtype)))


TILES = ((4, 4, 2, 2), (16, 2, 4, 8), (32, 8, 1, 4), (64, 16, 16, 1))


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_result_depends_on_the_tile(layout: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile smaller than a page, larger than it, of some heads and of more than there are; pages that are no power
    of two."""
    from kvgather.gather import kernel

    for page_size, kind, tiles in ((16, "per-token-head", TILES), (48, "per-head", TILES[2:])):
        case = Case(
            layout=layout, k_kind=kind, num_heads=2, k_dim=48, v_dim=24, page_size=page_size, lengths=(5,), starts=(14,)
        )
        built = build(case, where)
        wanted = built.cache.gather(built.plan, backend="torch")
        for tile in tiles:
            monkeypatch.setattr(kernel, "choose_tile", lambda *_, tile=tile: kernel.Tile(*tile))
            forget()
            assert_same(built.cache.gather(built.plan, backend="triton"), wanted)


@on_each_device
def test_launches_of_one_shape_and_another_meaning(where: str) -> None:
    """Equal shapes and strides in another layout, dtype or scale kind: no launch may be taken for another."""
    square = Case(page_size=4, num_heads=4, lengths=(3,), starts=(1,), num_blocks=4)  # NHD's strides are HND's
    for change in (
        {}, {"layout": "HND"}, {"dtype": torch.float8_e5m2}, {"dtype": torch.float8_e4m3fnuz}, {"layout": "NHD"},
        {"k_kind": "per-head"}, {"k_kind": "per-page-head"}, {"k_kind": "none", "v_kind": "none"},
        {"k_kind": "none", "v_kind": "none", "out_dtype": torch.float8_e4m3fn}, {"dtype": torch.float16},
        {"dtype": torch.bfloat16}, {"dtype": torch.float16, "out_dtype": torch.float16}, {"out_dtype": torch.float32},
    ):  # fmt: skip
        case = replace(square, **change)  # type: ignore[arg-type]
        built = build(case, where)
        assert_same(
            built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="triton"),
            built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="torch"),
        )


@on_each_device
def test_each_meaning_is_remembered_apart(where: str) -> None:
    """The interpreter takes any dtype that comes; a kernel compiled for another one writes nonsense."""
    built = build(Case(lengths=(5,), starts=()), where)
    forget()
    for count, changes in enumerate(
        ({}, {"out_dtype": torch.float32}, {"out_dtype": torch.float16}, {"backend": "auto"}), start=1
    ):
        arguments: dict[str, Any] = {"backend": "triton", **changes}
        for _ in range(2):
            built.cache.gather(built.plan, **arguments)
        if where == "cpu" and arguments["backend"] == "auto":  # plain torch, which is not remembered
            count -= 1
        assert sum(map(len, again._CALLS.values())) == count
