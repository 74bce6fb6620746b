"""The engine's manager: our cache and attention in it, faults of the stock engine guarded, steps counted."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from typing import Any, ClassVar, cast
from unittest.mock import patch

import torch.distributed as dist
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api as engine

from .attention import NAME, register
from .cache import PoolCache, cache_of
from .counters import Counters, Step
from .missing import missing_ranks
from .options import Options
from .taken import keep_requests


class RequestRefused(ValueError):
    """A request can never fit into the cache; no other request is affected."""


class EngineStopped(RuntimeError):
    """The engine takes no requests any more; the message gives the reason."""


class RequestCancelled(RuntimeError):
    """The caller has cancelled the request."""


class CountingManager(engine.ContinuousBatchingManager):
    """The stock engine, with its steps counted, and without requests that a failed exchange between ranks loses.

    Attributes:
        counters: of all steps since the manager was created.
        processes: the process ids of the ranks that run the model together; one rank is usual.
        number: of the start among all starts of engines in this process; ranks start theirs together.
    """

    _starts = itertools.count(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.counters = Counters()
        self.number = 0
        super().__init__(*args, **kwargs)
        self.processes = [os.getpid()]
        if (group := self.distributed_helper.cpu_comm_group) is not None:
            self.processes = [0] * self.distributed_helper.tp_size
            dist.all_gather_object(self.processes, os.getpid(), group=group)

    def start(self) -> None:
        """Start the engine, unless it runs."""
        if not self.is_running():
            self.number = next(CountingManager._starts)
            super().start()

    def wait(self) -> None:
        """Wait until the engine has stopped. On a rank other than 0, this is when rank 0 stops it, or when it dies."""
        if self._generation_thread is not None:
            self._generation_thread.join()

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if len(self.processes) > 1:
            keep_requests(processor)
        return processor

    def _generation_step(self) -> None:
        begin = time.perf_counter()
        super()._generation_step()
        seconds = time.perf_counter() - begin
        prefills = decodes = tokens = cached = 0
        processor: Any = self.batch_processor
        for request in processor.inputs_and_outputs.requests_in_batch:
            if request.state.generated_len() == 0:
                prefills += 1
                tokens += request.query_length
                cached += request.state.current_len() - request.query_length
            else:
                decodes += 1
        self.counters.add(Step(begin, seconds, prefills, decodes, tokens, cached))

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        """Record the error before the requests fail: whoever sees one fail can then tell that the engine died.

        The reason is the message's first line, without quotes: the stock server writes it into JSON as it is, and the
        lines after a CUDA error are advice. The engine's log has all of it. An exchange that failed because a rank died
        says so in words of its transport: the reason then names the rank.
        """
        text = (str(error).strip() or type(error).__name__).splitlines()[0].replace('"', "'")
        rank = self.distributed_helper.global_rank
        reason = EngineStopped(missing_ranks(self.processes, rank, text, self.number) or text)
        reason.__cause__ = error
        self.background_thread_status.record_fatal_error(reason)
        with contextlib.suppress(RuntimeError) if len(self.processes) > 1 else contextlib.nullcontext():
            super()._handle_critical_error(reason, batch_processor)  # at its end it tells the other ranks, if they live


class EngineManager(CountingManager):
    """The engine on our pools.

    Attributes:
        options: set in a subclass, see `install`.
    """

    options: ClassVar[Options]

    @property
    def cache(self) -> PoolCache | None:
        """The cache, which the first request creates, or the start; None before, and after the engine has stopped."""
        return None if self.batch_processor is None else cast(PoolCache, self.batch_processor.cache)

    def start(self) -> None:
        """Start the engine, unless it runs."""
        self._existing_cache()
        super().start()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Switch to our attention; `stop` and `destroy` restore the model's own."""
        previous = model.config._attn_implementation
        if previous != NAME:
            model.set_attn_implementation(NAME)
            self._original_attn_impl = previous

    def destroy(self) -> None:
        """Stop the engine if it runs, free the cache, and restore the model's attention.

        The stock engine restores it only where it stops a running engine: not after an error, or without a start.
        """
        super().destroy()
        self.batch_processor = None
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)
            self._original_attn_impl = None

    def add_request(
        self, input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None,
        streaming: bool = False, record_timestamps: bool = False, eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:  # fmt: skip
        """Add a request; see the base class.

        Raises:
            RequestRefused: the prompt is empty, or the request does not fit into an empty cache. The stock engine
                accepts it, and dies when it is alone and finds no block.
            EngineStopped: the engine takes no more requests. The stock engine returns None, and its callers wait.
        """
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        try:
            if self.is_tp_driver and self.background_thread_status.can_accept_new_requests() is not None:
                raise self._stopped()
            largest = self._existing_cache().largest_request
            max_new_tokens = _checked_limit(len(input_ids), max_new_tokens, largest)
            added = super().add_request(
                input_ids, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id,
                **logit_processor_kwargs,
            )  # fmt: skip
            if added is None and self.is_tp_driver:
                raise self._stopped()
        except (RequestRefused, EngineStopped):
            self.output_router.result_handlers.pop(request_id or "", None)
            raise
        return added

    def _stopped(self) -> EngineStopped:
        reason = self.background_thread_status.fatal_error or "it has stopped, or is stopping"
        return EngineStopped(f"the engine takes no requests: {reason}")

    def _existing_cache(self) -> PoolCache:
        """The cache, created if there is none: a request is checked against it, also before the engine starts."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        return cast(PoolCache, self.batch_processor.cache)

    def _create_batch_processor(self) -> Any:
        with patch.object(engine, "PagedAttentionCache", cache_of(self.options)):
            processor = super()._create_batch_processor()
        processor.cache.forget_requests()  # the processor of an earlier start keeps its cache
        if not getattr(processor.scheduler, "answers_cancelled", False):
            _answer_cancelled(processor)
        return processor


def _checked_limit(prompt: int, new: int | None, largest: int) -> int:
    """How many tokens a request may generate; None means as many as fit.

    Raises:
        RequestRefused: the request does not fit.
    """
    if prompt == 0:
        raise RequestRefused("the prompt has no tokens; accepted: at least one")
    fitting = largest - prompt + 1  # the last new token is never written
    if fitting < max(1, 1 if new is None else new):
        limit = "any number" if new is None else f"{new}"
        raise RequestRefused(
            f"the prompt has {prompt} tokens, and {limit} may be generated; accepted: {largest} tokens, which fit into "
            "the cache"
        )
    return fitting if new is None else new


def _answer_cancelled(processor: Any) -> None:
    """Give cancelled requests a final result: in the stock engine their callers wait forever."""
    clear = processor.scheduler.clear_cancelled_requests

    def clear_and_answer() -> list[Any]:
        states: list[Any] = clear()
        for state in states:
            processor.output_router.fail_and_deliver(state, RequestCancelled("the request was cancelled"))
        return states

    processor.scheduler.clear_cancelled_requests = clear_and_answer
    processor.scheduler.answers_cancelled = True


def install(
    model: Any,
    options: Options | None = None,
    batching: ContinuousBatchingConfig | None = None,
    generation: GenerationConfig | None = None,
) -> EngineManager:
    """Put our cache and attention under a model's continuous batching.

    From here on `model.generate_batch`, `model.init_continuous_batching` and transformers' `serve` run on FP8 pools.
    Prefixes are shared also by models with sliding windows, whose layers keep every token: more memory than the stock
    engine's window. An earlier engine of the model is destroyed, after it has completed its requests.

    Args:
        model: a causal language model of transformers, such as GPT-OSS, Llama, Qwen3 or Mistral.
        options: of the pools and of the attention; None means FP8 with scale 1.
        batching: sizes of the engine. CUDA graphs, asynchronous batching and offloading to the CPU are switched off.
        generation: None means the model's. It is copied: later changes of it do not reach the engine.

    Returns:
        The manager. `model.destroy_cached_continuous_batching_manager()` removes it.
    """
    register()
    options = Options() if options is None else options
    batching = ContinuousBatchingConfig() if batching is None else batching
    batching.use_cuda_graph, batching.use_async_batching, batching.cpu_offload_space = False, False, 0.0
    generation = copy.deepcopy(model.generation_config if generation is None else generation)
    if generation.eos_token_id is None:
        generation.eos_token_id = -1
    model.destroy_cached_continuous_batching_manager()
    kind = type("EngineManager", (EngineManager,), {"options": options})
    attention = model.config._attn_implementation
    try:
        manager: EngineManager = kind(model, generation, batching)
    except BaseException:  # transformers refuses the configuration
        model.set_attn_implementation(attention)
        raise
    model._cached_continuous_batching_manager = manager
    return manager
