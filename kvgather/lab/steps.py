"""From one program per (token, head) to the page tile, one change at a time: the kernels of chapter 07.

Step 0 is `before_fix.gather_one_head_kernel`, the last step is the package's own kernel; between them are the four
kernels of this file. They share the package's formula for the address of an element (`kernels.address`); a step changes
which program reads an element, and when. They are for reading: pools in NHD or SHUFFLE, contiguous, FP8, one scale for
all of K and one for all of V, sizes that are powers of two, and a plan whose block ids are good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache import PagedKVCache
from ..device import fp8_support, interpreting, require_triton
from ..formats.checks import check_tensor, described, share_elements
from ..formats.fp8 import FLOATS, FORMATS
from ..formats.layout import Which, pool_shape
from ..gather.dispatch import check_made_for
from ..kernels.address import PoolForm, element_offset, pool_strides
from ..kernels.launch import launching
from ..kernels.pages import load_record
from ..kernels.values import decode_fp8, round_to
from ..plan import GatherPlan


@triton.jit
def finish(codes, scale, dtype: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr):
    """FP8 codes times their scale, rounded; decoded with integer operations unless HARDWARE."""
    return round_to(decode_fp8(codes, CODE, HARDWARE) * scale, dtype, not HARDWARE)


@triton.jit
def page_per_program_kernel(
    record_ptr,  # [records, 4] int32: block, first row, rows, page offset of the first row
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
    k_out_ptr, v_out_ptr,  # [rows, heads, dim]
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,  # block, head, slot group, slot, dim group, dim
    K: tl.constexpr, V: tl.constexpr,  # a `PoolForm` each
    CODE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Step 1: a program for each (page, head); its tokens one after the other."""
    record, head = tl.program_id(0) // K.num_heads, tl.program_id(0) % K.num_heads
    block_id, first_row, rows, first_offset = load_record(record_ptr, record)
    k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    dim = tl.arange(0, K.dim)
    row, page_offset = first_row.to(tl.int64), first_offset
    while page_offset < first_offset + rows:
        k = tl.load(k_ptr + element_offset(block_id, head, page_offset, dim, K_STRIDES, K))  # [dim]
        v = tl.load(v_ptr + element_offset(block_id, head, page_offset, dim, V_STRIDES, V))
        out = (row * K.num_heads + head) * K.dim + dim
        tl.store(k_out_ptr + out, finish(k, k_scale, k_out_ptr.dtype.element_ty, CODE, HARDWARE))
        tl.store(v_out_ptr + out, finish(v, v_scale, v_out_ptr.dtype.element_ty, CODE, HARDWARE))
        row += 1
        page_offset += 1


@triton.jit
def tile_kernel(
    record_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_out_ptr, v_out_ptr,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Step 2: the page's tokens all at once, a tile `[page, dim]`; the mask excludes slots outside the record."""
    record, head = tl.program_id(0) // K.num_heads, tl.program_id(0) % K.num_heads
    block_id, first_row, rows, first_offset = load_record(record_ptr, record)
    k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    page_offset, dim = tl.arange(0, K.page_size)[:, None], tl.arange(0, K.dim)[None, :]
    wanted = (page_offset >= first_offset) & (page_offset < first_offset + rows)  # [page, 1]
    k = tl.load(k_ptr + element_offset(block_id, head, page_offset, dim, K_STRIDES, K), mask=wanted, other=0)
    v = tl.load(v_ptr + element_offset(block_id, head, page_offset, dim, V_STRIDES, V), mask=wanted, other=0)
    row = first_row.to(tl.int64) - first_offset + page_offset
    out = (row * K.num_heads + head) * K.dim + dim  # [page, dim]
    tl.store(k_out_ptr + out, finish(k, k_scale, k_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)
    tl.store(v_out_ptr + out, finish(v, v_scale, v_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)


@triton.jit
def whole_page_kernel(
    record_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_out_ptr, v_out_ptr,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Step 3: read the whole page without a mask, because all of it is in the pool; mask the store alone."""
    record, head = tl.program_id(0) // K.num_heads, tl.program_id(0) % K.num_heads
    block_id, first_row, rows, first_offset = load_record(record_ptr, record)
    if rows == 0:  # an unused record names no page
        return
    k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    page_offset, dim = tl.arange(0, K.page_size)[:, None], tl.arange(0, K.dim)[None, :]
    wanted = (page_offset >= first_offset) & (page_offset < first_offset + rows)  # [page, 1]
    k = tl.load(k_ptr + element_offset(block_id, head, page_offset, dim, K_STRIDES, K))
    v = tl.load(v_ptr + element_offset(block_id, head, page_offset, dim, V_STRIDES, V))
    row = first_row.to(tl.int64) - first_offset + page_offset
    out = (row * K.num_heads + head) * K.dim + dim  # [page, dim]
    tl.store(k_out_ptr + out, finish(k, k_scale, k_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)
    tl.store(v_out_ptr + out, finish(v, v_scale, v_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)


@triton.jit
def all_heads_kernel(
    record_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_out_ptr, v_out_ptr,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Step 4: a program for each page, with all its heads: the rows it writes are one run of memory."""
    block_id, first_row, rows, first_offset = load_record(record_ptr, tl.program_id(0))
    if rows == 0:
        return
    k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    page_offset = tl.arange(0, K.page_size)[:, None, None]
    head, dim = tl.arange(0, K.num_heads)[None, :, None], tl.arange(0, K.dim)[None, None, :]
    wanted = (page_offset >= first_offset) & (page_offset < first_offset + rows)  # [page, 1, 1]
    k = tl.load(k_ptr + element_offset(block_id, head, page_offset, dim, K_STRIDES, K))
    v = tl.load(v_ptr + element_offset(block_id, head, page_offset, dim, V_STRIDES, V))
    row = first_row.to(tl.int64) - first_offset + page_offset
    out = (row * K.num_heads + head) * K.dim + dim  # [page, heads, dim]
    tl.store(k_out_ptr + out, finish(k, k_scale, k_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)
    tl.store(v_out_ptr + out, finish(v, v_scale, v_out_ptr.dtype.element_ty, CODE, HARDWARE), mask=wanted)


@dataclass(frozen=True)
class Step:
    """One kernel of the chapter.

    Attributes:
        name: what it does, as in rows of measurements and in tables.
        kernel: the Triton kernel.
        all_heads: whether a program takes all heads of a page, or one.
    """

    name: str
    kernel: Any
    all_heads: bool = False

    def num_warps(self, page_size: int, num_heads: int, head_dim: int, lanes: int = 32) -> int:
        """Warps of a program: Triton's 4 where it moves rows, a lane for each 16 codes of K where it moves tiles.

        Args:
            page_size, num_heads, head_dim: of the cache.
            lanes: of a warp; the waves of AMD's server GPUs have 64.
        """
        if self.kernel is page_per_program_kernel:
            return 4
        codes = page_size * head_dim * (num_heads if self.all_heads else 1)
        return max(1, min(16, codes // (16 * lanes)))


STEPS = (
    Step("1 page per program", page_per_program_kernel),
    Step("2 tile", tile_kernel),
    Step("3 whole page", whole_page_kernel),
    Step("4 all heads", all_heads_kernel, all_heads=True),
)


def constants_of(
    layout: str, dtype: torch.dtype, page_size: int, num_heads: int, head_dim: int, hardware: bool
) -> dict[str, Any]:
    """The constexpr values that the four kernels take; `hardware` says whether the GPU decodes this FP8 itself."""
    constants: dict[str, Any] = {"CODE": FORMATS[dtype], "HARDWARE": hardware}
    sides: tuple[tuple[str, Which], ...] = (("K", "key"), ("V", "value"))
    for name, which in sides:
        shape = pool_shape(layout, which, 1, page_size, num_heads, head_dim, dtype.itemsize)
        pool = torch.empty(shape, dtype=dtype, device="meta")
        form = PoolForm.of(pool, layout, which, "per-tensor")
        constants |= {name: form, f"{name}_STRIDES": pool_strides(pool, layout, which, form)}
    return constants


def gather(step: Step, cache: PagedKVCache, plan: GatherPlan, out: tuple[Tensor, Tensor]) -> None:
    """Gather K and V with one of the steps.

    Args:
        step: one of `STEPS`.
        cache: contiguous FP8 pools, NHD or SHUFFLE, one scale each.
        plan: made for this cache, of block ids that are all in the pool. On a CPU this is checked; on a GPU the check
            would synchronize, and the caller calls `plan.check()`.
        out: K and V, at least `[plan.total_tokens, heads, dim]` each, contiguous; written in place.

    Raises:
        TypeError, ValueError: the cache is not one that these kernels are written for, or `plan` or `out` does not fit
            the cache.
    """
    _check_cache(cache)
    _check_plan(cache, plan)
    _check_out(cache, plan, out)
    require_triton(cache.key_cache.device)
    interpreted = interpreting()
    hardware = not interpreted and fp8_support(cache.key_cache.device)[cache.key_cache.dtype] == "hardware"
    g = cache.geometry
    lanes = 32 if interpreted else triton.runtime.driver.active.get_current_target().warp_size
    programs = len(plan.records) * (1 if step.all_heads else g.num_kv_heads)
    if programs == 0:
        return
    with launching(cache.key_cache, interpreted):
        step.kernel[(programs,)](
            plan.records, cache.key_cache.view(torch.uint8), cache.value_cache.view(torch.uint8),
            cache.k_scale, cache.v_scale, *out,
            **constants_of(g.layout, g.dtype, g.page_size, g.num_kv_heads, g.head_dim, hardware),
            num_warps=step.num_warps(g.page_size, g.num_kv_heads, g.head_dim, lanes),
        )  # fmt: skip


def _check_cache(cache: PagedKVCache) -> None:
    g = cache.geometry
    if g.layout not in ("NHD", "SHUFFLE"):
        raise ValueError(f"cache has layout {g.layout}; accepted: NHD, SHUFFLE")
    if g.dtype not in FORMATS:
        raise ValueError(f"cache holds {g.dtype}; accepted: {', '.join(map(str, FORMATS))}")
    powers = all(n & (n - 1) == 0 for n in (g.page_size, g.num_kv_heads, g.head_dim))
    if not powers or g.head_dim != g.v_head_dim:
        raise ValueError(
            f"cache has pages of {g.page_size} tokens, {g.num_kv_heads} heads, K of {g.head_dim} and V of "
            f"{g.v_head_dim}; accepted: powers of two, K and V alike"
        )
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if scale is None or scale.numel() != 1:
            raise ValueError(f"{name} is {None if scale is None else list(scale.shape)}; accepted: one element")
    for name, pool in (("key_cache", cache.key_cache), ("value_cache", cache.value_cache)):
        _check_contiguous(pool, name)


def _check_plan(cache: PagedKVCache, plan: GatherPlan) -> None:
    if not isinstance(plan, GatherPlan):
        raise TypeError(f"plan is {described(plan)}; accepted: a GatherPlan, from GatherPlan.build(...)")
    check_made_for(cache.geometry, "plan", plan.page_size, plan.num_blocks, plan.device)
    if plan.device.type == "cpu":
        plan.check()


def _check_out(cache: PagedKVCache, plan: GatherPlan, out: tuple[Tensor, Tensor]) -> None:
    g = cache.geometry
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out is {described(out)}; accepted: a pair of tensors (K, V)")
    for i, tensor in enumerate(out):
        name = f"out[{i}]"
        check_tensor(tensor, name, ndim=3, dtypes=FLOATS, device=g.device)
        if tensor.shape[0] < plan.total_tokens or tensor.shape[1:] != (g.num_kv_heads, g.head_dim):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted: at least {plan.total_tokens} rows of "
                f"[{g.num_kv_heads}, {g.head_dim}]"
            )
        _check_contiguous(tensor, name)
        if any(share_elements(tensor, other) for other in (cache.key_cache, cache.value_cache, *out[:i])):
            raise ValueError(f"{name} shares memory with a pool or the other output; accepted: memory of its own")


def _check_contiguous(tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; accepted: contiguous tensors")
