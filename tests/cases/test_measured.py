"""The gathers that benchmarks time: the lists have every row of the table of targets."""

from __future__ import annotations

import itertools

import torch

from kvgather.cases.measured import CALLS, HOST, LONGER, RAGGED, STEPS, cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_gpus_gathers() -> None:
    found = cases(CUDA)
    assert len(set(found)) == len(found) and len({case.name for case in found}) == len(found)
    assert sum(case.lengths == RAGGED and case.num_heads == 8 for case in found) >= 72
    assert {(case.k_dim, case.v_dim) for case in found} == {(64, 64), (128, 128), (192, 128)}
    assert {case.num_heads for case in found} == {1, 8}
    assert {len(case.lengths) for case in found} == {1, 16, 256}
    assert sum(LONGER) == 145_000
    assert {length % 16 for length in RAGGED} == set(range(16))
    assert [case.layout for case in STEPS] == ["SHUFFLE", "NHD"] and set(STEPS) <= set(found)


def test_the_engines_calls() -> None:
    found = [case for case in cases(CUDA) if case in CALLS]
    expected = itertools.product(("NHD", "SHUFFLE"), ((8, 64), (8, 128), (1, 64)), (1536, 16384, 131072))
    assert {(case.layout, (case.num_heads, case.k_dim), case.total_tokens) for case in found} == set(expected)
    for case in CALLS:
        assert case.lengths == (case.total_tokens // 16,) * 16 and case.k_dim == case.v_dim
        assert (case.page_size, case.k_kind, case.v_kind) == (16, "per-tensor", "per-tensor")
        assert (case.dtype, case.out_dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    assert not set(CALLS) & set(cases(CPU))


def test_the_host_times_case() -> None:
    assert (HOST.lengths, HOST.num_heads, HOST.k_dim, HOST.v_dim) == ((512,) * 16, 8, 64, 64)
    assert (HOST.layout, HOST.page_size, HOST.k_kind, HOST.v_kind) == ("NHD", 16, "per-tensor", "per-tensor")
