"""With FP8 pools the engine's logits are those of attention over the same rounded K and V."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from kvgather.serving import Options
from kvgather.serving.models import random_model
from tests.serving.engines import CPU, answers, engine, prompts, tokens

pytestmark = pytest.mark.usefixtures("stopped")
SCALE, TOLERANCE = 0.05, 1e-2


def rounded(states: Tensor, scale: Tensor | float) -> Tensor:
    codes = (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float() * scale


def per_tensor(module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **others: Any) -> Any:
    return eager_attention_forward(module, q, rounded(k, SCALE), rounded(v, SCALE), *rest, **others)


def per_token(module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **others: Any) -> Any:
    scales = [states.abs().amax(-1, keepdim=True) / 448 for states in (k, v)]
    return eager_attention_forward(module, q, rounded(k, scales[0]), rounded(v, scales[1]), *rest, **others)


ROUNDED = {"per-tensor": per_tensor, "per-token-head": per_token}


def logits_of(model: Any, kind: str, ids: list[int]) -> Tensor:
    """Logits of every position, with K and V rounded as the pool rounds them."""
    name = f"rounded-{kind}"
    AttentionInterface.register(name, ROUNDED[kind])
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
def test_logits(kind: str, layout: str) -> None:
    given = SCALE if kind == "per-tensor" else None
    manager = engine(options=Options(layout=layout, scale=kind, k_scale=given, v_scale=given))
    seen: list[Tensor] = []
    manager.model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().float()))
    reference = random_model("tiny", device=CPU, dtype=torch.float32)
    for prompt in prompts()[:4]:
        seen.clear()
        (new,) = tokens(answers(manager, [prompt], 6))
        got = torch.cat([out.reshape(-1, out.shape[-1])[-1:] for out in seen])[-6:]
        wanted = logits_of(reference, kind, [*prompt, *new])[len(prompt) - 1 : -1]
        error = (got - wanted).abs().amax(-1) / wanted.abs().amax(-1)
        assert got.shape == wanted.shape and error.max() < TOLERANCE, error
    assert manager.cache is not None and manager.cache.hits == 3


def test_layouts_agree() -> None:
    """Equal codes in other places: equal tokens, bit for bit, at equal chunks."""
    found = [
        tokens(answers(engine(options=Options(layout=layout)), prompts(), 8)) for layout in ("NHD", "HND", "SHUFFLE")
    ]
    assert found[0] == found[1] == found[2]


def test_scales_are_of_the_kind() -> None:
    for kind, shape in (("per-tensor", [1]), ("per-head", [1]), ("per-page-head", None), ("per-token-head", None)):
        manager = engine(options=Options(scale=kind))
        answers(manager, prompts()[:1], 2)
        assert manager.cache is not None
        for layer in (0, 1):
            pool = manager.cache.layer_pool(layer)
            g = pool.geometry
            sizes = {"per-page-head": [g.num_blocks, 1], "per-token-head": [g.num_blocks, 1, 16]}
            assert pool.k_scale is not None and list(pool.k_scale.shape) == (shape or sizes[kind])
            assert pool.k_kind == pool.v_kind == kind
