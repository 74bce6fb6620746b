"""Attention straight from the paged cache: how the work is cut, what `direct_kernel` is compiled for, and its launch.

The kernel and its formula are in `direct_kernel`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..cache import PagedKVCache
from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..formats.layout import Geometry
from ..hopper.plan import LEAST_ROWS, chosen_form
from ..kernels.address import PoolForm, pool_strides
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.merge import combine_kernel
from ..kernels.softmax import LOG2E
from .direct_kernel import LayerForm, TileForm, direct_kernel

WGMMA_ROWS = 64
"""Rows from which on Triton multiplies with an H100's `wgmma` instructions; below, operands go through registers."""
WIDEST_SWIZZLE = 64
"""Elements of 2 bytes in the 128 bytes of the widest swizzle; an operand with rows as wide or wider has this one."""


class Tile(NamedTuple):
    """How the work is cut: `m` rows (token, query head of the group) by `n` keys at a time, keys in `splits` parts."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    splits: int
    registers: int | None = None  # at most so many a thread


def choose_tile(
    rows: int, keys: int, programs: int, k_pad: int, v_pad: int, processors: int, operand_bytes: int = 2,
    layout: str = "NHD",
) -> Tile:  # fmt: skip
    """The tile for a batch, by its bounds alone: within 5 % of the fastest in `benchmarks/results/tiles_h100.csv`.

    Args:
        rows: the most rows of a sequence, new tokens × query heads of a group.
        keys: the most keys of a sequence.
        programs: sequences × KV heads.
        k_pad, v_pad: head dims, rounded up to powers of two.
        processors: of the GPU.
        operand_bytes: of an element as it is multiplied: 4 where q or the pool is FP32.
        layout: of the cache.
    """
    wide, narrow = max(k_pad, v_pad), operand_bytes == 2
    registers = None
    if wide > 128:
        # 64 rows of FP32 would take 272 KiB of shared memory, and an H100 has 227.
        m = min(max(16, triton.next_power_of_2(rows)), 64 if narrow else 16)
        n, num_warps, num_stages, resident = 64, 8, 2, 1
    elif rows <= 16:  # tensor cores fed from registers; how many programs fit on a processor decides
        # 128 registers a thread let 8 programs of 64 columns be resident; of 128 columns they would spill 350 bytes.
        m, n, num_warps, num_stages = 16, 64, 2, 2
        registers, resident = (128, 8) if wide <= 64 else (None, 4)
    elif rows <= 64 or (wide > 64 and not narrow):
        # 128 keys of two FP32 operands of 128 would take 256 KiB.
        m, n, num_warps, num_stages, resident = 64, 128 if wide <= 64 or narrow else 64, 4, 2, 2
    elif wide <= 64:
        m, n, num_warps, num_stages, resident = 128, 128 if narrow else 64, 4, 2, 2
    else:  # a third stage makes SHUFFLE's V, which is transposed on chip, 8 % slower and the others 1 to 5 % faster
        m, n, num_warps, num_stages, resident = 128, 64, 4, 2 if layout == "SHUFFLE" else 3, 2
    tiles = programs * -(-rows // m)
    splits = min(max(1, resident * processors // max(tiles, 1)), 128, max(1, keys // (4 * n)))
    if 64 < splits < 128:  # `combine_kernel` loads a power of two
        splits = 64
    return Tile(m, n, num_warps, num_stages, splits, registers)


def alike_operands(tile: Tile, k_pad: int, v_pad: int) -> tuple[Tile, int, int]:
    """Widen a tile for GPUs whose tensor cores read shared memory, until all operands are stored in one way.

    The cause: from compute capability 9.0 on, tensor cores find an operand in shared memory through a 64-bit
    descriptor. Triton computes it as the address of a buffer plus a constant, whose upper half says how the rows are
    stored and depends on their width up to 128 bytes. K and V, converted from FP8, take turns in one buffer, so two
    families of constants are added to one address. ptxas 12.8.93 (the one of Triton 3.5.1, 3.6.0 and 3.7.1) adds the
    second family, where its upper half is the larger, to a register that it never wrote. The PTX is right; the
    machine code reads V anywhere in shared memory, or past its end.

    What was seen: wrong values, or "Invalid __shared__ read" and a lost context, with K and V padded to 64 and 32 or
    to 32 and 16 (H100, H200; Triton 3.6.0). In the machine code also with 128 and 32 and with 64 and 16, for FP8 pools
    of all formats in NHD, HND and SHUFFLE, with one loop and with two; not for 16-bit pools, whose buffers have two
    addresses. With one upper half for all operands the machine code was right in all of 165 kernels that were drawn.
    The same PTX is assembled rightly by ptxas 12.9.86, 13.0.88, 13.1.115, 13.3.33, 13.4.59 and 13.5.37. The shape
    decides here, not the version, which is not known before a kernel is compiled.

    Upstream: triton-lang/triton pull requests 7196 and 7197 work around a fault of ptxas in the arithmetic of
    descriptors, by an `or` in place of an `add`; with `or` throughout, this fault is gone too. Issues 10486, 10573 and
    11366 report illegal addresses on H100 and H20 with operands of 32 columns, Triton 3.6 and 3.7, and none with 3.5;
    fla-org/flash-linear-attention pull request 1262 names ptxas 12.8.93. Whether their cause is this one is not known.

    Args:
        tile: chosen or given.
        k_pad, v_pad: head dims, rounded up to powers of two.

    Returns:
        The tile and both padded head dims. With 64 rows or more, where Triton uses `wgmma`, keys and both dims are at
        least 64: rows of 128 bytes. What lies past a head dim is masked: it costs arithmetic and shared memory, no
        reads of the pool.
    """
    if tile.m < WGMMA_ROWS:
        return tile, k_pad, v_pad
    return tile._replace(n=max(tile.n, WIDEST_SWIZZLE)), max(k_pad, WIDEST_SWIZZLE), max(v_pad, WIDEST_SWIZZLE)


@functools.cache
def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Whether the tensor cores of a GPU read shared memory: NVIDIA's from compute capability 9.0 on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def padded_dims(geometry: Geometry) -> tuple[int, int]:
    """Columns of K's and of V's tile: powers of two, and 16 at least, which tensor cores need."""
    k_dim, v_dim = geometry.head_dim, geometry.v_head_dim
    return max(16, triton.next_power_of_2(k_dim)), max(16, triton.next_power_of_2(v_dim))


def direct_attention(
    q: Tensor,
    cache: PagedKVCache,
    batch: CheckedBatch,
    *,
    softmax_scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
    begin: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
    likeness: int | None = None,
    want_lse: bool = True,
    into: tuple[Tensor, Tensor] | None = None,
    hopper: bool | None = None,
    remember: Callable[[DirectAgain], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the keys and values in the cache, the new tokens' included; everything was checked by the caller.

    Args:
        q: `[n, q_heads, head_dim]`, new tokens of all sequences; head dims contiguous.
        cache: holds every key, new tokens' included.
        batch: whose block table and offsets say where.
        softmax_scale: what scores are multiplied by; above 0.
        sinks: `[q_heads]`, a logit for each head that counts in the denominator alone.
        window: keys that a query sees at most, itself included; None is all.
        begin: `[batch]` int32: keys before this position are left out.
        state: out `[n, q_heads, v_head_dim]` and log-sum-exp `[n, q_heads]` of the keys before `begin`, to go on from;
            both contiguous, and without the sink.
        tile: how to cut the work; None chooses. Results do not depend on it beyond rounding.
        likeness: the cache's, if the caller has just asked for it.
        want_lse: whether the caller reads the log-sum-exp; False saves an allocation where keys are split.
        into: what is returned, contiguous, each at a multiple of 16 bytes; None allocates it.
        hopper: None lets the Hopper kernel attend where it is faster, True wherever it runs (see `hopper.plan`), False
            nowhere. It never attends with a given tile, beginnings or a state.
        remember: called with what repeats this call for tensors that differ in their addresses alone; not called if
            the call depends on more (on `begin`, on a state, on a copy of the sinks), nor by the Hopper kernel.

    Returns:
        out `[n, q_heads, v_head_dim]` in q's dtype and its natural log-sum-exp `[n, q_heads]` in FP32; None in place
        of the log-sum-exp if it is not wanted and keys are split. Rows that belong to no sequence are 0, and −inf or
        the sink; rows that see a key in a bad block are NaN, and so are those of a sequence with more new tokens than
        `batch.max_q`.
    """
    if sinks is not None and not sinks.is_contiguous():
        sinks, remember = sinks.contiguous(), None
    if window is not None and window >= batch.max_k:
        window = None
    shape = (*q.shape[:2], cache.geometry.v_head_dim)
    out = q.new_empty(shape) if into is None else into[0]
    interpreted = interpreting()
    if likeness is None:
        likeness = cache.likeness
    form = None
    if tile is None:
        tile = tile_of(q, cache, batch, window, interpreted, likeness)
        # Decode spends no time on the decision.
        likely = hopper is None and tile.m >= LEAST_ROWS and batch.max_q > 1
        if (hopper or likely) and begin is None and state is None:
            form = chosen_form(cache, batch, shape[0], shape[1], q.dtype, window, likeness, hopper is True)
    lse = None if into is None else into[1]
    if lse is None and (want_lse or tile.splits == 1 or form is not None):
        lse = q.new_empty(shape[:2], dtype=torch.float32)
    if shape[0] == 0:
        return out, lse
    if form is not None:
        from ..hopper.launch import attend

        assert lse is not None
        attend(q, cache, batch, softmax_scale * LOG2E.value, sinks, form, likeness, out, lse)
        return out, lse
    call = DirectCall(q, cache, batch, sinks, window, begin, state, tile, interpreted, likeness)
    tensors = call.tensors()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    tiles = call.tiles
    launch = prepared_once("direct attention", call.signature(addresses, tiles), lambda: DirectLaunch(call))
    cut = launch.cut(call, tiles, out.shape, lse is not None)
    scale_log2 = softmax_scale * LOG2E.value
    launch(call, cut, scale_log2, tensors, addresses, out, lse)
    if remember is not None and begin is None and state is None:
        remember(DirectAgain(launch, cut, scale_log2, addresses[1:4], lse is not None, interpreted))
    return out, lse


def tile_of(
    q: Tensor, cache: PagedKVCache, batch: CheckedBatch, window: int | None, interpreted: bool, likeness: int
) -> Tile:
    """The tile for a layer of a batch, chosen once for all that are alike."""
    n, q_heads, _ = q.shape

    def choose() -> Tile:
        g = cache.geometry
        processors = 1 if interpreted else torch.cuda.get_device_properties(q.device).multi_processor_count
        keys = batch.held(batch.max_k if window is None else min(batch.max_k, window + batch.max_q))
        rows = min(batch.max_q, n) * (q_heads // g.num_kv_heads)
        operand_bytes = 4 if torch.float32 in (q.dtype, g.dtype) else 2
        programs = batch.num_sequences * g.num_kv_heads
        return choose_tile(rows, keys, programs, *padded_dims(g), processors, operand_bytes, g.layout)

    tile: Tile = batch.decided(("tile", n, q_heads, q.dtype, window, interpreted, likeness), choose)
    return tile


class DirectCall(NamedTuple):
    """The arguments of `direct_attention`, the tile chosen."""

    q: Tensor
    cache: PagedKVCache
    batch: CheckedBatch
    sinks: Tensor | None
    window: int | None
    begin: Tensor | None
    state: tuple[Tensor, Tensor] | None
    tile: Tile
    interpreted: bool
    likeness: int  # the cache's

    @property
    def tiles(self) -> int:
        """Tiles of rows of the longest sequence; one is there for rows that belong to no sequence."""
        n, q_heads, _ = self.q.shape
        return max(1, -(-min(self.batch.max_q, n) * (q_heads // self.cache.geometry.num_kv_heads) // self.tile.m))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernel reads, in its order."""
        batch, cache = self.batch, self.cache
        return (
            self.q, batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k, self.begin, self.sinks,
            *(self.state or (None, None)), cache.key_cache, cache.k_scale, cache.value_cache, cache.v_scale,
        )  # fmt: skip

    def signature(self, addresses: list[int], tiles: int) -> tuple[object, ...]:
        """Everything that a launch is prepared from; calls with equal ones differ in addresses and numbers alone.

        Triton compiles for 1 and for multiples of 16 apart: of `tiles`; of the splits, which are part of the tile.
        """
        q, state = self.q, self.state
        return (
            self.tile, self.window, self.batch.share, self.interpreted, self.likeness, q.dtype, q.device, q.shape[1],
            q.stride(),
            tuple([address & 15 for address in addresses[:8]]), self.begin is None, tiles == 1, tiles & 15 == 0,
            None if state is None else state[0].dtype, None if self.sinks is None else self.sinks.dtype,
        )  # fmt: skip


class Cut(NamedTuple):
    """Numbers of the launches of a call, which do not depend on addresses.

    Attributes:
        programs, numbers: of the direct kernel.
        part: FP32 elements of the memory for the parts of split keys; 0 if keys are not split.
        merged, begin: elements from there to the rows of the parts, and to their log-sum-exps.
        combined, parts: programs and numbers of the kernel that combines the parts.
    """

    programs: int
    numbers: tuple[int, ...]
    part: int
    merged: int
    begin: int
    combined: int
    parts: tuple[int, int]


class DirectAgain(NamedTuple):
    """A call of `direct_attention`, to be repeated with tensors that differ in their addresses alone.

    q and the sinks have the alignment and all other properties of the first call's, the cache has its likeness, and the
    batch is the same.

    Attributes:
        has_lse: whether it needs memory for the log-sum-exp.
    """

    launch: DirectLaunch
    cut: Cut
    scale_log2: float
    indices_at: list[int]  # addresses of the block table and of both offsets
    has_lse: bool
    interpreted: bool

    def __call__(
        self, q: Tensor, batch: CheckedBatch, cache: PagedKVCache, sinks: Tensor | None, out_at: int, lse_at: int
    ) -> bool:
        """Attend; `cache.likeness` was just read.

        Args:
            q, batch, cache, sinks: as in `direct_attention`.
            out_at, lse_at: addresses at which the output and its log-sum-exp go, multiples of 16; 0 for no log-sum-exp.

        Returns:
            False if the kernels cannot be launched from addresses now; what is at `out_at` and `lse_at` is then
            undefined.
        """
        table_at, cu_q_at, cu_k_at = self.indices_at
        if (
            batch.block_table.data_ptr() != table_at
            or batch.cu_seqlens_q.data_ptr() != cu_q_at
            or batch.cu_seqlens_k.data_ptr() != cu_k_at
            or interpreting() != self.interpreted
        ):
            return False
        key_at, value_at, k_scale_at, v_scale_at = cache.addresses
        sinks_at = cu_q_at if sinks is None else sinks.data_ptr()  # the offsets stand in for what is never read
        return self.launch.again(
            self.cut, q, (q.data_ptr(), table_at, cu_q_at, cu_k_at, cu_q_at, sinks_at), None,
            (key_at, k_scale_at or cu_q_at, value_at, v_scale_at or cu_q_at), self.scale_log2, out_at, lse_at,
        )  # fmt: skip


class DirectLaunch:
    """What is launched for a layer, and all that does not change from one call to the next.

    Attributes:
        constants: of the direct kernel.
    """

    def __init__(self, call: DirectCall) -> None:
        """Prepare the launches for `call` and all that have its signature."""
        cache, tile, g, interpreted = call.cache, call.tile, call.cache.geometry, call.interpreted
        k_pad, v_pad = padded_dims(g)
        qk, pv = _operand_dtypes(call.q.dtype, g.dtype, cache.v_kind, interpreted)
        k_columns, v_columns = k_pad, v_pad
        if qk is not tl.float32 and multiplies_from_shared_memory(call.q.device):
            tile, k_columns, v_columns = alike_operands(tile, k_pad, v_pad)
        self.kv_heads = g.num_kv_heads
        self.tile = tile
        fmt = FORMATS.get(g.dtype)
        k = PoolForm.of(cache.key_cache, g.layout, "key", cache.k_kind)
        v = PoolForm.of(cache.value_cache, g.layout, "value", cache.v_kind)
        layer = LayerForm(
            group=call.q.shape[1] // g.num_kv_heads,
            window=call.window or 0,
            rank=call.batch.share.rank if call.batch.share else 0,
            ranks=call.batch.share.ranks if call.batch.share else 1,
            begins=call.begin is not None,
            state=call.state is not None,
            sinks=call.sinks is not None and tile.splits == 1,
            qk=qk,
            pv=pv,
            hardware=not interpreted and (fmt is None or fp8_support(call.q.device)[g.dtype] == "hardware"),
            interpreted=interpreted,
        )
        cut = TileForm(
            m=tile.m,
            n=tile.n,
            k_columns=k_columns,
            v_columns=v_columns,
            same_page=math.gcd(g.page_size, tile.n),
            split=tile.splits > 1,
            stages=tile.num_stages,
        )
        limit = {"maxnreg": tile.registers} if tile.registers and torch.version.cuda and not interpreted else {}
        self.constants: dict[str, Any] = {
            "K": k, "V": v, "CODE": fmt, "LAYER": layer, "TILE": cut, "num_warps": tile.num_warps, **limit,
        }  # fmt: skip
        scales = [scale.strides for scale in cache.scales]
        codes = torch.uint8 if fmt else None
        self._attend = PreparedLaunch(
            direct_kernel, (*(None,) * 10, codes, None, codes, None, None),
            (
                call.q.stride()[:2], pool_strides(cache.key_cache, g.layout, "key", k),
                pool_strides(cache.value_cache, g.layout, "value", v), *scales,
            ),
            self.constants, interpreted,
        )  # fmt: skip
        splits = triton.next_power_of_2(tile.splits)
        self._together = max(1, min(16, 4096 // (splits * v_pad)))
        merged = {
            "Q_HEADS": call.q.shape[1], "V_DIM": g.v_head_dim, "V_PAD": v_pad, "SPLITS": splits, "R": self._together,
            "SINKS": call.sinks is not None, "BY_HAND": interpreted,
        }  # fmt: skip
        self._combine = PreparedLaunch(combine_kernel, (None,) * 5, (), merged, interpreted)

    def cut(self, call: DirectCall, tiles: int, shape: Sequence[int], has_lse: bool) -> Cut:
        """The numbers of a call's launches.

        Args:
            call: has the signature for which this was prepared.
            tiles: the call's.
            shape: `(n, q_heads, v_head_dim)`, of the output.
            has_lse: whether there is a tensor for the log-sum-exp.
        """
        batch, splits = call.batch, self.tile.splits
        n, q_heads, v_dim = shape
        sequences, columns = batch.block_table.shape
        numbers = (sequences, columns, tiles, splits, n, min(batch.max_q, n))
        programs = (sequences + 1) * tiles * splits * self.kv_heads
        if splits == 1:
            assert has_lse
            return Cut(programs, numbers, 0, 0, 0, 0, (n, splits))
        # The log-sum-exps, if nobody reads them; the parts' rows; the parts' log-sum-exps. Each begins at a multiple of
        # 16 bytes: kernels are compiled for that.
        rows = n * q_heads
        merged = 0 if has_lse else rows + (-rows & 3)
        begin = merged + splits * rows * v_dim
        begin += -begin & 3
        return Cut(programs, numbers, begin + splits * rows, merged, begin, -(-rows // self._together), (n, splits))

    def again(
        self, cut: Cut, q: Tensor, before: tuple[int, ...], state: tuple[int, int] | None, pools: tuple[int, ...],
        scale_log2: float, out_at: int, lse_at: int,
    ) -> bool:  # fmt: skip
        """Launch from addresses alone, if the kernels are compiled for the current GPU; see `PreparedLaunch.again`.

        Args:
            cut: from `cut`.
            q: for its device.
            before, state, pools: addresses of the kernel's pointers: q to sinks, the state, pools and scales.
            scale_log2: the softmax scale for powers of 2.
            out_at, lse_at: addresses of the output and of its log-sum-exp; 0 for none.

        Returns:
            Whether both kernels were launched. The first one may have been in any case.
        """
        if cut.part == 0:
            outs = out_at, lse_at
            return self._attend.again(cut.programs, (*before, *(state or outs), *outs, *pools, scale_log2), cut.numbers)
        first = q.new_empty(cut.part, dtype=torch.float32).data_ptr()
        outs = first + 4 * cut.merged, first + 4 * cut.begin
        return self._attend.again(
            cut.programs, (*before, *(state or outs), *outs, *pools, scale_log2), cut.numbers
        ) and self._combine.again(cut.combined, (*outs, before[5], out_at, lse_at or first), cut.parts)

    def __call__(
        self, call: DirectCall, cut: Cut, scale_log2: float, tensors: tuple[Tensor | None, ...], addresses: list[int],
        out: Tensor, lse: Tensor | None,
    ) -> None:  # fmt: skip
        """Launch: see `direct_attention`; `cut` is the call's, `out` and `lse` are what it returns."""
        nothing = addresses[2]  # stands in for what is never read
        read = tuple([at or nothing for at in addresses])
        before, pools = read[:6], read[8:]
        state = None if call.state is None else (read[6], read[7])
        out_at, lse_at = out.data_ptr(), 0 if lse is None else lse.data_ptr()
        if self.again(cut, call.q, before, state, pools, scale_log2, out_at, lse_at):
            return
        if cut.part == 0:
            assert lse is not None
            outs = out, lse
        else:
            part = call.q.new_empty(cut.part, dtype=torch.float32)
            outs = _parts(part, cut.merged, cut.begin, self.tile.splits, out.shape)
            lse = part[: out.shape[0] * out.shape[1]] if lse is None else lse
        at = outs[0].data_ptr(), outs[1].data_ptr()
        order = (*before, *(state or at), *at, *pools, scale_log2)
        self._attend(cut.programs, _pointers(tensors, outs, scale_log2), order, cut.numbers)
        if cut.part:
            stand_in = call.batch.cu_seqlens_q if call.sinks is None else call.sinks
            pointers = (*outs, stand_in, out, lse)
            self._combine(cut.combined, pointers, (*at, before[5], out_at, lse.data_ptr()), cut.parts)


def _parts(part: Tensor, first: int, second: int, splits: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The rows of each split, which begin at `first` in their allocation, and its log-sum-exps, at `second`."""
    rows = splits * shape[0] * shape[1]
    return part[first : first + rows * shape[2]].view(splits, *shape), part[second:].view(splits, *shape[:2])


def _pointers(
    tensors: tuple[Tensor | None, ...], outs: tuple[Tensor, Tensor], scale_log2: float
) -> tuple[Tensor | float, ...]:
    """The kernel's pointer arguments as tensors; what it never reads has a stand-in."""
    nothing = tensors[2]
    assert nothing is not None
    read = [nothing if tensor is None else tensor for tensor in tensors]
    state = outs if tensors[6] is None else read[6:8]
    return (*read[:6], *state, *outs, *read[8:], scale_log2)


def _operand_dtypes(q: torch.dtype, pool: torch.dtype, v_kind: str, interpreted: bool) -> tuple[tl.dtype, tl.dtype]:
    """The dtypes in which Q·K and P·V are multiplied; sums are FP32.

    FP16 holds FP8 exactly, and an H100 makes it of FP8 in a third of BF16's instructions. P times a scale that differs
    from key to key can leave FP16's range, not BF16's.
    """
    if interpreted or torch.float32 in (q, pool):
        return tl.float32, tl.float32
    if pool == torch.bfloat16:
        return tl.bfloat16, tl.bfloat16
    return tl.float16, tl.bfloat16 if v_kind in ("per-page-head", "per-token-head") else tl.float16
