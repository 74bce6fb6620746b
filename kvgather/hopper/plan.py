"""Which layers the Hopper kernel attends: what it can run, where it is faster, and in which form.

Measured on one H100, 16 sequences of 8,192 cached tokens, FP8 pages of 16 tokens, BF16 q, without the write, in µs;
auto without this kernel; FA3 is FlashAttention-3, with a BF16 pool, and with an FP8 pool and q:

    query heads / KV heads × head dim    new tokens    Hopper    direct    auto    FA3 BF16    FA3 FP8
    32/8 × 128                                   16       136       140     141         191        116
                                                128       531       876     780         459        510
                                                512     2,160     3,477   2,236       1,732      1,829
    64/8 × 64                                    16       106       130     128         128        113
                                                128       700       859     786         674        620
                                                512     2,730     3,340   2,670       2,287      2,149

Hopper and direct are one run; auto and FA3 are an earlier one on the same kind of GPU, of `kvgather bench prefix
--peers`, which times this kernel as auto where it is chosen. The error against float64 is 1.7e-3. 64 rows of a KV head,
16 tokens of 32/8 × 128, win 3 %: they stay with the direct kernel.

Other forms were slower, in µs at 128 new tokens. At a time when the kernel took 560 with head dim 128 and 710 with 64:

    dim 128    one producer 575; 208 and 48 registers 582, 192 and 64 624; polynomials for some of the powers 599
    dim 64     depth 2 752 to 762; two producers 800 to 823

and before the softmax was a tree:

    dim 128    tiles of 64 keys, Q in registers 594; turns 610; without overlap 639; 192 rows 925
    dim 64     Q in registers 789; turns 788; 192 rows 816

Not compiled without spills: 256 rows, 192 rows × 128 keys, three consumers with two producers, three consumers with P
in words. The softmax in two halves of the keys, with Q K issued ahead, makes ptxas run one `wgmma` after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..cache import PagedKVCache
from ..device import interpreting

LEAST_ROWS = 17
"""With fewer rows of a (sequence, KV head) the direct kernel stays."""
LEAST_KEYS = 1536
"""With fewer keys of a sequence, on average, the direct kernel stays: programs would begin and end too often."""


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for of a tile.

    Attributes:
        rows: of a program, 64 or 128. Two consumers share 64 rows, and each has every other tile of keys.
        producers: warpgroups; of 2, one loads K and one V.
        stages: tiles of K, and of V, in shared memory.
        copied: tiles of codes of K, and of V, on their way to shared memory, with 2 producers; 0 is one, on its way to
            registers.
        consumer_registers, producer_registers: of a thread.
        least_busy: part of the multiprocessors that have a program, averaged over the waves of programs, each of which
            has a multiprocessor for itself. Below, the direct kernel stays: it splits keys over programs.
    """

    rows: int
    producers: int
    stages: int
    copied: int
    consumer_registers: int
    producer_registers: int
    least_busy: float

    @property
    def split(self) -> bool:
        """Whether consumers share rows."""
        return self.rows == 64

    @property
    def apart(self) -> int:
        """A consumer's next tile is so many tiles ahead."""
        return 2 if self.split else 1


@dataclass(frozen=True)
class LayerForm:
    """What the kernel is compiled for of a layer.

    Attributes:
        dim: of K and V.
        page_size: tokens of a block.
        heads, group: KV heads, and query heads of each.
        k_scaled, v_scaled: whether the pool has a scale, one for all.
        sinks: whether heads have a sink.
    """

    dim: int
    page_size: int
    heads: int
    group: int
    k_scaled: bool
    v_scaled: bool
    sinks: bool


FEW = {64: Form(64, 2, 3, 4, 176, 80, 0.7), 128: Form(128, 2, 2, 2, 208, 48, 0.6)}
"""By head dim, at most one tile of rows: reading the pages takes longest."""
MANY = {64: Form(128, 1, 2, 0, 216, 72, 0.84), 128: Form(128, 2, 2, 0, 200, 56, 0.6)}
"""More rows, which find the pages in the L2: products and conversions take longest."""


def form_for(dim: int, rows: int) -> Form:
    """The fastest form for a head dim, 64 or 128, and the most rows of a (sequence, KV head)."""
    few = FEW[dim]
    return few if rows <= few.rows else MANY[dim]


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel compiles for a device: compute capability 9.0 and Triton 3.6 with Gluon."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import triton

        if not triton.__version__.startswith("3.6."):  # Gluon's interface changes from release to release
            return False
        from . import kernel  # noqa: F401
    except ImportError:
        return False
    return True


def runs(cache: PagedKVCache, batch: CheckedBatch, q_heads: int, dtype: torch.dtype, window: int | None) -> bool:
    """Whether the kernel is right for a layer: it then returns what the direct kernel does.

    Args:
        q_heads, dtype: of q.
        window: of the layer, or None.
    """
    g = cache.geometry
    return (
        not interpreting()
        and available(g.device)
        and (g.layout, g.dtype) == ("NHD", torch.float8_e4m3fn)
        and (g.head_dim, g.v_head_dim) in ((64, 64), (128, 128))
        and g.page_size % 16 == 0
        and {cache.k_kind, cache.v_kind} <= {"none", "per-tensor"}
        and dtype in (torch.bfloat16, torch.float16)
        and q_heads % g.num_kv_heads == 0
        and (window is None or window >= batch.max_k)
        and batch.share is None
        and batch.block_table.shape[1] > 0
        and _in_words(cache.key_cache)
        and _in_words(cache.value_cache)
    )


def _in_words(pool: Tensor) -> bool:
    """Whether 16 bytes can be loaded at once from every row, as int32 words, at 32-bit offsets inside a block."""
    from ..kernels.launch import inner_extent  # imports triton, which may be missing

    *outer, inner = pool.stride()
    aligned = all(number % 16 == 0 for number in (pool.data_ptr(), pool.storage_offset(), *outer))
    return aligned and inner == 1 and inner_extent(pool) < 2**31


def wins(batch: CheckedBatch, dim: int, rows: int, group: int, kv_heads: int, processors: int) -> bool:
    """Whether the kernel is at least 1.1 × as fast as the direct kernel.

    Args:
        batch: whose layers it attends.
        dim: head dim.
        rows: the most rows of a (sequence, KV head).
        group, kv_heads: query heads per KV head, and KV heads.
        processors: of the GPU.
    """
    keys = batch.max_k if batch.seqlens_k is None else sum(batch.seqlens_k) / max(1, batch.num_sequences)
    if rows < LEAST_ROWS or keys < LEAST_KEYS:
        return False
    form = form_for(dim, rows)
    lengths = (batch.max_q,) * batch.num_sequences if batch.seqlens_q is None else batch.seqlens_q
    programs = sum(-(-new * group // form.rows) for new in lengths) * kv_heads
    return programs >= form.least_busy * -(-programs // processors) * processors > 0


def chosen_form(
    cache: PagedKVCache, batch: CheckedBatch, n: int, q_heads: int, dtype: torch.dtype, window: int | None,
    likeness: int, forced: bool = False,
) -> Form | None:  # fmt: skip
    """The form of the kernel that attends a layer; None for the direct kernel. Decided once for layers that are alike.

    Args:
        n: rows of q.
        q_heads, dtype: of q.
        window: of the layer, or None.
        likeness: the cache's.
        forced: whether the kernel is taken wherever it runs.
    """
    g = cache.geometry

    def decide() -> tuple[Form | None]:
        if not runs(cache, batch, q_heads, dtype, window):
            return (None,)
        group = q_heads // g.num_kv_heads
        rows = min(batch.max_q, n) * group
        processors = torch.cuda.get_device_properties(g.device).multi_processor_count
        if not forced and not wins(batch, g.head_dim, rows, group, g.num_kv_heads, processors):
            return (None,)
        return (form_for(g.head_dim, rows),)

    key = ("hopper", n, q_heads, dtype, window, interpreting(), forced, likeness)
    form: Form | None = batch.decided(key, decide)[0]
    return form
