"""The parts of transformers that this package rests on, each with the reason.

None of them is public. They changed in 5.18, 5.19 and 5.24, so one minor version is supported, and
`tests/serving/test_contract.py` names the hooks that moved when a newer one is tried.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass

VERSIONS = "5.24"
"""The supported minor version of transformers."""
_BATCHING = "transformers.generation.continuous_batching"


class TransformersError(ImportError):
    """Transformers is missing, or has a version whose continuous batching differs."""


@dataclass(frozen=True)
class Hook:
    """One function, class or attribute of transformers.

    Attributes:
        module, name: where the hook is; `name` may have dots.
        parameters: parameters that we pass or receive, in order; None for hooks that are not called.
        contains: source text that must be in the hook, for behaviour that no signature shows.
        why: what we use it for.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    why: str
    contains: str = ""


HOOKS = (
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager.__init__",
        ("self", "model", "generation_config", "continuous_batching_config"), "install creates a subclass",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager.switch_to_cb_friendly_attn",
        ("self", "model", "auto_switch_to_flash"), "refuses attention functions that it does not know; overridden",
        "self._original_attn_impl = original_attn_impl",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager._create_batch_processor", ("self",),
        "creates the cache by the module's name PagedAttentionCache, which is replaced meanwhile",
        "paged_attention_cache = PagedAttentionCache(",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager._generation_step", ("self",),
        "one step of the model, which is timed", "self.batch_processor._generation_step(self.model)",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager._handle_critical_error",
        ("self", "error", "batch_processor"), "fails all requests before it records the error; we record it first",
        "self.background_thread_status.record_fatal_error(error)",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager.destroy", ("self",),
        "restores the model's attention only if the engine runs; ours always does", "if self.is_running():",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchProcessor.reset", ("self",),
        "a restart keeps the cache and frees its blocks; ours also forgets the requests of a failed step",
        "self.cache.free_all_requests()",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchingManager.add_request",
        ("self", "input_ids", "request_id", "max_new_tokens", "streaming", "record_timestamps", "eos_token_id"),
        "checks nothing about the length, and returns None once the engine stops",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "BackgroundThreadStatus.can_accept_new_requests", ("self",),
        "why requests are refused, or None",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousBatchProcessor._update_tp_group_state", ("self",),
        "takes requests from the queue before an exchange that may fail; we put them back",
        "drain_queue(self.input_queue)",
    ),
    Hook(
        f"{_BATCHING}.utils", "drain_queue", ("q",), "how requests are taken", "q.get_nowait()",
    ),
    Hook(
        f"{_BATCHING}.distributed", "DistributedHelper.__init__",
        ("self", "device_mesh", "cpu_group_timeout", "tp_plan"),
        "which rank this is, of how many, and the group between their CPUs", "self.tp_local_rank",
    ),
    Hook(
        f"{_BATCHING}.distributed", "DistributedHelper.are_kv_heads_tp_ed", ("self",),
        "whether the cache has only a part of the heads", 'for name in ("k_proj", "v_proj")',
    ),
    Hook(
        f"{_BATCHING}.distributed", "DistributedHelper.tp_all_reduce_state",
        ("self", "payload_size", "stop_status", "pause_requested"), "ends the other ranks' loops when this one died",
    ),
    Hook(
        "transformers.distributed.mixin", "DistributedMixin.maybe_distribute_model",
        ("model", "distributed_config", "mesh_manager"),
        "shards a model that has its weights: each rank keeps a copy of its part", "apply_tensor_parallelism(",
    ),
    Hook(
        "transformers.distributed.mixin", "initialize_distributed_mesh", ("distributed_config",),
        "takes the accelerator of the machine for a model of a folder; replaced meanwhile",
    ),
    Hook(
        "transformers.distributed.utils", "TransformersDeviceMesh.__init__", ("self", "dense_mesh", "expert_mesh"),
        "the ranks, as transformers wants them named",
    ),
    Hook(
        "transformers.distributed.tensor_parallel", "LocalParamsParallel", None,
        "shows GPT-OSS's attention its own part of the sinks",
        "Runs the module's forward with its own sharded parameters",
    ),
    Hook(
        "transformers.distributed.tensor_parallel", "RowwiseParallel.context_around_forward", None,
        "adds the bias of the output projection once, and not once on every rank", 'module._parameters["bias"] = None',
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousMixin.init_continuous_batching",
        ("self", "generation_config", "continuous_batching_config"), "takes the manager that install has left there",
        '"_cached_continuous_batching_manager"',
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "ContinuousMixin.destroy_cached_continuous_batching_manager", ("self",),
        "destroys the manager that install replaces", "cached_manager.destroy()",
    ),
    Hook(
        f"{_BATCHING}.continuous_api", "OutputRouter.fail_and_deliver", ("self", "state", "error"),
        "gives a cancelled request its final result",
    ),
    Hook(
        f"{_BATCHING}.scheduler", "Scheduler.clear_cancelled_requests", ("self",),
        "frees the blocks of cancelled requests and returns their states", "self.cache.free_blocks(request_id)",
    ),
    Hook(
        f"{_BATCHING}.scheduler", "Scheduler._infer_request_tokens", None,
        "asks the cache for a cached prefix of a waiting request", "self.cache.search_prefix_match(",
    ),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionCache.__init__",
        ("self", "config", "continuous_batching_config", "device", "distributed_helper", "dtype"),
        "our cache is a subclass that passes the pools' dtype", "ATTN_TYPE_TO_ALLOCATOR[attn_type](",
    ),
    Hook(f"{_BATCHING}.cache", "ATTN_TYPE_TO_ALLOCATOR", None, "the allocator of each kind of layer; ours meanwhile"),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionMemoryHandler.__init__",
        ("self", "config", "cb_config", "dtype", "bytes_per_sector", "tokens_per_sector"),
        "plans for attention masks and repeated heads, which we do not have",
        "self.num_attention_masks",
    ),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionCache.update",
        ("self", "key_states", "value_states", "layer_idx", "kwargs"),
        "the model calls it in every layer, before the attention function gets the same kwargs",
    ),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionCache.extend_read_and_write_indices",
        ("self", "request_id", "past_length", "query_length", "read_index", "write_index"),
        "called for every request of a step, in the order of the batch",
    ),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionCache.search_prefix_match", ("self", "request_id", "prompt_ids"),
        "where a prefix is looked up, and hits are counted",
    ),
    Hook(
        f"{_BATCHING}.cache", "PagedAttentionCache._infer_read_cache_limit", ("self",),
        "bounds what models with only window layers read; no bound here, where every token is kept",
    ),
    Hook(
        f"{_BATCHING}.cache_allocators.full_attention", "FullAttentionCacheAllocator.register_cache_tensor",
        ("self", "bytes_per_sector", "non_trash_bytes", "cache_tensor", "pool"),
        "where the memory of the pages is known: [block, layer of the group, K or V, page]",
        "cache_shape = (total_tokens, 2, self.num_key_value_heads, self.head_dim)",
    ),
    Hook(
        f"{_BATCHING}.cache_allocators.cache_allocator", "CacheAllocator.copy_blocks",
        ("self", "source_block_ids", "dest_block_ids"), "copies the codes of a forked request; ours also the scales",
        "self._copy_view.index_copy_(",
    ),
    Hook(
        f"{_BATCHING}.input_outputs", "ContinuousBatchingIOs.prepare_batch_tensors", None,
        "keeps the order of the requests, and accepts that no indices were written",
        "self.cache.extend_read_and_write_indices(",
    ),
    Hook(f"{_BATCHING}.utils", "find_num_key_value_heads", ("config",), "KV heads of a configuration"),
    Hook(
        f"{_BATCHING}.requests", "RequestState.generated_len", ("self",), "tells a prefill from a decode step",
    ),
    Hook("transformers", "AttentionInterface.register", None, "the name of our attention function"),
    Hook("transformers.masking_utils", "AttentionMaskInterface.register", None, "our attention function needs no mask"),
    Hook(
        "transformers.models.gpt_oss.modeling_gpt_oss", "GptOssAttention.forward", None,
        "passes the sinks as s_aux, the window, and the kwargs that the cache has changed",
        "kwargs=kwargs)",
    ),
    Hook(
        "transformers.cli.serve", "Serve.__init__", ("self", "force_model", "continuous_batching"),
        "the server; takes ModelManager and build_server from their modules when it is called",
        "from .serving.model_manager import ModelManager",
    ),
    Hook(
        "transformers.cli.serving.model_manager", "ModelManager._load_model", ("self", "model_id_and_revision"),
        "loads the model; ours loads it and installs the engine",
    ),
    Hook(
        "transformers.cli.serving.model_manager", "ModelManager._load_processor", ("self", "model_id_and_revision"),
        "loads the tokenizer; ours makes one for random weights",
    ),
    Hook(
        "transformers.cli.serving.utils", "CBGenerateManager.init_cb", ("self", "model", "gen_config"),
        "starts the manager that install has left on the model", "model.init_continuous_batching(",
    ),
    Hook(
        "transformers.cli.serving.server", "build_server", ("model_manager", "chat_handler", "completion_handler"),
        "the application, to which a route and the reasons of errors are added",
    ),
)  # fmt: skip


def check_version() -> None:
    """Raise unless the installed transformers is the supported one.

    Raises:
        TransformersError: transformers is missing or has another version.
    """
    accepted = f"accepted: {VERSIONS}.*, which kvgather[serving] installs"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise TransformersError(f"transformers is not installed; {accepted}") from None
    if version.split(".")[:2] != VERSIONS.split("."):
        raise TransformersError(f"transformers is {version}; {accepted}")


def moved() -> list[str]:
    """The hooks that are not where, or not what, this package expects; each with what was found."""
    return [f"{hook.module}.{hook.name} ({hook.why}): {fault}" for hook in HOOKS if (fault := _fault(hook))]


def _fault(hook: Hook) -> str:
    try:
        found: object = importlib.import_module(hook.module)
        for part in hook.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"is missing: {error}"
    if hook.parameters is not None:
        parameters = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
        if parameters[: len(hook.parameters)] != hook.parameters and not set(hook.parameters) <= set(parameters):
            return f"has the parameters {', '.join(parameters)}; expected: {', '.join(hook.parameters)}"
    if hook.contains and hook.contains not in inspect.getsource(found):  # type: ignore[arg-type]
        return f"does not contain {hook.contains!r}"
    return ""
