"""The gather before the fix: one program per (token, head), and a flag that states the kind of the scale.

Our rewrite of upstream's kernel, with its bug: 21 arguments, the page size a constexpr. With `PER_TOKEN` the kernel
indexes the scale as `[block, head, slot]`. The launcher sets `PER_TOKEN` from the caller's flag without a check of the
scale's shape, so that a one-element scale is read far beyond its end. `kvgather.gather` is the correct gather.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvgather.device import interpreting, require_triton
from kvgather.kernels.launch import launching

LAYOUTS = ("NHD", "SHUFFLE")


@triton.jit
def gather_one_head_kernel(
    key_cache_ptr,  # NHD [blocks, page, heads, dim]; SHUFFLE [blocks, heads, dim/x, page, x]
    value_cache_ptr,  # NHD [blocks, page, heads, dim]; SHUFFLE [blocks, heads, page/x, dim, x]
    key_ptr,  # [tokens, heads, dim]
    value_ptr,  # [tokens, heads, dim]
    block_tables_ptr,  # [batch, max_blocks]
    k_scale_ptr,
    v_scale_ptr,
    cu_seqlens_ptr,  # [batch + 1]
    token_to_batch_ptr,  # [tokens]
    seq_starts_ptr,  # [batch]
    num_heads,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_LANES: tl.constexpr,
    V_LANES: tl.constexpr,
    X: tl.constexpr,
    SHUFFLE: tl.constexpr,
    DEQUANT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)

    batch = tl.load(token_to_batch_ptr + token)
    position = token - tl.load(cu_seqlens_ptr + batch) + tl.load(seq_starts_ptr + batch)
    block = tl.load(block_tables_ptr + batch * stride_table + position // PAGE_SIZE).to(tl.int64)
    slot = position % PAGE_SIZE

    k_dim = tl.arange(0, K_LANES)
    v_dim = tl.arange(0, V_LANES)
    if SHUFFLE:
        page = (block * num_heads + head) * PAGE_SIZE
        k_at = page * K_DIM + (k_dim // X) * PAGE_SIZE * X + slot * X + k_dim % X
        v_at = page * V_DIM + (slot // X) * V_DIM * X + v_dim * X + slot % X
    else:
        row = (block * PAGE_SIZE + slot) * num_heads + head
        k_at = row * K_DIM + k_dim
        v_at = row * V_DIM + v_dim
    k = tl.load(key_cache_ptr + k_at, mask=k_dim < K_DIM, other=0.0)
    v = tl.load(value_cache_ptr + v_at, mask=v_dim < V_DIM, other=0.0)

    if DEQUANT:
        if PER_TOKEN:
            scale_at = (block * num_heads + head) * PAGE_SIZE + slot  # [block, head, slot]
        else:
            scale_at = block * 0  # element 0
        k_scale = tl.load(k_scale_ptr + scale_at)
        v_scale = tl.load(v_scale_ptr + scale_at)
        k = k.to(tl.float32) * k_scale
        v = v.to(tl.float32) * v_scale

    out_row = token.to(tl.int64) * num_heads + head
    tl.store(key_ptr + out_row * K_DIM + k_dim, k.to(key_ptr.dtype.element_ty), mask=k_dim < K_DIM)
    tl.store(value_ptr + out_row * V_DIM + v_dim, v.to(value_ptr.dtype.element_ty), mask=v_dim < V_DIM)


def cp_mha_gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    cu_seqlens_kv: Tensor,
    token_to_batch: Tensor,
    seq_starts: Tensor,
    dequant: bool,
    kv_cache_layout: str,
    total_tokens: int,
    per_token_quant: bool = True,
) -> None:
    """Gather K and V from a paged cache, without a check of the scales' shapes against `per_token_quant`: the bug.

    With the default flag and a scale of fewer elements than `[blocks, heads, page]` this reads outside the
    scale: run it fenced, traced, or in a child process. Under Triton's interpreter float32 results are exact
    for finite FP8 codes; bfloat16 is truncated instead of rounded, and some versions reject e4m3fnuz.

    Args:
        key_cache, value_cache: contiguous pools, NHD `[blocks, page, heads, dim]` or SHUFFLE.
        key, value: outputs `[tokens, heads, dim]`, written in place.
        block_tables: `[batch, max_blocks]` int32.
        k_scales, v_scales: FP32 tensors, or None if `dequant` is False.
        cu_seqlens_kv: `[batch + 1]` int32, prefix sums of the tokens to gather.
        token_to_batch: `[tokens]` int32, the sequence of each token.
        seq_starts: `[batch]` int32, the position of the first gathered token of each sequence.
        dequant: whether to multiply by the scales.
        kv_cache_layout: "NHD" or "SHUFFLE".
        total_tokens: number of tokens to gather.
        per_token_quant: True indexes the scales as `[block, head, slot]`, False reads element 0 of each scale.

    Raises:
        ValueError: the layout is unknown, a pool is not contiguous, or a scale is missing.
    """
    if kv_cache_layout not in LAYOUTS:
        raise ValueError(f"kv_cache_layout is {kv_cache_layout!r}; accepted: {', '.join(LAYOUTS)}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("key_cache or value_cache is not contiguous; accepted: contiguous pools")
    if dequant and (k_scales is None or v_scales is None):
        raise ValueError("k_scales or v_scales is None; accepted with dequant: a tensor each")
    require_triton(key_cache.device)
    if total_tokens == 0:
        return
    launch = raw_launch(
        key_cache,
        value_cache,
        key,
        value,
        block_tables,
        k_scales,
        v_scales,
        cu_seqlens_kv,
        token_to_batch,
        seq_starts,
        dequant,
        kv_cache_layout,
        total_tokens,
        per_token_quant,
    )
    with launching(key_cache, interpreting()):
        launch()


def raw_launch(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    cu_seqlens_kv: Tensor,
    token_to_batch: Tensor,
    seq_starts: Tensor,
    dequant: bool,
    kv_cache_layout: str,
    total_tokens: int,
    per_token_quant: bool = True,
) -> Callable[[], object]:
    """A function that makes one launch `kernel[grid](…)` on the current GPU: the unit of the host-time benchmarks.

    The arguments are not checked. Strides and constants are read once, before the first call, so that the time of a
    call is the time of Triton's launch.

    Args:
        key_cache, value_cache, key, value, block_tables, k_scales, v_scales, cu_seqlens_kv, token_to_batch,
            seq_starts, dequant, kv_cache_layout, total_tokens, per_token_quant: see `cp_mha_gather_cache`;
            at least one token.

    Returns:
        The function, without parameters.
    """
    shuffle = kv_cache_layout == "SHUFFLE"
    page_size = key_cache.shape[3] if shuffle else key_cache.shape[1]
    num_heads, k_dim = key.shape[1:]
    v_dim, grid = value.shape[2], (total_tokens, key.shape[1])
    k_lanes, v_lanes = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    x, stride_table = 16 // key_cache.element_size(), block_tables.stride(0)

    def launch() -> object:
        return gather_one_head_kernel[grid](
            key_cache,
            value_cache,
            key,
            value,
            block_tables,
            k_scales,
            v_scales,
            cu_seqlens_kv,
            token_to_batch,
            seq_starts,
            num_heads,
            stride_table,
            PAGE_SIZE=page_size,
            K_DIM=k_dim,
            V_DIM=v_dim,
            K_LANES=k_lanes,
            V_LANES=v_lanes,
            X=x,
            SHUFFLE=shuffle,
            DEQUANT=dequant,
            PER_TOKEN=per_token_quant,
        )

    return launch


def cp_mha_gather_cache_shipped_fix(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    cu_seqlens_kv: Tensor,
    token_to_batch: Tensor,
    seq_starts: Tensor,
    dequant: bool,
    kv_cache_layout: str,
    total_tokens: int,
    per_token_quant: bool = True,
) -> None:
    """The gather with upstream's fix, in our rewrite: a one-element scale is per-tensor for either value of the flag.

    This fixes the reported case. A per-head scale `[heads]` has more than one element, so the kernel still indexes it
    as `[block, head, slot]` and reads past its end.

    Args:
        key_cache, value_cache, key, value, block_tables, k_scales, v_scales, cu_seqlens_kv, token_to_batch,
            seq_starts, dequant, kv_cache_layout, total_tokens, per_token_quant: see `cp_mha_gather_cache`.

    Raises:
        ValueError: as in `cp_mha_gather_cache`, or one scale has one element and the other has more.
    """
    if dequant and k_scales is not None and v_scales is not None:
        k_is_scalar, v_is_scalar = k_scales.numel() == 1, v_scales.numel() == 1
        if k_is_scalar != v_is_scalar:
            raise ValueError(
                f"k_scales has {k_scales.numel()} elements, v_scales {v_scales.numel()}; "
                "accepted: one each, or several each"
            )
        if k_is_scalar:
            per_token_quant = False
    cp_mha_gather_cache(
        key_cache,
        value_cache,
        key,
        value,
        block_tables,
        k_scales,
        v_scales,
        cu_seqlens_kv,
        token_to_batch,
        seq_starts,
        dequant,
        kv_cache_layout,
        total_tokens,
        per_token_quant,
    )


def token_to_batch(cu_seqlens: Tensor) -> Tensor:
    """The sequence of each token, int32 `[tokens]`, from prefix sums `[batch + 1]`."""
    sequences = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    return sequences.repeat_interleave(cu_seqlens.diff())
