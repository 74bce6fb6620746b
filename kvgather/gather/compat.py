"""`cp_mha_gather_cache`: the fixed gather behind the signature that inference engines call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.checks import check_choice, check_int, check_positive, check_tensor, described
from ..formats.layout import Geometry, group
from ..formats.scale import classify
from ..plan import INDEX_DTYPES, check_table
from .again import gather_table_again
from .dispatch import check_out, check_out_dtype, choose_backend, gather_by_table, resolve_for

_LAYOUTS = ("NHD", "SHUFFLE", "HND")


def cp_mha_gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    k_scales: Tensor | float | None,
    v_scales: Tensor | float | None,
    cu_seqlens_kv: Tensor,
    token_to_batch: Tensor | None,
    seq_starts: Tensor | None,
    dequant: bool,
    kv_cache_layout: str,
    total_tokens: int,
    per_token_quant: bool = True,
) -> None:
    """Fill `key` and `value` with the cached tokens of a batch.

    This is the engines' contract, except where the contract was the bug: the scale's shape determines its kind, and
    `per_token_quant` is only checked against it. One element is per-tensor for any flag, `[heads]` is per-head, K and V
    may differ, and every other shape that does not match both the flag and the cache raises.

    Args:
        key_cache, value_cache: pools in `kv_cache_layout`. SHUFFLE also accepts the engines' form: the shape of NHD,
            `[blocks, page, heads, dim]`, with SHUFFLE's bytes in each block.
        key, value: `[total_tokens, heads, dim]`, filled in place; one float dtype.
        block_tables: `[batch, max_blocks]` int32 or int64.
        k_scales, v_scales: a float, or FP32 of one element, `[heads]` or `[blocks, heads, page]`; ignored if `dequant`
            is False.
        cu_seqlens_kv: `[batch + 1]` prefix sums of the tokens to gather.
        token_to_batch: `[total_tokens]`, each token's sequence. Checked but not read: `cu_seqlens_kv` has the same
            information.
        seq_starts: `[batch]`, the position at which the gather of each sequence begins; None means 0.
        dequant: whether to multiply by the scales.
        kv_cache_layout: "NHD", "SHUFFLE" or "HND".
        total_tokens: tokens to gather, `cu_seqlens_kv[-1]`; the call does not synchronize with the GPU.
        per_token_quant: whether per-token-head scales are accepted.

    A block id outside the pool, or a position outside the table, results in rows of NaN; offsets that decrease or
    exceed `total_tokens` are clamped. `GatherPlan.build(block_tables, cu_seqlens_kv, …).check()` reports both.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing is launched.

    Source: the function of this name in the AITER attention backends of vLLM and ATOM.
    """
    source = key_cache, value_cache, k_scales if dequant is True else None, v_scales if dequant is True else None
    options = (kv_cache_layout, dequant, per_token_quant)
    flags_are_bools = isinstance(dequant, bool) and isinstance(per_token_quant, bool)  # 1 equals True as a key
    table = block_tables, cu_seqlens_kv, seq_starts, token_to_batch
    if flags_are_bools and not torch.compiler.is_compiling():
        if gather_table_again(options, source, (key, value), table, total_tokens):
            return
    check_choice(kv_cache_layout, "kv_cache_layout", _LAYOUTS)
    for name, flag in (("dequant", dequant), ("per_token_quant", per_token_quant)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {described(flag)}; accepted: True or False")
    total_tokens = check_int(total_tokens, "total_tokens")
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache), ("key", key), ("value", value)):
        check_tensor(tensor, name)
    _check_token_to_batch(token_to_batch, total_tokens, key_cache.device)
    if kv_cache_layout == "SHUFFLE" and key_cache.ndim == value_cache.ndim == 4:
        key_cache, value_cache = _shuffled_view(key_cache, "key"), _shuffled_view(value_cache, "value")
    geometry = Geometry.of(key_cache, value_cache, kv_cache_layout)
    if dequant:
        _check_flag(k_scales, "k_scales", geometry, per_token_quant)
        _check_flag(v_scales, "v_scales", geometry, per_token_quant)
    scales = resolve_for(geometry, source[2], "k_scales", None), resolve_for(geometry, source[3], "v_scales", None)
    check_table(*table[:3], ("block_tables", "cu_seqlens_kv", "seq_starts"), geometry.device)
    check_out_dtype(key.dtype, geometry.dtype, scales, "key's dtype")
    pools_and_scales = key_cache, value_cache, source[2], source[3]
    out = check_out((key, value), geometry, total_tokens, key.dtype, pools_and_scales, ("key", "value"))
    backend = choose_backend("auto", geometry.device)
    gather_by_table(pools_and_scales, options, geometry, scales, out, table, total_tokens, backend, source)


def _check_token_to_batch(token_to_batch: Tensor | None, total_tokens: int, device: torch.device) -> None:
    if token_to_batch is None:
        return
    check_tensor(token_to_batch, "token_to_batch", ndim=1, dtypes=INDEX_DTYPES, device=device)
    if token_to_batch.shape[0] < total_tokens:
        raise ValueError(f"token_to_batch has shape {list(token_to_batch.shape)}; accepted: at least [{total_tokens}]")


def _check_flag(scale: Tensor | float | None, name: str, geometry: Geometry, per_token_quant: bool) -> None:
    """Raise unless engines may pass a scale of this shape with this `per_token_quant`."""
    if scale is None:
        raise ValueError(f"{name} is None; accepted with dequant=True: a scale")
    if not isinstance(scale, Tensor):
        check_positive(scale, name, "a tensor or a float")
    blocks, heads, page = geometry.num_blocks, geometry.num_kv_heads, geometry.page_size
    kind = classify(scale, name, num_blocks=blocks, num_heads=heads, page_size=page)
    if kind == "per-page-head" or (kind == "per-token-head" and not per_token_quant):
        shape = list(scale.shape) if isinstance(scale, Tensor) else []
        raise ValueError(
            f"{name} has shape {shape}, {kind}, with per_token_quant={per_token_quant}; accepted for {heads} heads, "
            f"{blocks} blocks, page {page}: one element (per-tensor), [{heads}], and [{blocks}, {heads}, {page}] with "
            "per_token_quant=True"
        )


def _shuffled_view(pool: Tensor, which: str) -> Tensor:
    """View a pool of NHD's four axes with SHUFFLE's five; the elements of each block must be contiguous."""
    blocks, page, heads, dim = pool.shape
    x = group(pool.element_size())
    if pool[:1].numel() and not pool[0].is_contiguous():
        raise ValueError(
            f"{which}_cache has strides {list(pool.stride())}; accepted for SHUFFLE in 4 dimensions: blocks whose "
            "elements are contiguous"
        )
    if page % x or (which == "key" and dim % x):
        raise ValueError(
            f"{which}_cache has page {page} and head_dim {dim}; accepted in SHUFFLE with {pool.element_size()}-byte "
            f"elements: multiples of {x}"
        )
    inner = (heads, dim // x, page, x) if which == "key" else (heads, page // x, dim, x)
    strides = [1]
    for size in reversed(inner[1:]):
        strides.insert(0, strides[0] * size)
    return pool.as_strided((blocks, *inner), (pool.stride(0), *strides))
