"""Tensor parallelism of transformers for the models that are served here: a rank holds its heads, and its pools too.

Rank 0 schedules and answers; transformers sends its requests to the other ranks, which run the same steps. GPT-OSS's
own plan leaves its attention whole, and with it the cache: `plan_of` shards the projections of the attention and the
sinks, one for each query head, with their heads.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed import mixin
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.generation.continuous_batching.utils import find_num_key_value_heads

from ..parallel.heads import heads_of

SECONDS = 120.0
"""How long a rank waits for the others in one exchange; kernels that one rank compiles later than another count."""
_ATTENTION = "model.layers.*.self_attn"
_GPT_OSS = {
    _ATTENTION: "local_params",  # its forward reads the sinks, which are a parameter without a module
    f"{_ATTENTION}.sinks": "colwise",
    f"{_ATTENTION}.q_proj": "colwise",
    f"{_ATTENTION}.k_proj": "colwise",
    f"{_ATTENTION}.v_proj": "colwise",
    f"{_ATTENTION}.o_proj": "rowwise",  # its bias is whole on every rank, and added after the sum over the ranks
}


@dataclass(frozen=True)
class Ranks:
    """This process among those of `torchrun`.

    Attributes:
        rank, count: this rank, and how many there are.
        seconds: how long one exchange may take.
    """

    rank: int = 0
    count: int = 1
    seconds: float = SECONDS

    @classmethod
    def of_torchrun(cls, seconds: float = SECONDS) -> Ranks:
        """What torchrun has put into the environment; one rank elsewhere."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), seconds)

    def device(self, kind: str) -> torch.device:
        """This rank's device: its own GPU, or the CPU."""
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)

    def join(self, device: torch.device) -> None:
        """Wait for the other ranks, and connect to them: NCCL between GPUs, gloo between CPUs.

        Transformers would do it with a time-out of two hours.
        """
        if dist.is_initialized():
            return
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # no graph is captured here; read at the first exchange
        gpu = device.type == "cuda"
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if gpu else "gloo", timeout=timedelta(seconds=self.seconds), device_id=device if gpu else None
        )


def plan_of(config: Any, ranks: int) -> DistributedConfig:
    """How transformers shards a model: its own plan, and for GPT-OSS the attention and the experts.

    Args:
        config: of the model's text part.
        ranks: how many ranks there are.

    Raises:
        ValueError: the ranks do not divide the KV heads or the query heads.
    """
    heads_of(find_num_key_value_heads(config), 0, ranks)
    if config.num_attention_heads % ranks:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads}; accepted for {ranks} ranks: a multiple of {ranks}"
        )
    if config.model_type != "gpt_oss":
        return DistributedConfig(tp_size=ranks, tp_plan="auto")
    whole = config.num_local_experts % ranks  # every rank then computes all experts
    return DistributedConfig(tp_size=ranks, tp_plan=dict(_GPT_OSS), ep_size=1 if whole else ranks)


def shard(model: Any, ranks: Ranks) -> Any:
    """Keep this rank's part of a model that every rank has made with equal weights.

    The whole parameters are freed at the end: until then, a rank holds both them and its part.

    Args:
        model: on this rank's device.
        ranks: of a joined group.

    Raises:
        ValueError: the ranks do not divide the heads; the model is unchanged.
    """
    plan = plan_of(model.config.get_text_config(), ranks.count)
    model = type(model).maybe_distribute_model(model, plan, _mesh(plan, model.device.type))
    own_memory(model)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the engine plans its cache with the memory that is not reserved
        torch.cuda.reset_peak_memory_stats()
    return model


def own_memory(module: torch.nn.Module) -> None:
    """Copy each part of a parameter that is a view of the whole one, which is freed with its last view.

    Some versions of torch leave such views where they shard the first axis.
    """
    copies: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # one of parameters that are tied
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            local = parameter.to_local().detach()
            if parameter not in copies and local.untyped_storage().nbytes() > local.nbytes:
                copy = DTensor.from_local(
                    local.clone(), parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
                copies[parameter] = torch.nn.Parameter(copy, requires_grad=parameter.requires_grad)
            if parameter in copies:
                setattr(part, name, copies[parameter])


def load(architecture: Any, folder: str, dtype: torch.dtype, config: Any, ranks: Ranks, device: torch.device) -> Any:
    """Load this rank's part of a model of a folder.

    Args:
        architecture: a class with `from_pretrained`.
        folder: the model.
        dtype: of the weights.
        config: of the model's text part.
        ranks: of a joined group.
        device: this rank's.

    Raises:
        ValueError: the ranks do not divide the heads; nothing is loaded.
    """
    plan = plan_of(config, ranks.count)
    mesh = device, _mesh(plan, device.type)
    with patch.object(mixin, "initialize_distributed_mesh", lambda _: mesh):  # it would take the machine's accelerator
        return architecture.from_pretrained(folder, dtype=dtype, distributed_config=plan)


def _mesh(plan: DistributedConfig, device: str) -> TransformersDeviceMesh:
    ranks, ranks_of_experts = plan.tp_size or 1, plan.ep_size or 1
    dense, experts = ("pp", "dp_replicate", "fsdp", "tp"), ("pp", "dp_replicate", "efsdp", "ep")
    return TransformersDeviceMesh(
        init_device_mesh(device, (1, 1, 1, ranks), mesh_dim_names=dense),
        init_device_mesh(device, (1, 1, plan.efsdp_size, ranks_of_experts), mesh_dim_names=experts),
    )
