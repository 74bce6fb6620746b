"""FlashInfer's attention over the paged FP8 pool: its FA2 backend, which reads FP8 with q in BF16."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..cases.prefix import BuiltPrefix
from .peer import Attending, NotUsable, Peer

NAME = "FlashInfer"
NAMES = (NAME,)
WORKSPACE_BYTES = 512 * 2**20
"""More than the split attention of the longest case needs; FlashInfer recommends at least 128 MiB."""


def find(device: torch.device) -> dict[str, Peer]:
    """FlashInfer's row, by name.

    Raises:
        NotUsable: it is not installed.
    """
    if importlib.util.find_spec("flashinfer") is None:
        raise NotUsable("flashinfer is not installed")
    module = importlib.import_module("flashinfer")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return {NAME: Peer(f"flashinfer {module.__version__}", partial(_prepare, module, workspace))}


def _prepare(module: ModuleType, workspace: Tensor, built: BuiltPrefix) -> Attending:
    """Plan the batch, as an engine does once per forward; the plan is not timed.

    The wrappers are those without buffers for other batches: their plan fits this batch, and its replays.
    """
    case, cache, batch = built.case, built.cache, built.batch
    assert cache.k_scale is not None and cache.v_scale is not None
    pages = page_list(built)
    heads = case.q_heads, case.kv_heads, case.head_dim, case.page_size
    dtypes = {"q_data_type": built.q.dtype, "kv_data_type": cache.key_cache.dtype}
    if batch.max_q == 1:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
        wrapper.plan(*pages, *heads, **dtypes)
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper.plan(batch.cu_seqlens_q, *pages, *heads, causal=True, **dtypes)
    return partial(
        wrapper.run, built.q, (cache.key_cache, cache.value_cache), k_scale=float(cache.k_scale),
        v_scale=float(cache.v_scale), out=torch.empty_like(built.q),
    )  # fmt: skip


def page_list(built: BuiltPrefix) -> tuple[Tensor, Tensor, Tensor]:
    """The block table as one list of block ids.

    Returns:
        Offsets of the sequences in the list `[sequences + 1]`, the list, and the tokens in each sequence's last page
        `[sequences]`; all int32.
    """
    batch = built.batch
    lengths = batch.cu_seqlens_k.diff()
    pages = (lengths + batch.page_size - 1) // batch.page_size
    used = torch.arange(batch.block_table.shape[1], device=batch.device) < pages[:, None]
    offsets = torch.zeros(len(pages) + 1, dtype=torch.int32, device=batch.device)
    offsets[1:] = pages.cumsum(0)
    return offsets, batch.block_table[used], (lengths - 1) % batch.page_size + 1
