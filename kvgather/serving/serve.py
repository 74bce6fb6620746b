"""Transformers' OpenAI-compatible server with our engine in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.cli import serve as stock
from transformers.cli.serving import model_manager, server

from ..formats.checks import check_choice
from .characters import character_tokenizer
from .manager import CountingManager, EngineManager, EngineStopped, RequestRefused, install
from .models import CONFIGS, random_model
from .options import Options
from .tensor_parallel import SECONDS, Ranks, load, plan_of, shard

STATUS = "/kvgather"
"""The route of `status`."""


@dataclass(frozen=True)
class Source:
    """Where the model comes from.

    Attributes:
        folder: a model on this disk, or "" for random weights.
        config: for random weights, one of `kvgather.serving.models.CONFIGS`.
        device, dtype: of the weights.
        seed: of random weights.
        greedy: take the likeliest token always; random weights always do.
        ranks: this process among those that hold the model together.
    """

    folder: str
    config: str
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    greedy: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.folder or f"random-{self.config}"

    def model_config(self) -> Any:
        """The configuration of the model's text part.

        Raises:
            ValueError: `config` is unknown.
        """
        if self.folder:
            return AutoConfig.from_pretrained(self.folder).get_text_config()
        return CONFIGS[check_choice(self.config, "config", tuple(CONFIGS))]()

    def load(self, load_folder: Callable[[], Any]) -> Any:
        """The model, on several ranks this rank's part of it.

        Args:
            load_folder: loads a model of a folder, on one rank.

        Raises:
            ValueError: the ranks do not divide the heads; nothing was loaded.
        """
        if self.ranks.count == 1:
            model = load_folder() if self.folder else self._random()
        else:
            config = self.model_config()
            plan_of(config, self.ranks.count)
            self.ranks.join(self.device)
            if self.folder:
                model = load(AutoModelForCausalLM, self.folder, self.dtype, config, self.ranks, self.device)
            else:
                model = shard(self._random(), self.ranks)
        if self.greedy:
            model.generation_config.update(do_sample=False)
        return model

    def _random(self) -> Any:
        return random_model(self.config, device=self.device, dtype=self.dtype, seed=self.seed)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the engine.

    Attributes:
        page_size: tokens per block.
        num_blocks: blocks of the cache, for all layers together; None means as many as the memory holds.
        max_batched_tokens: upper bound of the tokens of a step.
        max_requests: upper bound of the requests of a step.
        sharing: whether prompts with a common prefix share its blocks.
        exchange_seconds: how long ranks wait for each other.
    """

    page_size: int = 16
    num_blocks: int | None = None
    max_batched_tokens: int = 16_384
    max_requests: int = 256
    sharing: bool = True
    exchange_seconds: float = SECONDS

    def batching(self) -> ContinuousBatchingConfig:
        """The sizes as transformers takes them."""
        return ContinuousBatchingConfig(
            page_size=self.page_size, num_blocks=self.num_blocks, max_batch_tokens=self.max_batched_tokens,
            max_requests_per_batch=self.max_requests, allow_block_sharing=self.sharing, safety_margin=0.0,
            cpu_group_timeout=self.exchange_seconds,
        )  # fmt: skip


def start_engine(model: Any, sizes: Sizes, options: Options | None) -> CountingManager:
    """Start the engine of a model: ours, or the stock one if `options` is None."""
    if options is not None:
        manager: CountingManager = install(model, options, sizes.batching())
    else:
        manager = CountingManager(model, model.generation_config, sizes.batching())
        model._cached_continuous_batching_manager = manager
    manager.start()
    return manager


def serve(source: Source, sizes: Sizes, options: Options | None, host: str = "localhost", port: int = 8000) -> None:
    """Serve a model until the process is told to stop. The engine runs when the first connection is accepted.

    On several ranks, rank 0 serves, and the others run its engine's steps until it stops.

    Args:
        source: the model.
        sizes: of the engine.
        options: of our pools and attention; None serves with the stock engine.
        host, port: where to listen.

    Raises:
        EngineStopped: on a rank other than 0, the engine has died.
    """
    if source.ranks.rank > 0:
        follow(source, sizes, options)
        return
    engines: list[CountingManager] = []

    class Models(model_manager.ModelManager):
        """Loads the model, and starts its engine."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = source.load(lambda: super(Models, self)._load_model(*args, **kwargs))
            engines.append(start_engine(model, sizes, options))
            return model

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            if source.folder:
                return super()._load_processor(*args, **kwargs)
            return character_tokenizer(source.model_config().vocab_size)

    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = original(*args, **kwargs)
        _add_status(app, engines)
        _add_reasons(app)
        return app

    original = server.build_server
    replaced = patch.object(model_manager, "ModelManager", Models), patch.object(server, "build_server", build_server)
    try:
        with replaced[0], replaced[1]:
            stock.Serve(
                force_model=source.name, continuous_batching=True, device=str(source.device),
                dtype=str(source.dtype).removeprefix("torch."), host=host, port=port, log_level="error",
            )  # fmt: skip
    finally:
        for engine in engines:
            if engine.is_running():
                engine.stop(timeout=2, hard_stop=True)


def follow(source: Source, sizes: Sizes, options: Options | None) -> None:
    """Run the steps that rank 0 schedules, until it stops.

    Raises:
        EngineStopped: the engine has died.
    """
    engine = start_engine(source.load(lambda: None), sizes, options)
    engine.wait()
    if (error := engine.background_thread_status.fatal_error) is not None:
        raise error


def status(engine: CountingManager) -> dict[str, Any]:
    """What an engine has done, as values of JSON: counters, prefix hits, peak memory."""
    error = engine.background_thread_status.fatal_error
    answer = {"error": "" if error is None else str(error), **engine.counters.as_json()}
    answer["peak_memory"] = peak_memory(engine.model.device)
    answer["processes"] = engine.processes
    answer["blocks"] = engine.continuous_batching_config.num_blocks
    if isinstance(engine, EngineManager) and (cache := engine.cache) is not None:
        for name in ("lookups", "hits", "looked_up_tokens", "hit_tokens"):
            answer[name] = getattr(cache, name)
        answer["paths"] = cache.paths.as_json()
        answer["held_blocks"] = cache.held_blocks
    return answer


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _add_status(app: Any, engines: list[CountingManager]) -> None:
    app.add_api_route(STATUS, lambda: status(engines[0]), methods=["GET"])


def _add_reasons(app: Any) -> None:
    """Answer errors with their reason: the stock server answers most of them with the words "Internal Server Error"."""
    from fastapi.responses import JSONResponse

    for kind, code in ((RequestRefused, 400), (EngineStopped, 503), (RuntimeError, 500)):

        async def answer(_: Any, error: Exception, code: int = code) -> JSONResponse:
            return JSONResponse({"error": str(error)}, status_code=code)

        app.add_exception_handler(kind, answer)
