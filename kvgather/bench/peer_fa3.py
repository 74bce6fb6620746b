"""FlashAttention-3 over a paged pool, from one of three sources.

- the extension file that the environment variable `KVGATHER_FA3` names: `_vllm_fa3_C.abi3.so` of vLLM's wheel, which
  needs the torch that the wheel was built for, and nothing else of vLLM;
- an installed `vllm`;
- an installed `flash_attn_interface`, FlashAttention's own package for Hopper.

Work that an engine does once per forward is not timed: the schedule of the batch, and the quantization of q.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cases.prefix import BuiltPrefix
from .peer import Attending, NotUsable, Paged, Peer, bf16_pool, fp8_pool

BF16_POOL, FP8_POOL = "FlashAttention-3, BF16 pool", "FlashAttention-3, FP8 pool and Q"
NAMES = (BF16_POOL, FP8_POOL)
FILE = "KVGATHER_FA3"
EXTENSION = "_vllm_fa3_C"
"""The namespace of the file's operators in `torch.ops`."""


class _Source(NamedTuple):
    """One source of the kernel.

    Attributes:
        version: name and version.
        attend: the attention of a batch with its schedule, which may be None.
        schedule: computes the schedule of a batch, once for all layers.
    """

    version: str
    attend: Callable[[Paged, Tensor | None], Tensor]
    schedule: Callable[[Paged], Tensor]


def find(device: torch.device) -> dict[str, Peer]:
    """FlashAttention-3's rows, by name.

    Raises:
        NotUsable: no source of it is installed, or the GPU is not a Hopper.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        raise NotUsable("FlashAttention-3 needs a GPU of compute capability 9.0")
    source = _source()
    return {
        BF16_POOL: Peer(source.version, partial(_prepare, source, bf16_pool), itemsize=2),
        FP8_POOL: Peer(source.version, partial(_prepare, source, fp8_pool)),
    }


def _source() -> _Source:
    if path := os.environ.get(FILE):
        return _from_file(Path(path))
    if importlib.util.find_spec("vllm") is not None:
        return _from_vllm(importlib.import_module("vllm.vllm_flash_attn"), importlib.metadata.version("vllm"))
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return _from_interface(importlib.import_module("flash_attn_interface"))
    raise NotUsable(f"vllm and flash_attn_interface are not installed, and {FILE} is not set")


def _prepare(source: _Source, form: Callable[[BuiltPrefix], Paged], built: BuiltPrefix) -> Attending:
    paged = form(built)
    return partial(source.attend, paged, source.schedule(paged))


def _descales(paged: Paged) -> dict[str, Tensor]:
    """The scales as keyword arguments, which have the same names in all sources."""
    if paged.scales is None:
        return {}
    return dict(zip(("q_descale", "k_descale", "v_descale"), paged.scales, strict=True))


def _schedule_arguments(paged: Paged) -> dict[str, Any]:
    """The keyword arguments of `get_scheduler_metadata`, which are the same in both packages."""
    return {
        "batch_size": len(paged.seqlens_k), "max_seqlen_q": paged.max_q, "max_seqlen_k": paged.max_k,
        "num_heads_q": paged.q.shape[1], "num_heads_kv": paged.kv_heads, "headdim": paged.q.shape[2],
        "cache_seqlens": paged.seqlens_k, "qkv_dtype": paged.q.dtype, "cu_seqlens_q": paged.cu_seqlens_q,
        "page_size": paged.page_size, "causal": True,
    }  # fmt: skip


def _from_vllm(module: ModuleType, version: str) -> _Source:
    def attend(paged: Paged, schedule: Tensor | None) -> Tensor:
        return module.flash_attn_varlen_func(
            q=paged.q, k=paged.k_pool, v=paged.v_pool, max_seqlen_q=paged.max_q, cu_seqlens_q=paged.cu_seqlens_q,
            max_seqlen_k=paged.max_k, seqused_k=paged.seqlens_k, softmax_scale=paged.softmax_scale, causal=True,
            block_table=paged.page_table, scheduler_metadata=schedule, fa_version=3, **_descales(paged),
        )  # fmt: skip

    return _Source(f"vllm {version}", attend, lambda paged: module.get_scheduler_metadata(**_schedule_arguments(paged)))


def _from_interface(module: ModuleType) -> _Source:
    def attend(paged: Paged, schedule: Tensor | None) -> Tensor:
        return module.flash_attn_with_kvcache(
            q=paged.q, k_cache=paged.k_pool, v_cache=paged.v_pool, cache_seqlens=paged.seqlens_k,
            page_table=paged.page_table, cu_seqlens_q=paged.cu_seqlens_q, max_seqlen_q=paged.max_q,
            softmax_scale=paged.softmax_scale, causal=True, scheduler_metadata=schedule, **_descales(paged),
        )  # fmt: skip

    def schedule(paged: Paged) -> Tensor:
        # The attention takes no max_seqlen_k and reckons with whole pages; a schedule has to reckon alike.
        most = paged.page_table.shape[1] * paged.page_size
        return module.get_scheduler_metadata(**_schedule_arguments(paged) | {"max_seqlen_k": most})

    try:
        version = importlib.metadata.version("flash_attn_3")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return _Source(f"flash_attn_interface {version}", attend, schedule)


def _from_file(path: Path) -> _Source:
    if not path.is_file():
        raise NotUsable(f"{FILE} is {path}, which is not a file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    torch.ops.load_library(str(path))
    operators = getattr(torch.ops, EXTENSION)

    def attend(paged: Paged, schedule: Tensor | None) -> Tensor:
        given = {
            "q": paged.q, "k": paged.k_pool, "v": paged.v_pool, "cu_seqlens_q": paged.cu_seqlens_q,
            "seqused_k": paged.seqlens_k, "max_seqlen_q": paged.max_q, "max_seqlen_k": paged.max_k,
            "page_table": paged.page_table, "softmax_scale": paged.softmax_scale, "is_causal": True,
            "scheduler_metadata": schedule, **_descales(paged),
        }  # fmt: skip
        out: Tensor = operators.fwd(*positional(operators.fwd, given))[0]
        return out

    def schedule(paged: Paged) -> Tensor:
        given = _schedule_arguments(paged)
        for name, other in _OPERATOR_NAMES.items():
            given[other] = given.pop(name)
        given["headdim_v"] = paged.v_pool.shape[3]
        metadata: Tensor = operators.get_scheduler_metadata(*positional(operators.get_scheduler_metadata, given))
        return metadata

    return _Source(f"{path.name} sha256:{digest}", attend, schedule)


_OPERATOR_NAMES = {
    "num_heads_q": "num_heads", "num_heads_kv": "num_heads_k", "cache_seqlens": "seqused_k", "causal": "is_causal",
}  # fmt: skip
"""What the operator calls the arguments of the packages' `get_scheduler_metadata`."""
_NEUTRAL: dict[str, Any] = {
    "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0, "has_softcap": False,
    "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "max_seqlen_k_new": 0, "cp_world_size": 1,
    "cp_rank": 0,
}  # fmt: skip
"""The numbers that turn off what a call does not use; `num_splits` 0 leaves the choice to the kernel's heuristic."""


def positional(operator: Any, given: dict[str, Any]) -> list[Any]:
    """The arguments of one of the file's operators in the order of its schema, which differs between releases.

    Args:
        operator: such as `torch.ops._vllm_fa3_C.fwd`.
        given: arguments by name; of the others, optional ones are None, and numbers are neutral.

    Raises:
        NotUsable: the operator lacks a given argument, or has one that is not known here.
    """
    values = []
    names = [argument.name for argument in operator.default._schema.arguments]
    for argument in operator.default._schema.arguments:
        if argument.name in given:
            values.append(given[argument.name])
        elif argument.name in _NEUTRAL:
            values.append(_NEUTRAL[argument.name])
        elif isinstance(argument.type, torch.OptionalType):
            values.append(None)
        else:
            raise NotUsable(f"{EXTENSION} has an unknown argument {argument.name}: {argument.type}")
    if lacking := [name for name in given if name not in names]:
        raise NotUsable(f"{EXTENSION} lacks the argument {lacking[0]}; it has {', '.join(names)}")
    return values
