"""FlashAttention-3 and FlashInfer in plain torch: they check their arguments as the real ones do."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvgather.attention.reference import reference_attention

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
NAMESPACE = "fake_fa3"
"""Of the extension's operators; not the real one, which an installed vLLM registers."""


def attend(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_ids: list[list[int]], cu_q: Tensor, lengths: list[int],
    scales: tuple[Any, Any, Any] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Attention over pages, page by page; scales are numbers or `[sequences, kv_heads]`."""
    outs = []
    for sequence, (ids, length) in enumerate(zip(block_ids, lengths, strict=True)):
        rows = q[int(cu_q[sequence]) : int(cu_q[sequence + 1])].float()
        k, v = (torch.cat([pool[block] for block in ids]).float()[:length] for pool in (k_pool, v_pool))
        q_scale, k_scale, v_scale = (s[sequence][:, None] if isinstance(s, Tensor) else s or 1.0 for s in scales)
        if isinstance(q_scale, Tensor):
            q_scale = q_scale.repeat_interleave(rows.shape[1] // k.shape[1], 0)
        offsets = (torch.tensor([0, n]) for n in (len(rows), length))
        outs.append(reference_attention(rows * q_scale, k * k_scale, v * v_scale, *offsets)[0])
    return torch.cat(outs).to(BF16)


def checked_by_fa3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, max_seqlen_q: int, page_table: Tensor,
    softmax_scale: float, causal: bool, descales: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """What FlashAttention-3 demands of the arguments of a paged call, and the result."""
    batch, heads = len(seqused_k), k.shape[2]
    assert q.dtype == k.dtype == v.dtype and k.shape[0] == v.shape[0] and causal
    assert {tensor.dtype for tensor in (page_table, cu_seqlens_q, seqused_k)} == {torch.int32}
    assert page_table.stride(1) == 1 and cu_seqlens_q.is_contiguous() and seqused_k.is_contiguous()
    assert page_table.shape[0] == batch and cu_seqlens_q.shape == (batch + 1,) and page_table.min() >= 0
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and softmax_scale == q.shape[2] ** -0.5
    assert page_table.shape[1] == -(-int(seqused_k.max()) // k.shape[1])
    for scale in descales:
        assert (scale is None) == (q.dtype != FP8)
        assert scale is None or (scale.shape == (batch, heads) and scale.dtype == torch.float32)
    pages = -(-seqused_k // k.shape[1])
    ids = [row[:n].tolist() for row, n in zip(page_table, pages.tolist(), strict=True)]
    return attend(q, k, v, ids, cu_seqlens_q, seqused_k.tolist(), descales)


def scheduled(
    *, batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype, cu_seqlens_q: Tensor, page_size: int, causal: bool,
) -> Tensor:  # fmt: skip
    """Both packages' `get_scheduler_metadata`: a schedule that names what it was made for."""
    assert len(cache_seqlens) == batch_size == len(cu_seqlens_q) - 1 and max_seqlen_k >= cache_seqlens.max()
    assert causal and page_size == 16 and headdim == 16
    return torch.tensor([max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, qkv_dtype.itemsize], dtype=torch.int32)


def check_schedule(metadata: Tensor | None, q: Tensor, k: Tensor, max_q: int, max_k: int) -> None:
    assert metadata is not None and metadata.tolist() == [max_q, max_k, q.shape[1], k.shape[2], q.itemsize]


class Vllm(ModuleType):
    """`vllm.vllm_flash_attn` of vLLM 0.20."""

    get_scheduler_metadata = staticmethod(scheduled)

    @staticmethod
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
        seqused_k: Tensor, softmax_scale: float, causal: bool, block_table: Tensor, scheduler_metadata: Tensor,
        fa_version: int, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert fa_version == 3 and max_seqlen_k == seqused_k.max()
        check_schedule(scheduler_metadata, q, k, max_seqlen_q, max_seqlen_k)
        scales = q_descale, k_descale, v_descale
        return checked_by_fa3(
            q, k, v, cu_seqlens_q, seqused_k, max_seqlen_q, block_table, softmax_scale, causal, scales
        )  # fmt: skip


class Interface(ModuleType):
    """`flash_attn_interface` of FlashAttention's hopper folder."""

    get_scheduler_metadata = staticmethod(scheduled)

    @staticmethod
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
        max_seqlen_q: int, softmax_scale: float, causal: bool, scheduler_metadata: Tensor,
        q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        # Without max_seqlen_k the kernel takes all columns of the table, and so must the schedule.
        check_schedule(scheduler_metadata, q, k_cache, max_seqlen_q, page_table.shape[1] * k_cache.shape[1])
        scales = q_descale, k_descale, v_descale
        return checked_by_fa3(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, max_seqlen_q, page_table, softmax_scale, causal, scales
        )  # fmt: skip


FWD = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor?
cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int?
max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float
softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, bool
is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int
cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
SCHEDULE = """get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int
num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, Tensor?
cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new,
bool is_causal, int window_size_left, int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa, int
sm_margin) -> Tensor"""
"""The operators' schemas in the extension of vLLM 0.20.2."""


def fwd(*values: Any) -> list[Tensor]:
    names = [argument.name for argument in getattr(torch.ops, NAMESPACE).fwd.default._schema.arguments]
    given = dict(zip(names, values, strict=True))
    used = {
        name: given.pop(name)
        for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "page_table", "softmax_scale")
    }
    scales = given.pop("q_descale"), given.pop("k_descale"), given.pop("v_descale")
    max_k = given.pop("max_seqlen_k")
    assert max_k == used["seqused_k"].max()
    check_schedule(given.pop("scheduler_metadata"), used["q"], used["k"], used["max_seqlen_q"], max_k)
    out = checked_by_fa3(**used, causal=given.pop("is_causal"), descales=scales)
    assert {name: value for name, value in given.items() if value is not None} == {
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True,
        "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
    }  # fmt: skip
    return [out, *torch.zeros(3, 1)]  # lse and two partial results


def schedule(*values: Any) -> Tensor:
    operator = getattr(torch.ops, NAMESPACE).get_scheduler_metadata.default
    given = dict(zip((argument.name for argument in operator._schema.arguments), values, strict=True))
    assert given.pop("headdim_v") == given["headdim"] and given.pop("max_seqlen_k_new") == given.pop("num_splits") == 0
    assert given.pop("window_size_left") == given.pop("window_size_right") == -1
    assert not given.pop("has_softcap") and given.pop("sm_margin") == 0
    names = {"num_heads": "num_heads_q", "num_heads_k": "num_heads_kv", "seqused_k": "cache_seqlens"}
    names |= {"is_causal": "causal"}
    return scheduled(**{names.get(name, name): value for name, value in given.items() if value is not None})


class FlashInfer(ModuleType):
    """`flashinfer` 0.6.8: two wrappers that plan and run."""

    __version__ = "0.6.8"

    class Wrapper:
        decode = False

        def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str, use_tensor_cores: bool = False) -> None:
            assert workspace.dtype == torch.uint8 and workspace.numel() >= 2**27 and not workspace[:8].any()
            assert (kv_layout, backend, use_tensor_cores) == ("NHD", "fa2", self.decode)

        def _plan(
            self, cu_q: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor, q_heads: int, kv_heads: int,
            head_dim: int, page_size: int, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        ) -> None:  # fmt: skip
            assert {tensor.dtype for tensor in (indptr, indices, last_page_len)} == {torch.int32}
            assert len(indices) == indptr[-1] and len(last_page_len) == len(indptr) - 1 and indices.min() >= 0
            assert (q_heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type) == (4, 2, 16, 16, BF16, FP8)
            ids = [indices[begin:end].tolist() for begin, end in pairwise(indptr.tolist())]
            lengths = [(len(of) - 1) * page_size + last for of, last in zip(ids, last_page_len.tolist(), strict=True)]
            self.planned = ids, cu_q, lengths

        def run(
            self, q: Tensor, pools: tuple[Tensor, Tensor], *, k_scale: float, v_scale: float, out: Tensor
        ) -> Tensor:
            assert isinstance(k_scale, float) and isinstance(v_scale, float) and out.dtype == q.dtype
            return out.copy_(attend(q, *pools, *self.planned, scales=(None, k_scale, v_scale)))

    class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
        def plan(self, qo_indptr: Tensor, *pages_and_heads: Any, causal: bool, **dtypes: Any) -> None:
            assert causal
            self._plan(qo_indptr, *pages_and_heads, **dtypes)

    class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
        decode = True

        def plan(self, indptr: Tensor, *lists_and_heads: Any, **dtypes: Any) -> None:
            self._plan(torch.arange(len(indptr)), indptr, *lists_and_heads, **dtypes)
