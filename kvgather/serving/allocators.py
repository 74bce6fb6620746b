"""Allocators of transformers' cache whose pages are the blocks of one `PagedKVCache` per layer.

Transformers keeps one tensor of bytes and cuts it into blocks; a block has a page for each layer of a group, and a page
has K and then V. So the pool of a layer is a strided view of that tensor, and a block id of transformers is a block id
of the pool. **Here the kind of the scale enters the engine**: each layer's scales are created with its pool.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from ..cache import PagedKVCache
from ..formats.layout import key_shape, value_shape
from ..formats.scale import kind_shape
from .options import Options

PER_BLOCK = ("per-page-head", "per-token-head")
"""Kinds whose scales belong to a block, as its codes do."""


class PoolAllocator(FullAttentionCacheAllocator):
    """Blocks of the layers of one attention type, with the pools of these layers.

    Attributes:
        options: set in a subclass, see `allocators_of`.
        pools: the pool of each layer, once the memory is known.
    """

    supports_block_table = False  # the block table of flash's decode path; ours is in the batch
    options: ClassVar[Options]
    pools: dict[int, PagedKVCache]

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
    ) -> None:
        """Cut the engine's memory into pools, without a copy."""
        super().register_cache_tensor(bytes_per_sector, non_trash_bytes, cache_tensor, pool)
        o, heads, dim, page = self.options, self.num_key_value_heads, self.head_dim, self.tokens_per_page
        blocks = cache_tensor.numel() // self.bytes_per_block
        pages = cache_tensor.view(o.dtype).view(blocks, self.pages_per_block, 2, page * heads * dim)
        shapes = [shape(o.layout, blocks, page, heads, dim, o.dtype.itemsize)[1:] for shape in (key_shape, value_shape)]
        self.pools = {}
        for i, layer in enumerate(self.layer_indices):
            k, v = (pages[:, i, which].unflatten(-1, shape) for which, shape in enumerate(shapes))
            k_scale, v_scale = (self._scale(given, blocks, cache_tensor.device) for given in (o.k_scale, o.v_scale))
            self.pools[layer] = PagedKVCache.from_tensors(
                k, v, layout=o.layout, k_scale=k_scale, v_scale=v_scale, k_kind=o.kind, v_kind=o.kind
            )

    def copy_blocks(self, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        """Copy whole blocks of all layers, with the scales that belong to a block.

        Transformers copies blocks where a request with `num_return_sequences` above 1 is forked.
        """
        super().copy_blocks(source_block_ids, dest_block_ids)
        if self.options.kind not in PER_BLOCK:
            return
        source, dest = (torch.tensor(ids, device=self._copy_view.device) for ids in (source_block_ids, dest_block_ids))
        for pool in self.pools.values():
            for scale in (pool.k_scale, pool.v_scale):
                if scale is not None:
                    scale[dest] = scale[source]

    def _scale(self, given: Tensor | float | None, blocks: int, device: torch.device) -> Tensor | float | None:
        """One layer's scale: the caller's, or ones; of a scale per block a copy.

        `write` changes a per-token-head scale, and `copy_blocks` both kinds; layers may have other blocks.
        """
        kind = self.options.kind
        if kind == "none":
            return None
        if kind in PER_BLOCK and isinstance(given, Tensor):
            return given.clone()
        if given is not None:
            return given
        shape = kind_shape(kind, blocks, self.num_key_value_heads, self.tokens_per_page) or (1,)
        return torch.ones(shape, dtype=torch.float32, device=device)


class FullAllocator(PoolAllocator):
    """Layers that see all tokens."""


class WindowAllocator(PoolAllocator):
    """Layers with a sliding window. They keep every token, and the attention applies the window.

    Transformers keeps only the window's tokens in a ring buffer, which takes less memory, and whose blocks cannot be
    shared: therefore it shares no prefix of a model that has such layers.
    """

    layer_type = "sliding_attention"


def allocators_of(options: Options) -> dict[str, type[PoolAllocator]]:
    """The allocator classes for these options, by the name of the attention type."""
    return {
        base.layer_type: type(base.__name__, (base,), {"options": options}) for base in (FullAllocator, WindowAllocator)
    }
