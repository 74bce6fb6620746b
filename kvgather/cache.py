"""PagedKVCache: one pool of pages for K and one for V, with their scales and layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .device import interpreting, resolve_device
from .formats.checks import (
    check_choice,
    check_inside_storage,
    check_int,
    check_tensor,
    described,
    overlaps_itself,
    resolved,
    share_elements,
)
from .formats.fp8 import FLOATS, check_pool_dtype
from .formats.layout import Geometry, key_shape, value_shape
from .formats.scale import KINDS, Scale, check_values, kind_shape, resolve
from .gather.again import ARGUMENT_ERRORS, MAX_CALLS_PER_KEY, gather_again
from .gather.dispatch import choose_backend, gather_checked
from .kernels.guards import Likeness
from .plan import GatherPlan
from .scatter import SlotError, check_duplicates, check_slots, scatter

if TYPE_CHECKING:  # imports triton, which may be missing
    from .scatter.kernel import ScatterLaunch


class PagedKVCache:
    """A paged KV cache.

    Attributes:
        key_cache, value_cache: the pools, in the shape of the layout (see `kvgather.formats.layout`).
        k_scale, v_scale: FP32 tensors in the shape of their kind, or None.
        geometry: the sizes, dtype and device.
    """

    def __init__(
        self,
        num_blocks: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        layout: str = "NHD",
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale: str | tuple[str, str] = "per-tensor",
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty cache: zeros in every slot, with scale 1.

        Args:
            num_blocks, page_size: blocks of each pool, and tokens per block.
            num_kv_heads, head_dim, v_head_dim: KV heads, and the head dims of K and V; `v_head_dim=None` means
                `head_dim`.
            layout: "NHD", "HND" or "SHUFFLE".
            dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, bfloat16, float16 or float32.
            scale: a kind, or (K's kind, V's kind).
            k_scale, v_scale: the scales, in the shape of their kind; None means 1 everywhere. `write` sets a
                per-token-head scale.
            device: the device; None means the GPU if there is one, else the CPU.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        check_pool_dtype(dtype, "dtype")
        blocks = check_int(num_blocks, "num_blocks")
        page = check_int(page_size, "page_size", minimum=1)
        heads = check_int(num_kv_heads, "num_kv_heads", minimum=1)
        k_dim = check_int(head_dim, "head_dim", minimum=1)
        v_dim = k_dim if v_head_dim is None else check_int(v_head_dim, "v_head_dim", minimum=1)
        device = resolve_device(device)
        kinds = _pair_of_kinds(scale)
        k_shape = key_shape(layout, blocks, page, heads, k_dim, dtype.itemsize)
        v_shape = value_shape(layout, blocks, page, heads, v_dim, dtype.itemsize)
        if (most := max(math.prod(k_shape), math.prod(v_shape)) * dtype.itemsize) >= 2**63:
            raise ValueError(
                f"num_blocks {blocks}, page_size {page}, num_kv_heads {heads} and head_dim {max(k_dim, v_dim)} make a "
                f"pool of {most:.1e} bytes; accepted: fewer than 2^63"
            )
        key_cache = torch.zeros(k_shape, dtype=dtype, device=device)
        value_cache = torch.zeros(v_shape, dtype=dtype, device=device)
        scales = [
            torch.ones(kind_shape(kind, blocks, heads, page) or (1,), dtype=torch.float32, device=device)
            if argument is None and kind != "none"
            else argument
            for kind, argument in zip(kinds, (k_scale, v_scale), strict=True)
        ]
        self._set(key_cache, value_cache, layout, (scales[0], scales[1]), kinds)

    @classmethod
    def from_tensors(
        cls,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        layout: str,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_kind: str | None = None,
        v_kind: str | None = None,
    ) -> PagedKVCache:
        """Wrap an engine's own pools and scales, without a copy.

        Args:
            key_cache, value_cache: pools in `layout`, any strides.
            layout: "NHD", "HND" or "SHUFFLE".
            k_scale, v_scale: None, a float, or FP32 tensors (see `kvgather.formats.scale`).
            k_kind, v_kind: the scale's kind; None derives it from the shape.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        cache = cls.__new__(cls)
        cache._set(key_cache, value_cache, layout, (k_scale, v_scale), (k_kind, v_kind))
        return cache

    def _set(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        layout: str,
        scales: tuple[Tensor | float | None, Tensor | float | None],
        kinds: tuple[str | None, str | None],
    ) -> None:
        self.geometry = Geometry.of(key_cache, value_cache, layout)
        self.key_cache, self.value_cache = key_cache, value_cache
        g = self.geometry
        self._scales = self._resolved(scales, kinds)
        self._likeness: Likeness | None = None
        self._write_launches: dict[object, list[ScatterLaunch]] = {}
        self._last_slots: Tensor | None = None
        self._kinds = self._scales[0].kind, self._scales[1].kind
        self._too_large = torch.full((1,), -1, dtype=torch.int64, device=g.device)  # largest skipped slot

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied without what is prepared for launches on this memory."""
        return self.__dict__ | {"_likeness": None, "_write_launches": {}}

    def _resolved(
        self,
        scales: tuple[Tensor | float | None, Tensor | float | None],
        kinds: tuple[str | None, str | None],
    ) -> tuple[Scale, Scale]:
        """The scales of K and V, checked against the geometry."""
        g = self.geometry
        k, v = (
            resolve(
                scale,
                f"{name}_scale",
                num_blocks=g.num_blocks,
                num_heads=g.num_kv_heads,
                page_size=g.page_size,
                device=g.device,
                kind=kind,
            ).in_memory(g.device)
            for name, scale, kind in zip("kv", scales, kinds, strict=True)
        )
        return k, v

    @property
    def likeness(self) -> int:
        """Number of the pools' and scales' signature: one prepared launch reads all caches with the same number.

        Raises:
            TypeError, ValueError: the storage of a pool or of a scale has shrunk, or another tensor has taken its place
                (an engine may assign `.data` where it reloads scales or wakes a pool) that is of another kind.
        """
        likeness = self._likeness
        if likeness is None or not likeness.is_current(*self._tensors()):
            self._check_again()
            likeness = self._likeness = Likeness(self._tensors(), (self.geometry, *self._kinds))
            self._write_launches.clear()  # they write to the previous memory
        return likeness.number

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The pools and the scales of K and V."""
        return self.key_cache, self.value_cache, self._scales[0].tensor, self._scales[1].tensor

    @property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of `key_cache`, `value_cache`, `k_scale` and `v_scale`, 0 for None; for the caller who has just
        read `likeness`, which is checked."""
        assert self._likeness is not None
        return self._likeness.addresses

    @property
    def layout(self) -> str:
        return self.geometry.layout

    @property
    def scales(self) -> tuple[Scale, Scale]:
        """The scales of K and V, checked against the cache, with their strides."""
        return self._scales

    @property
    def k_scale(self) -> Tensor | None:
        return self._scales[0].tensor

    @property
    def v_scale(self) -> Tensor | None:
        return self._scales[1].tensor

    @property
    def k_kind(self) -> str:
        return self._scales[0].kind

    @property
    def v_kind(self) -> str:
        return self._scales[1].kind

    @property
    def num_slots(self) -> int:
        return self.geometry.num_blocks * self.geometry.page_size

    def __repr__(self) -> str:
        g = self.geometry
        dims = f"{g.head_dim}" if g.head_dim == g.v_head_dim else f"{g.head_dim}/{g.v_head_dim}"
        kinds = self.k_kind if self.k_kind == self.v_kind else f"{self.k_kind}/{self.v_kind}"
        return (
            f"PagedKVCache({g.num_blocks} blocks × {g.page_size} tokens × {g.num_kv_heads} heads × {dims}, {g.layout}, "
            f"{g.dtype}, {kinds}, {g.device})"
        )

    def write(self, k: Tensor, v: Tensor, slots: Tensor, backend: str = "auto") -> None:
        """Quantize new tokens and write each to its slot.

        Values are divided by the scale, clamped to the format's ±max and rounded to nearest even. A per-token-head
        scale is computed from the token and stored; scales of other kinds do not change.

        Args:
            k, v: `[n, heads, head_dim]` and `[n, heads, v_head_dim]`, floating point, on the cache's device.
            slots: `[n]` int32 or int64, `block_id * page_size + page_offset`; negative slots are padding and are
                skipped.
            backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.

        Raises:
            TypeError, ValueError: an argument is wrong, or two elements of the cache share an address; nothing is
                written.
            SlotError: on a CPU, a slot is past the pool or occurs twice. On a GPU this check would synchronize: slots
                past the pool are skipped; a slot that occurs twice in one call has undefined content, possibly the
                codes of one token and the scale of another. `check()` reports both.
        """
        if not torch.compiler.is_compiling():
            self.likeness  # noqa: B018  # checks again what has changed
        if self.write_again(k, v, slots, backend):
            return
        g, k, v = self.geometry, resolved(k), resolved(v)
        for name, tensor, dim in (("k", k, g.head_dim), ("v", v, g.v_head_dim)):
            check_tensor(tensor, name, ndim=3, dtypes=FLOATS, device=g.device)
            if tensor.shape[1:] != (g.num_kv_heads, dim):
                raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted: [n, {g.num_kv_heads}, {dim}]")
        check_tensor(slots, "slots", ndim=1, dtypes=(torch.int32, torch.int64), device=g.device)
        if not len(k) == len(v) == len(slots):
            raise ValueError(f"k, v and slots have {len(k)}, {len(v)} and {len(slots)} tokens; accepted: equal numbers")
        self._check_writable()
        choose_backend(backend, g.device)  # raises, also without tokens
        if len(slots) == 0:
            return
        pools = self.key_cache, self.value_cache
        if not torch.compiler.is_compiling():  # rows that are a view of a pool must be read before the write
            k, v = (rows.clone() if any(share_elements(rows, p) for p in pools) else rows for rows in (k, v))
        with torch.no_grad():  # K and V that require a gradient would attach their graph to a float pool
            launch = scatter(*pools, g, self._scales, k, v, slots, self._too_large, backend)
        self._last_slots = slots
        if launch is not None and k is not v:
            launch.remember(k, v, slots)
            launches = self._write_launches.setdefault((backend, interpreting()), [])
            launches.insert(0, launch)
            del launches[MAX_CALLS_PER_KEY:]

    def write_again(self, k: Tensor, v: Tensor, slots: Tensor, backend: str = "auto") -> bool:
        """Write through the launch of an earlier `write` whose checks these arguments pass; return False without one.

        The caller has just read `likeness`: pools and scales are unchanged.
        """
        if torch.compiler.is_compiling():
            return False
        try:
            for launch in self._write_launches.get((backend, interpreting()), ()):
                addresses = launch.again(k, v, slots)
                if addresses is not None:
                    break
            else:
                return False
        except ARGUMENT_ERRORS:
            return False
        if not launch.on_gpu:
            check_slots(slots, self.num_slots)
        launch(k, v, slots, addresses)
        self._last_slots = slots
        return True

    def _check_again(self) -> None:
        """Raise unless pools and scales are inside their storage, and of the sizes and kinds of the beginning.

        An engine may resize a storage, or give a tensor other memory; a scale's may have other strides.
        """
        for name, tensor in zip(("key_cache", "value_cache", "k_scale", "v_scale"), self._tensors(), strict=True):
            if tensor is not None:
                check_inside_storage(tensor, name)
        now = Geometry.of(self.key_cache, self.value_cache, self.geometry.layout)
        if now != self.geometry:
            raise ValueError(f"key_cache and value_cache are {now} now; accepted: as in the beginning, {self.geometry}")
        self._scales = self._resolved((self.k_scale, self.v_scale), self._kinds)

    def _check_writable(self) -> None:
        """Raise if two elements that a write sets share an address. A gather accepts such a cache."""
        written = {"key_cache": self.key_cache, "value_cache": self.value_cache}
        tensors = dict(written)
        for name, scale in zip(("k_scale", "v_scale"), self._scales, strict=True):
            if scale.tensor is not None:
                tensors[name] = scale.tensor
                if scale.kind == "per-token-head":
                    written[name] = scale.tensor
        for name, tensor in written.items():
            if overlaps_itself(tensor):
                raise ValueError(
                    f"{name} has strides {list(tensor.stride())}; accepted by write: elements that do not overlap"
                )
            for other_name, other in tensors.items():
                if other_name != name and not torch.compiler.is_compiling() and share_elements(tensor, other):
                    raise ValueError(f"{other_name} shares memory with {name}; accepted by write: memory of its own")

    def gather(
        self, plan: GatherPlan, out_dtype: torch.dtype = torch.bfloat16, out: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gather K and V of a plan's tokens into dense rows; see `kvgather.gather`.

        Returns:
            K `[total_tokens, heads, head_dim]` and V `[total_tokens, heads, v_head_dim]`.
        """
        options = (self.geometry.layout, *self._kinds, out_dtype, backend)
        return self._gather(options, plan, out_dtype, out, backend, zero_bad_v=False)

    def gather_for_attention(
        self, plan: GatherPlan, out_dtype: torch.dtype, out: tuple[Tensor, Tensor] | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Gather for a dense attention kernel: rows of a bad block id are NaN in K and 0 in V.

        A dense kernel replaces masked scores, but multiplies V by all weights, including 0. NaN in K reaches only the
        queries that see the key; NaN in V would reach every query of the sequence.
        """
        options = (self.geometry.layout, *self._kinds, out_dtype, backend, "bad V is 0")
        return self._gather(options, plan, out_dtype, out, backend, zero_bad_v=True)

    def _gather(
        self, options: tuple[object, ...], plan: GatherPlan, out_dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None, backend: str, zero_bad_v: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not torch.compiler.is_compiling():
            if (rows := gather_again(options, self._tensors(), plan, out, out_dtype)) is not None:
                return rows
            self.likeness  # noqa: B018  # checks again what has changed
        return gather_checked(
            self._tensors(), options, plan, self.geometry, self._scales, out_dtype, out, backend, zero_bad_v
        )

    def check(self) -> None:
        """Raise if a write received a slot past the pool, the last write a duplicate slot, or if a scale is invalid.

        Synchronizes with the GPU. Reads the current contents of the last write's `slots`.

        Raises:
            SlotError: gives the largest skipped slot, or two tokens with the same slot.
            ValueError: a scale has a value that is NaN, infinite, zero or negative.
        """
        largest = int(self._too_large)
        if largest >= 0:
            raise SlotError(f"slots has {largest}; accepted: below {self.num_slots}, or negative for padding")
        if self._last_slots is not None:
            check_duplicates(self._last_slots)
        for name, scale in zip(("k_scale", "v_scale"), self._scales, strict=True):
            check_values(scale, name)


def _pair_of_kinds(scale: object) -> tuple[str, str]:
    if isinstance(scale, str):
        return check_choice(scale, "scale", KINDS), scale
    if isinstance(scale, (tuple, list)) and len(scale) == 2:
        return check_choice(scale[0], "scale[0]", KINDS), check_choice(scale[1], "scale[1]", KINDS)
    raise TypeError(
        f"scale is {described(scale)}; accepted: a kind, or a pair (K's kind, V's kind), of {', '.join(KINDS)}"
    )
