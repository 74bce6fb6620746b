"""The gather as anyone would write it first: Python loops over tokens, one element address at a time.

Slow, and independent of everything the package does with pages, records, chunks and tiles. It shares with it the
address of one element and the meaning of a scale's shape, which tests/formats checks on paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvgather.cases import Built
from kvgather.formats.fp8 import FORMATS
from kvgather.formats.layout import Geometry, element_offset

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
UNTOUCHED = 0x5A


def untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of a bit pattern that no test gathers by chance, to see which rows were written."""
    return torch.full((*shape, dtype.itemsize), UNTOUCHED, dtype=torch.uint8, device=device).view(dtype).squeeze(-1)


def first_difference(got: Tensor, wanted: Tensor) -> str:
    """Where two tensors differ in their bits, NaN being equal to NaN; empty if nowhere."""
    assert got.shape == wanted.shape, f"shapes {list(got.shape)} and {list(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"dtypes {got.dtype} and {wanted.dtype}"
    got, wanted = got.cpu(), wanted.cpu()
    bits = BITS[got.element_size()]
    equal = (got.view(bits) == wanted.view(bits)) | (got.float().isnan() & wanted.float().isnan())
    if bool(equal.all()):
        return ""
    at = tuple((~equal).nonzero()[0].tolist())
    return f"{int((~equal).sum())} differ, the first at {list(at)}: got {got[at].item()}, wanted {wanted[at].item()}"


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Both K and V are equal bit for bit, NaN to NaN."""
    for which, ours, theirs in zip("KV", got, wanted, strict=True):
        where = first_difference(ours, theirs)
        assert not where, f"{which}: {where}"


def scale_at(scale: Tensor | float | None, block: int, head: int, slot: int) -> float:
    """The factor of one (block, head, slot), by the rank of the scale."""
    if scale is None:
        return 1.0
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return float(scale)
    return float(scale[{1: (head,), 2: (block, head), 3: (block, head, slot)}[scale.ndim]])


def oracle(built: Built, out: tuple[Tensor, Tensor]) -> None:
    """Fill `out` (K, V) on a CPU from a case's cache, table and offsets."""
    cache, case = built.cache, built.case
    for which, pool, scale, rows in (
        ("key", cache.key_cache, cache.k_scale, out[0]),
        ("value", cache.value_cache, cache.v_scale, out[1]),
    ):
        gather_rows(pool, which, scale, cache.geometry, built.block_table, built.cu_seqlens_k, built.seq_starts, rows)
    assert case.layout == cache.layout


def gather_rows(
    pool: Tensor,
    which: str,
    scale: Tensor | float | None,
    geometry: Geometry,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    seq_starts: Tensor | None,
    rows: Tensor,
) -> None:
    """Fill the rows of one pool; rows of a bad block id or column are NaN."""
    memory = pool.as_strided((pool.untyped_storage().nbytes() // pool.element_size(),), (1,), 0)
    fmt = FORMATS.get(pool.dtype)
    raw = scale is None and rows.dtype == pool.dtype
    nan = torch.tensor([fmt.nan_code], dtype=torch.uint8).view(pool.dtype)[0] if fmt and raw else math.nan
    for b in range(block_table.shape[0]):
        begin, end = int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1])
        start = 0 if seq_starts is None else int(seq_starts[b])
        for i in range(end - begin):
            column, slot = divmod(start + i, geometry.page_size)
            there = start >= 0 and column < block_table.shape[1]
            block = int(block_table[b, column]) if there else -1
            for head in range(geometry.num_kv_heads):
                for dim in range(rows.shape[2]):
                    if not 0 <= block < geometry.num_blocks:
                        rows[begin + i, head, dim] = nan
                        continue
                    at = pool.storage_offset() + element_offset(pool, geometry.layout, which, block, head, slot, dim)
                    held = memory[at]
                    if raw:
                        rows[begin + i, head, dim] = held
                        continue
                    factor = torch.tensor(scale_at(scale, block, head, slot), dtype=torch.float32)
                    value = held.float() if scale is None else held.float() * factor
                    rows[begin + i, head, dim] = value.to(rows.dtype)
