"""The cases of `kvgather bench prefix`: names, sizes, tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvgather.cases.prefix import AUTO, PrefixCase, build_prefix, cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = PrefixCase("reach", q_heads=4, kv_heads=2, head_dim=16, new=(3, 3), cached=(16, 16))
GPU_CASES = cases(CUDA)
PARTS = {part: [case for case in GPU_CASES if case.part == part] for part in {case.part for case in GPU_CASES}}


def test_the_cases_of_a_gpu_cover_every_target() -> None:
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    assert [case.new[0] for case in PARTS["reach"]] == [1, 16, 128, 512]
    for case in PARTS["reach"]:
        assert (case.cached, case.q_heads, case.kv_heads, case.head_dim) == ((8192,) * 16, 64, 8, 64)
        assert (case.layout, case.kind, case.page_size, case.window) == ("NHD", "per-tensor", 16, None)
    assert len(PARTS["auto"]) == 30
    assert {case.new[0] for case in PARTS["auto"]} == {1, 8, 16, 32, 64, 128, 256, 512}
    assert {case.cached[0] for case in PARTS["auto"]} == {1024, 8192, 32768}
    assert {len(case.new) for case in PARTS["auto"]} == {1, 16, 64}
    assert all(len(shapes) == 10 for shapes in AUTO.values())
    for case in PARTS["auto"]:  # at 300 TFLOP/s each takes at most 2 ms
        assert 4 * sum(case.new) * case.cached[0] * case.q_heads * case.head_dim < 6e11, case.name
        assert case.cached_bytes < 2e9, case.name
    assert {max(case.cached) for case in PARTS["window"]} >= {1024, 8192, 65536}
    (workspace,) = PARTS["workspace"]
    assert (workspace.workspace, workspace.cached, workspace.new) == (32768, (262144,), (16,))
    assert {(case.layout, case.kind) for case in PARTS["variant"]} == {
        (layout, kind) for layout in ("NHD", "HND", "SHUFFLE") for kind in ("per-tensor", "per-token-head")
    }  # fmt: skip


def test_a_case_knows_its_sizes() -> None:
    case = replace(TINY, cached=(100, 200), new=(7, 5))
    assert (case.lengths, case.rows) == ((107, 205), 14)
    assert case.name == "reach-4q2x16-NHD-per-tensor-2seqs-100+7"
    assert case.cached_bytes == 300 * 2 * 16 * 2
    assert case.read_bytes == 312 * 2 * 16 * 2
    assert replace(case, kind="per-token-head").read_bytes == 312 * 2 * (16 * 2 + 8)
    assert replace(case, window=8).read_bytes == (7 + 7 + 5 + 7) * 2 * 16 * 2
    assert replace(case, window=300).read_bytes == case.read_bytes
    workspace = replace(case, workspace=1000)
    assert workspace.allowed_peak_bytes == int(1.05 * (1000 * 2 * 16 * 2 * 2 + 2 * 12 * 4 * 16 * 4))


def test_the_tensors_have_the_scale_of_attention_inputs() -> None:
    case = replace(TINY, kind="per-token-head", new=(2, 30), cached=(40, 3))
    built = build_prefix(case, CPU, 1)
    assert built.batch.seqlens_q == case.new and built.batch.seqlens_k == case.lengths
    assert built.batch.block_table.shape[1] % 16 == 0
    assert (built.cache.k_kind, built.cache.v_kind) == (case.kind, case.kind)
    for rows in built.cache.gather(built.batch.plan, out_dtype=torch.float32):
        assert 0.7 < rows.std() < 1.4
    again, other = build_prefix(case, CPU, 1), build_prefix(case, CPU, 2)
    assert torch.equal(built.q, again.q) and not torch.equal(built.q, other.q)
