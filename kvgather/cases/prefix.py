"""The batches that `kvgather bench prefix` times, and their tensors.

A case's part says its purpose: "reach" has a target time; on "auto" the rule behind `path="auto"` is compared with the
faster path; the times and the memory of "window" and "workspace" must not grow with the context; "variant" covers other
layouts, scale kinds and lengths.
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
from .attention import AttentionCase
from .measured import RAGGED
from .tensors import build


@dataclass(frozen=True)
class PrefixCase(AttentionCase):
    """One batch of the prefix benchmark; FP8 e4m3fn, BF16 rows, K and V of one head dim.

    Attributes:
        part: the part of the benchmark: "reach", "auto", "window", "workspace" or "variant".
        workspace: size of the bounded workspace in tokens; None measures none.
        label: a name for lengths that differ between sequences.
    """

    part: str
    workspace: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Such as `reach-64q8x64-NHD-per-tensor-16seqs-8192+16`."""
        lengths = self.label or f"{self.cached[0]}+{self.new[0]}"
        window = [f"window{self.window}"] if self.window else []
        heads = f"{self.q_heads}q{self.kv_heads}x{self.head_dim}"
        return "-".join((self.part, heads, self.layout, self.kind, *window, f"{len(self.new)}seqs", lengths))

    @property
    def rows(self) -> int:
        """New tokens × query heads per KV head: the rows of one sequence that attend to one KV head."""
        return max(self.new) * (self.q_heads // self.kv_heads)

    @property
    def read_bytes(self) -> int:
        """Bytes of the codes and scales of all visible tokens, each counted once."""
        reach = max(self.lengths) if self.window is None else self.window - 1
        visible = sum(min(length, new + reach) for length, new in zip(self.lengths, self.new, strict=True))
        return visible * self.kv_heads * (2 * self.head_dim + (8 if self.kind == "per-token-head" else 0))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the cached tokens' codes, K and V."""
        return sum(self.cached) * self.kv_heads * 2 * self.head_dim

    @property
    def allowed_peak_bytes(self) -> int:
        """The memory that a bounded workspace may use: K and V of its tokens in BF16, two FP32 outputs, and 5 %."""
        workspace = (self.workspace or 0) * self.kv_heads * 2 * self.head_dim * 2
        return int(1.05 * (workspace + 2 * sum(self.new) * self.q_heads * self.head_dim * 4))


@dataclass(frozen=True)
class BuiltPrefix:
    """The tensors of a case: the arguments of one layer, and the batch, which all layers share.

    Attributes:
        case: the description.
        cache: the cached tokens of all sequences, in blocks in random order.
        batch: the checked batch.
        q: `[new tokens, q_heads, head_dim]` BF16.
        k_new, v_new: `[new tokens, kv_heads, head_dim]` BF16.
    """

    case: PrefixCase
    cache: PagedKVCache
    batch: PrefixBatch
    q: Tensor
    k_new: Tensor
    v_new: Tensor


def build_prefix(case: PrefixCase, device: torch.device, seed: int) -> BuiltPrefix:
    """Build a case's tensors: normally distributed Q, K and V; the cached tokens' K and V quantized.

    Args:
        case: the description.
        device: device of all tensors.
        seed: seed of all random values.
    """
    paged = build(case.gather, device, seed, values="normal")
    num_blocks = paged.cache.geometry.num_blocks
    random = torch.Generator(device).manual_seed(seed)
    shape = kind_shape(case.kind, num_blocks, case.kv_heads, case.page_size) or (1,)
    scales = [torch.exp2(torch.rand(shape, generator=random, device=device) - 4.5) for _ in range(2)]  # codes are ~16
    cache = PagedKVCache.from_tensors(
        paged.cache.key_cache, paged.cache.value_cache, layout=case.layout, k_scale=scales[0], v_scale=scales[1],
        k_kind=case.kind, v_kind=case.kind,
    )  # fmt: skip
    columns = paged.block_table.shape[1]
    batch = PrefixBatch.build(
        F.pad(paged.block_table, (0, -columns % 16), value=-1), cu_seqlens(case.new, device), paged.cu_seqlens_k,
        page_size=case.page_size, num_blocks=num_blocks, total_q=sum(case.new), total_k=sum(case.lengths),
        seqlens_q=case.new, seqlens_k=case.lengths, windows=() if case.window is None else (case.window,),
    )  # fmt: skip
    batch.check()

    def rows(num_heads: int) -> Tensor:
        shape = sum(case.new), num_heads, case.head_dim
        return torch.randn(shape, generator=random, device=device).to(torch.bfloat16)

    return BuiltPrefix(case, cache, batch, rows(case.q_heads), rows(case.kv_heads), rows(case.kv_heads))


def cases(device: torch.device) -> tuple[PrefixCase, ...]:
    """The cases of `kvgather bench prefix` on a device."""
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
"""Query heads, KV heads and head dim; for each, new tokens, cached tokens and sequences."""


def _gpu_cases() -> Iterator[PrefixCase]:
    for new in (1, 16, 128, 512):
        yield _of("reach", new, 8192, 16)
    for (q_heads, kv_heads, head_dim), shapes in AUTO.items():
        for shape in shapes:
            yield replace(_of("auto", *shape), q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    for new in (1, 16):
        for cached in (1024, 4096, 8192, 16384, 65536):
            yield replace(_of("window", new, cached, 16), window=128)
    for new in (64, 128, 512):  # around the length at which the paths are equally fast
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


_TINY = PrefixCase("reach", q_heads=4, kv_heads=2, head_dim=16, new=(1, 1), cached=(64, 64))
CPU_CASES = (
    _TINY,
    replace(_TINY, new=(16, 16)),
    replace(_TINY, part="auto", new=(8, 8), head_dim=32),
    replace(_TINY, part="window", new=(4, 4), window=8),
    replace(_TINY, part="workspace", new=(16,), cached=(256,), workspace=64),
    replace(_TINY, part="variant", new=(16, 16), layout="SHUFFLE", kind="per-token-head"),
    replace(_TINY, part="variant", new=(1, 16, 5), cached=(70, 0, 33), label="mixed"),
)
"""Batches small enough for plain torch: they show that the benchmark works."""
