"""Which layers the Hopper kernel attends: what it can run, where it is faster, and in which form.

Measured on one H100, FP8 pages of 16 tokens, BF16 q, without the write, in µs, by `kvgather bench prefix --peers`
(`benchmarks/results/peers_h100.csv`); FA3 is FlashAttention-3, with a BF16 pool, and with an FP8 pool and q:

    query heads / KV heads × head dim    sequences × (cached + new)    Hopper    direct    FA3 BF16    FA3 FP8
    32/8 × 128                                    16 × (8,192 + 16)       117       141         191        116
                                                 16 × (8,192 + 128)       547       892         469        525
                                                 16 × (8,192 + 512)     2,250     3,650       1,760      1,897
                                                  64 × (2,048 + 32)       181       276         218        167
                                                 64 × (2,048 + 128)       648     1,000         557        623
    64/8 × 64                                     16 × (8,192 + 16)       102       130         129        113
                                                 16 × (8,192 + 128)       710       871         673        619
                                                 16 × (8,192 + 512)     2,837     3,527       2,325      2,171
                                                  64 × (2,048 + 16)       125       138         151        132
                                                 64 × (2,048 + 128)       850       957         782        747

The error against float64 is 1.7e-3. Where the kernel is taken, `wins`, follows from `tools/hopper_bounds.py`, which
times both kernels on more shapes (`benchmarks/results/hopper_bounds_h100.csv`).

What the kernel spends its time on, for 16 × 8,192 cached, in µs, in another run. Here and below, changed kernels were
timed that are not kept:

    head dim, new tokens              64, 16    64, 128    128, 16    128, 128    128, 512
    all, codes through registers         106        704        138         532       2,224
    nothing loaded, one code everywhere   93        694         86         497       1,972
    nothing loaded or stored              84        632         80         421       1,724
    nothing multiplied                    93        463        126         365       1,303
    no powers in the softmax             102        619        137         521       2,119

With few rows, loading takes longest: codes that are copied to shared memory (`cp.async`), 2 tiles of K and of V on
their way for head dim 128 and 4 for 64, took 118 instead of 138 for 16 new tokens of head dim 128. With many, the
stores of tiles compete with the products for shared memory, and copies make it worse: in one run, 571 instead of 558
for 128 new tokens of head dim 128, and 745 instead of 707 of head dim 64. If consumers share 64 rows, 8 new tokens of
head dim 64 take 66; with 64 rows each, 70 to 74.

Other forms were slower, in µs at 128 new tokens. At a time when the kernel took 560 with head dim 128 and 710 with 64:

    dim 128    one producer 575; 208 and 48 registers 582, 192 and 64 624; polynomials for some of the powers 599
    dim 64     two producers 800 to 823

and before the softmax was a tree:

    dim 128    tiles of 64 keys, Q in registers 594; turns 610; without overlap 639; 192 rows 925
    dim 64     Q in registers 789; turns 788; 192 rows 816

Barriers of their own for K and V, which empty K before the softmax, changed nothing: 543, and 2,141 at 512 new tokens;
a third tile of V, or of K, in shared memory: 545 and 558. Not compiled without spills: 256 rows, 192 rows × 128 keys,
three consumers with two producers, three consumers with P in words. The softmax in two halves of the keys, with Q K
issued ahead, makes ptxas run one `wgmma` after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..cache import PagedKVCache
from ..device import interpreting

LEAST_ROWS = 17
"""With fewer rows of a (sequence, KV head), and for decode, the direct kernel stays."""


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
    """

    rows: int
    producers: int
    stages: int
    copied: int
    consumer_registers: int
    producer_registers: int

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


FEW = {64: Form(64, 2, 3, 4, 176, 80), 128: Form(128, 2, 2, 2, 208, 48)}
"""By head dim, at most one tile of rows: reading the pages takes longest."""
MANY = {64: Form(128, 1, 2, 0, 216, 72), 128: Form(128, 2, 2, 0, 200, 56)}
"""More rows: products and conversions take longest, and tiles after the first one find the pages in the L2."""


class Least(NamedTuple):
    """Below these, the direct kernel stays.

    Attributes:
        busy: part of the multiprocessors that have a program, averaged over the waves of programs, each of which has a
            multiprocessor for itself. The direct kernel splits keys over programs.
        keys: of a sequence, on average. A program takes long to begin and to end.
    """

    busy: float
    keys: int


LEAST = {
    FEW[64]: Least(0.7, 2048),
    FEW[128]: Least(0.7, 1024),
    MANY[64]: Least(0.84, 2048),
    MANY[128]: Least(0.6, 512),
}


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


def wins(
    new: Sequence[int], keys: float, dim: int, group: int, kv_heads: int, processors: int, most: int | None = None
) -> bool:
    """Whether the kernel is faster than the direct kernel: on most of what was measured 1.1 × as fast or more.

    Args:
        new: new tokens of each sequence, or their average for each.
        keys: of a sequence, on average.
        dim: head dim, 64 or 128.
        group, kv_heads: query heads per KV head, and KV heads.
        processors: of the GPU.
        most: the most new tokens of a sequence; None: of `new`.
    """
    most = max(new, default=0) if most is None else most
    form = form_for(dim, most * group)
    least = LEAST[form]
    if most < 2 or most * group < LEAST_ROWS or keys < least.keys:
        return False
    programs = sum(-(-tokens * group // form.rows) for tokens in new) * kv_heads
    return programs >= least.busy * -(-programs // processors) * processors > 0


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
        group, most = q_heads // g.num_kv_heads, min(batch.max_q, n)
        if not forced:
            count = max(1, batch.num_sequences)
            new = (-(-batch.total_q // count),) * count if batch.seqlens_q is None else batch.seqlens_q
            keys = min(batch.max_k, batch.total_k / count)
            processors = torch.cuda.get_device_properties(g.device).multi_processor_count
            if not wins(new, keys, g.head_dim, group, g.num_kv_heads, processors, most):
                return (None,)
        return (form_for(g.head_dim, most * group),)

    key = ("hopper", n, q_heads, dtype, window, interpreting(), forced, likeness)
    form: Form | None = batch.decided(key, decide)[0]
    return form
