"""The one rank of an NCCL group, which times a collective eagerly and in a CUDA graph."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from kvgather.bench.ranks.turns import time_on_ranks
from kvgather.parallel.exchange import all_gather
from tests.parallel.gloo import leave


def main() -> None:
    folder, device = Path(sys.argv[1]), torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = (folder / "store").as_uri()
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    state = torch.ones((1, 4096), device=device)
    ways = {"all-gather": [partial(all_gather, torch.empty_like(state), state)], "add": [partial(state.add, 1)]}
    times = time_on_ranks(ways, device, seconds=0.02).values()
    said = {
        "times": [(each.graph.p50 if each.graph else 0.0, each.eager.p50) for each in times],
        "reasons": [each.no_graph for each in times],
    }
    leave(folder, 0, said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
