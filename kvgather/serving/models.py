"""Models with random weights: the published dimensions of GPT-OSS 20B, and small ones for a CPU.

Random weights are enough for what is served here: scheduling, memory and speed do not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from ..formats.checks import check_choice

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # with 0.02 all logits are about equal, and tokens would show no error
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
"""Dimensions of the small models: two layers, one KV head, no end of the text."""

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _small(config: type[PreTrainedConfig], **other: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: config(**(SMALL | other))


def _gpt_oss_20b() -> PreTrainedConfig:
    return GptOssConfig(
        num_hidden_layers=24, num_local_experts=32, num_experts_per_tok=4, hidden_size=2880, intermediate_size=2880,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128, vocab_size=201088,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip


_SIX_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": _small(GptOssConfig, sliding_window=24, **_EXPERTS),
    "20b": _gpt_oss_20b,
    "llama": _small(LlamaConfig),
    "qwen3": _small(Qwen3Config),
    "mistral": _small(MistralConfig, sliding_window=24),
    "tiny-6": _small(GptOssConfig, sliding_window=24, **_EXPERTS, **_SIX_HEADS),
    "llama-6": _small(LlamaConfig, **_SIX_HEADS, hidden_size=96),  # Llama: a multiple of its heads
}
"""Configurations by name: "tiny" and "20b" are GPT-OSS, the others small models of their families.

"tiny-6" and "llama-6" have six KV heads, which 2, 3 and 6 ranks divide.
"""


def random_model(name: str, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with random weights, created on its device.

    Args:
        name: one of `CONFIGS`. "20b" takes 42 GB in bfloat16.
        device, dtype: of the weights.
        seed: equal seeds give equal weights on one kind of device.

    Raises:
        ValueError: the name is unknown.
    """
    config = CONFIGS[check_choice(name, "config", tuple(CONFIGS))]()
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    # Greedy, and never an end of the text: each request generates as many tokens as it asks for.
    model.generation_config.update(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=20)
    return model
