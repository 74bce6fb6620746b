"""The group of the ranks that `torchrun` started, and how their GPUs are linked."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ...device import has_gpu

START = "python3 -m torch.distributed.run --standalone --nproc-per-node N -m kvgather bench parallel"
SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(seconds=300)
"""Of a collective: one rank may draw a whole context and compile its kernels while the others wait."""
COLOURS = re.compile("\x1b\\[[0-9;]*m")


@contextmanager
def joined(device_type: str | None) -> Iterator[torch.device]:
    """Join the group: NCCL with one GPU for each rank, or gloo on a CPU.

    Args:
        device_type: "cuda", "cpu", or None for GPUs if the machine has them.

    Yields:
        This rank's device.

    Raises:
        ValueError: `torchrun` did not start this process, there is one rank only, or there are fewer GPUs than ranks.
    """
    if any(name not in os.environ for name in SET_BY_TORCHRUN):
        raise ValueError(f"this process is no rank of a group; accepted: {START}, with N of 2 or more")
    ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if ranks < 2:
        raise ValueError(f"the group has {ranks} rank; accepted: 2 or more, {START}")
    if device_type == "cpu" or (device_type is None and not has_gpu()):
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    else:
        gpus = torch.cuda.device_count() if has_gpu() else 0
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if here > gpus:
            raise ValueError(
                f"{here} ranks run here, and torch sees {gpus} GPUs; accepted: one GPU for each, or --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    yield device
    dist.destroy_process_group()  # not after an error: the other ranks may be in a collective, and this would wait


def nccl_version(device: torch.device) -> str:
    """The version of NCCL, such as "2.28.9"; empty on a CPU."""
    return ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else ""


@functools.cache
def link(device: torch.device) -> str:
    """How the GPUs of the ranks are linked: what `nvidia-smi topo -m` says, or else whether they access each other.

    Returns:
        Such as "NV18", or "NV18, PIX" if pairs differ; "gloo" on a CPU.
    """
    if device.type == "cpu":
        return "gloo"
    ranks = min(dist.get_world_size(), torch.cuda.device_count())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    gpus = [int(gpu) for gpu in visible.split(",")[:ranks] if gpu.strip().isdecimal()]
    found = links_in(_topology(), gpus) if len(gpus) == ranks else []
    if found:
        return ", ".join(found)
    reached = [torch.cuda.can_device_access_peer(0, other) for other in range(1, ranks)]
    return "unknown" if not reached else "peer access" if all(reached) else "no peer access"


def links_in(topology: str, gpus: Sequence[int]) -> list[str]:
    """The links between GPUs in the output of `nvidia-smi topo -m`, each kind once; none if a GPU is not in it."""
    rows = {}
    for line in COLOURS.sub("", topology).splitlines():
        name, *cells = (cell.strip() for cell in line.split("\t"))
        if re.fullmatch(r"GPU\d+", name) and "X" in cells:
            rows[int(name[3:])] = cells
    if any(gpu not in rows or len(rows[gpu]) <= max(gpus) for gpu in gpus):
        return []
    return sorted({rows[one][other] for one in gpus for other in gpus if one != other})


def _topology() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
