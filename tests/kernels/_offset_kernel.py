"""A kernel that stores the offset of each element of a pool, for `test_address`; importing it needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from kvgather.kernels.address import element_offset


@triton.jit
def offset_kernel(offset_ptr, strides, POOL: tl.constexpr, DIMS: tl.constexpr):
    """`offset_ptr[block, head, page_offset, dim]` int64; one program for each (block, head)."""
    program = tl.program_id(0)
    head = program % POOL.num_heads
    block_id = (program // POOL.num_heads).to(tl.int64)
    page_offset = tl.arange(0, POOL.page_size)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    offset = element_offset(block_id, head, page_offset, dim, strides, POOL)  # [page_size, DIMS]
    first = program * (POOL.page_size * POOL.dim)
    tl.store(offset_ptr + first + page_offset * POOL.dim + dim, offset, mask=dim < POOL.dim)
