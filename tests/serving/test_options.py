"""Options that no part of the engine would use are refused, and the others reach every attention of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather import PagedKVCache, PrefixBatch
from kvgather.serving import Options, attention
from tests.serving.engines import answers, engine, prompts, tokens

pytestmark = pytest.mark.usefixtures("stopped")


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("scale", [0.5, torch.ones(1)], ids=["a float", "a tensor"])
def test_a_scale_of_pools_without_one_is_refused(name: str, scale: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} was given; accepted for scale none: None"):
        Options(scale="none", **{name: scale})
    with pytest.raises(ValueError, match=r"was given for pools of torch\.float32; accepted: an FP8 dtype"):
        Options(dtype=torch.float32, **{name: scale})
    assert Options(scale="none").kind == Options(dtype=torch.float32).kind == "none"


@pytest.mark.parametrize("own_gather", [False, True])
def test_the_workspace_is_bounded_in_every_attention(own_gather: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gather of the caller, the sequences that it does not read are attended to by this package's."""
    seen: list[object] = []
    attend = attention.prefix_attention

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("workspace_tokens"))
        return attend(*args, **kwargs)

    def gather(pool: PagedKVCache, batch: PrefixBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = pool.gather(batch.everything.plan, out_dtype=dtype)
        return key, value

    monkeypatch.setattr(attention, "prefix_attention", watched)
    options = Options(
        dtype=torch.float32, path="gather", workspace_tokens=24, gather=gather if own_gather else None
    )  # fmt: skip
    tokens(answers(engine(options=options, max_batch_tokens=64), prompts()[:3], 2))
    assert seen and set(seen) == {24}
