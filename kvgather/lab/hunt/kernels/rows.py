"""A gather of rows from a pool of more than 2 GiB."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BEFORE = 2**31


class NoRoom(ValueError):
    """This machine refuses the addresses of a large pool; the message says how many bytes."""


@triton.jit
def rows_kernel(
    out_ptr, pool_ptr, table_ptr, n, stride_block, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim, inside = tl.arange(0, DIM), token < n
    block = tl.load(table_ptr + token // PAGE, mask=inside, other=0)
    row = block * stride_block + token % PAGE * DIM
    codes = tl.load(pool_ptr + row[:, None] + dim, mask=inside[:, None], other=0)
    tl.store(out_ptr + token[:, None] * DIM + dim, codes, mask=inside[:, None])


def gather_rows(out: Tensor, pool: Tensor, table: Tensor, kernel: Any = rows_kernel) -> None:
    """Copy the blocks of `pool` that `table` [pages] int32 names to `out` [pages * page_size, dim].

    `pool` is [blocks, page_size, dim], uint8. Blocks may be far apart, rows of a block are consecutive.
    """
    (n, dim), page_size = out.shape, pool.shape[1]
    kernel[(triton.cdiv(n, 16),)](out, pool, table, n, pool.stride(0), PAGE=page_size, DIM=dim, BLOCK=16)


def oracle(out: Tensor, pool: Tensor, table: Tensor) -> dict[str, Tensor]:
    """The rows by indexing."""
    return {"out": pool[table.long()].reshape(out.shape)}


def inputs(table: list[int], blocks: int, stride: int = 2**20) -> dict[str, Any]:
    """A pool of `blocks` blocks of 4 × 8 bytes, `stride` bytes apart: gigabytes of addresses, few pages of memory.

    Raises:
        NoRoom: the machine maps no such range of addresses.
    """
    flat = _lazy_bytes((blocks - 1) * stride + 32)
    pool = flat.as_strided((blocks, 4, 8), (stride, 8, 1))
    used = {block + wrapped * 2**32 // stride for block in table for wrapped in (-1, 0)}
    for block in sorted(block for block in used if 0 <= block < blocks):
        pool[block] = torch.randint(1, 255, (4, 8), generator=torch.Generator().manual_seed(block), dtype=torch.uint8)
    return {
        "out": torch.zeros(len(table) * 4, 8, dtype=torch.uint8),
        "pool": pool,
        "table": torch.tensor(table, dtype=torch.int32),
    }


def _lazy_bytes(nbytes: int) -> Tensor:
    """Zeros that take memory only where they are touched, with 2 GiB before them that fault."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        pages = mmap.mmap(-1, BEFORE + nbytes, **({"flags": flags} if flags else {}))
    except (OSError, OverflowError, ValueError) as error:
        raise NoRoom(
            f"this machine maps no {BEFORE + nbytes:,} bytes of addresses, which this bug needs: {error}"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page for each touched byte would fill the whole range
    if sys.platform != "win32":
        # On a GPU there is nothing before a pool. Here another mapping could be there, and the outcome would vary.
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(BEFORE), 0)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=BEFORE)
