"""What `kvgather bench prefix` measures: batches of the prefix path, and how to build each.

The names of the parts say what each is for: "reach" the batches with a time to reach, "auto" those on which the choice
of a path is held against the better one, "window" and "workspace" what must not grow with the context, "variant" other
layouts, scales and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..blocks import cu_seqlens
from ..cache import PagedKVCache
from ..formats.scale import kind_shape
from .cases import Case, build
from .gather import RAGGED
from .runner import cache_bytes


@dataclass(frozen=True)
class PrefixCase:
    """One batch of new tokens, each sequence with some cached ones before them.

    Attributes:
        part: which of the benchmark's parts it belongs to.
        q_heads, kv_heads, dim: of the layer.
        new, cached: tokens of each sequence.
        layout, kind, page_size: of the cache, FP8 e4m3fn; both K and V have a scale of the kind.
        window: of the layer, or None.
        workspace: tokens that a bounded workspace holds; None measures none.
        label: what the lengths are called where they differ from sequence to sequence.
    """

    part: str
    q_heads: int = 64
    kv_heads: int = 8
    dim: int = 64
    new: tuple[int, ...] = (16,) * 16
    cached: tuple[int, ...] = (8192,) * 16
    layout: str = "NHD"
    kind: str = "per-tensor"
    page_size: int = 16
    window: int | None = None
    workspace: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Such as `reach-64q8x64-NHD-per-tensor-16seqs-8192+16`."""
        lengths = self.label or f"{self.cached[0]}+{self.new[0]}"
        window = [f"window{self.window}"] if self.window else []
        heads = f"{self.q_heads}q{self.kv_heads}x{self.dim}"
        return "-".join((self.part, heads, self.layout, self.kind, *window, f"{len(self.new)}seqs", lengths))

    @property
    def rows(self) -> int:
        """New tokens × query heads of a group: the rows that read one head's keys of a sequence."""
        return max(self.new) * (self.q_heads // self.kv_heads)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(cached + new for cached, new in zip(self.cached, self.new, strict=True))

    @property
    def read_bytes(self) -> int:
        """Codes and scales of the tokens that are seen, each read once."""
        further = max(self.lengths) if self.window is None else self.window - 1
        seen = sum(min(length, new + further) for length, new in zip(self.lengths, self.new, strict=True))
        return seen * self.kv_heads * (2 * self.dim + (8 if self.kind == "per-token-head" else 0))

    @property
    def cached_bytes(self) -> int:
        """Codes of the cached tokens' K and V."""
        return sum(self.cached) * self.kv_heads * 2 * self.dim

    @property
    def allowed_peak_bytes(self) -> int:
        """What a bounded workspace may take besides: its tokens' K and V in BF16, two FP32 outputs, and 5 %."""
        held = (self.workspace or 0) * self.kv_heads * 2 * self.dim * 2
        return int(1.05 * (held + 2 * sum(self.new) * self.q_heads * self.dim * 4))

    def copies(self, device: torch.device) -> int:
        """As many batches, each with a cache of its own, as it takes to leave the GPU's last cache, up to 8."""
        return 1 if device.type == "cpu" else min(8, -(-3 * cache_bytes(device) // max(self.read_bytes, 1)))


@dataclass(frozen=True)
class BuiltPrefix:
    """The tensors of a case: a layer's arguments, and the batch that all layers share."""

    case: PrefixCase
    cache: PagedKVCache
    batch: PrefixBatch
    q: Tensor
    k_new: Tensor
    v_new: Tensor


def build_prefix(case: PrefixCase, device: torch.device, seed: int) -> BuiltPrefix:
    """Normally distributed Q, K and V, those of cached tokens quantized; blocks in random order."""
    paged = Case(
        layout=case.layout, k_kind=case.kind, v_kind=case.kind, page_size=case.page_size, num_heads=case.kv_heads,
        k_dim=case.dim, v_dim=case.dim, lengths=case.lengths, starts=(),
    )  # fmt: skip
    held = build(paged, device, seed, values="normal")
    blocks = held.cache.geometry.num_blocks
    random = torch.Generator(device).manual_seed(seed)
    shape = kind_shape(case.kind, blocks, case.kv_heads, case.page_size) or (1,)
    scales = [torch.exp2(torch.rand(shape, generator=random, device=device) - 4.5) for _ in range(2)]  # codes are ~16
    cache = PagedKVCache.from_tensors(
        held.cache.key_cache, held.cache.value_cache, layout=case.layout, k_scale=scales[0], v_scale=scales[1],
        k_kind=case.kind, v_kind=case.kind,
    )  # fmt: skip
    columns = held.block_table.shape[1]
    batch = PrefixBatch.build(
        F.pad(held.block_table, (0, -columns % 16), value=-1), cu_seqlens(case.new, device), held.cu_seqlens_k,
        page_size=case.page_size, num_blocks=blocks, total_q=sum(case.new), total_k=sum(case.lengths),
        seqlens_q=case.new, seqlens_k=case.lengths, windows=() if case.window is None else (case.window,),
    )  # fmt: skip
    batch.check()

    def rows(heads: int) -> Tensor:
        shape = sum(case.new), heads, case.dim
        return torch.randn(shape, generator=random, device=device).to(torch.bfloat16)

    return BuiltPrefix(case, cache, batch, rows(case.q_heads), rows(case.kv_heads), rows(case.kv_heads))


def cases(device: torch.device) -> tuple[PrefixCase, ...]:
    """The cases that are measured on a device."""
    return tuple(_gpu_cases()) if device.type == "cuda" else CPU_CASES


def _of(part: str, new: int, cached: int, sequences: int) -> PrefixCase:
    return PrefixCase(part, new=(new,) * sequences, cached=(cached,) * sequences)


AUTO = {
    (64, 8, 64): (
        (8, 8192, 16), (32, 8192, 16), (64, 8192, 16), (256, 8192, 16), (1, 1024, 64),
        (1, 32768, 1), (16, 1024, 16), (16, 32768, 1), (128, 1024, 64), (512, 32768, 1),
    ),
    (32, 8, 128): (
        (1, 8192, 16), (16, 8192, 16), (32, 8192, 16), (64, 8192, 16), (128, 8192, 16),
        (1, 32768, 1), (8, 1024, 64), (32, 1024, 1), (64, 32768, 1), (512, 1024, 16),
    ),
    (16, 2, 256): (
        (1, 8192, 16), (8, 8192, 16), (16, 8192, 16), (32, 8192, 16), (128, 8192, 16),
        (1, 8192, 64), (16, 32768, 1), (64, 1024, 16), (8, 1024, 64), (256, 32768, 1),
    ),
}  # fmt: skip
"""Query heads, KV heads and dim: new tokens, cached tokens, sequences."""


def _gpu_cases() -> Iterator[PrefixCase]:
    for new in (1, 16, 128, 512):
        yield _of("reach", new, 8192, 16)
    for (q_heads, kv_heads, dim), shapes in AUTO.items():
        for shape in shapes:
            yield replace(_of("auto", *shape), q_heads=q_heads, kv_heads=kv_heads, dim=dim)
    for new in (1, 16):
        for cached in (1024, 4096, 8192, 16384, 65536):
            yield replace(_of("window", new, cached, 16), window=128)
    for new in (64, 128, 512):  # where the paths cross
        yield replace(_of("window", new, 8192, 16), window=128)
    yield replace(_of("workspace", 16, 262144, 1), workspace=32768)
    for layout in ("NHD", "HND", "SHUFFLE"):
        for kind in ("per-tensor", "per-token-head"):
            if (layout, kind) != ("NHD", "per-tensor"):
                yield replace(_of("variant", 16, 8192, 16), layout=layout, kind=kind)
    for new in (16, 128):
        yield PrefixCase("variant", new=(new,) * 16, cached=RAGGED, label=f"ragged8192+{new}")
    yield PrefixCase(
        "variant", new=(1,) * 10 + (16, 16, 128, 128, 512, 512), label="mixed",
        cached=(*RAGGED[:10], 1024, 8192, 0, 4096, 0, 2048),
    )  # fmt: skip


_TINY = PrefixCase("reach", q_heads=4, kv_heads=2, dim=16, new=(1, 1), cached=(64, 64))
CPU_CASES = (
    _TINY,
    replace(_TINY, new=(16, 16)),
    replace(_TINY, part="auto", new=(8, 8), dim=32),
    replace(_TINY, part="window", new=(4, 4), window=8),
    replace(_TINY, part="workspace", new=(16,), cached=(256,), workspace=64),
    replace(_TINY, part="variant", new=(16, 16), layout="SHUFFLE", kind="per-token-head"),
    replace(_TINY, part="variant", new=(1, 16, 5), cached=(70, 0, 33), label="mixed"),
)
"""What shows that the benchmark works, and how long plain torch takes."""
