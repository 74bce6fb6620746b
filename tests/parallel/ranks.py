"""What each rank of the tests of tensor parallelism does, under torchrun; one process does the same as the reference.

python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel.ranks FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, MistralConfig, Qwen3Config

from kvgather.serving import EngineManager, Options, install, models
from kvgather.serving.models import random_model
from kvgather.serving.tensor_parallel import Ranks, load, own_memory, shard
from tests.serving.engines import CPU, FP32, prompts, wait

CONFIGS = ("tiny-6", "llama-6", "qwen3-6", "mistral-6")
HEADS, NEW = 6, 8
SIX = models.SMALL | {"num_attention_heads": 12, "num_key_value_heads": HEADS, "hidden_size": 96}
models.CONFIGS["qwen3-6"] = lambda: Qwen3Config(**SIX)
models.CONFIGS["mistral-6"] = lambda: MistralConfig(**SIX, sliding_window=24)
SCALES = torch.tensor([0.02, 0.04, 0.08, 0.16, 0.32, 0.64])
"""Of each head: a wrong slice gives other codes."""
FP8 = Options(scale="per-head", k_scale=SCALES, v_scale=SCALES.flip(0))


def model(name: str) -> Any:
    """A random model whose biases are no zeros, and whose sinks matter: as they are made, errors would not show."""
    made = random_model(name, device=CPU, dtype=torch.float32)
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 2.0 if name.endswith("sinks") else 0.2, generator=chance)
    return made


def run(engine: EngineManager) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The tokens of all prompts, on rank 0, and what is in the pool of the first layer."""
    names = [engine.add_request(list(prompt), max_new_tokens=NEW) for prompt in prompts()]
    engine.start()
    tokens = [result.generated_tokens for result in wait(engine, names)] if engine.is_tp_driver else []
    if not engine.is_tp_driver:
        engine.wait()
    assert engine.cache is not None
    pool = engine.cache.layer_pool(0)
    assert pool.key_cache.element_size() in (1, 4)
    contents = {"k": pool.key_cache.clone(), "v": pool.value_cache.clone()}
    contents |= {name: scale.clone() for name in ("k_scale", "v_scale") if (scale := getattr(pool, name)) is not None}
    if engine.is_tp_driver:
        engine.stop(timeout=30)
    return tokens, contents


def engine(of: Any, options: Options, **sizes: Any) -> EngineManager:
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 96, "safety_margin": 0.0} | sizes
    return install(of, options, ContinuousBatchingConfig(**sizes))


def elements(of: Any) -> dict[str, tuple[int, int]]:
    """The elements of each parameter: of its part on this rank, and of the memory that it keeps alive."""
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in of.named_parameters()}
    return {name: (p.numel(), p.untyped_storage().nbytes() // p.element_size()) for name, p in local.items()}


def views(ranks: Ranks) -> tuple[dict[str, tuple[int, int]], bool, bool]:
    """A part that is a view of the whole parameter, twice in a module: its elements, its values, whether it is tied."""
    whole, module, mesh = torch.arange(12.0).view(6, 2), torch.nn.Module(), init_device_mesh("cpu", (ranks.count,))
    rows = 6 // ranks.count
    mine = whole[ranks.rank * rows :][:rows]
    module.first = module.second = torch.nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)]))
    own_memory(module)
    return elements(module), bool(module.first.to_local().equal(mine)), module.first is module.second


def hang(ranks: Ranks, of: Any) -> list[str]:
    """The last rank stops to take part: what rank 0's clients and the other ranks are told."""
    last = engine(of, FP32, cpu_group_timeout=5.0)
    names = [last.add_request(list(prompts()[0]), max_new_tokens=400)]
    last.start()
    if ranks.rank == ranks.count - 1:
        last.batch_processor.prepare_next_batch = lambda: time.sleep(600)  # type: ignore[union-attr]
        return []
    errors = [result.error for result in wait(last, names)] if last.is_tp_driver else []
    last.wait()
    return [*errors, str(last.background_thread_status.fatal_error)]


def main(folder: Path) -> None:
    ranks = Ranks.of_torchrun(60)
    ranks.join(CPU)
    results: dict[str, Any] = {"views": views(ranks)}
    for name in CONFIGS:
        mine = shard(model(name), ranks)
        results[name] = {"elements": elements(mine), "fp32": run(engine(mine, FP32)), "fp8": run(engine(mine, FP8))}
    saved = folder / "model"
    architecture, config = AutoModelForCausalLM, AutoConfig.from_pretrained(saved)
    results["folder"] = run(engine(load(architecture, str(saved), torch.float32, config, ranks, CPU), FP32))
    if ranks.count > 2:
        results["hang"] = hang(ranks, mine)
    torch.save(results, folder / f"{ranks.rank}.unfinished")
    (folder / f"{ranks.rank}.unfinished").rename(folder / f"{ranks.rank}.pt")
    files = [folder / f"{rank}.pt" for rank in range(ranks.count)]
    while not all(file.is_file() for file in files):  # a rank that ends early would be missed by the others
        time.sleep(0.05)
    os._exit(0)  # the thread of the engine that hangs would keep the process alive


if __name__ == "__main__":
    main(Path(sys.argv[1]))
