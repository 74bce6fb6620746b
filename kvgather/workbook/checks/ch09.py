"""Checks of chapter 09: which requests call the gather, the caller's flag, and what a prompt finds in the cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from kvgather.replay.gathers import furthest_element, gather_calling, scales
from kvgather.serving import Options
from kvgather.serving.serve import Sizes
from kvgather.serving.step import Row
from kvgather.workbook.checks import exercise, expect
from kvgather.workbook.checks.refusal import must_refuse, must_return
from kvgather.workbook.engine_run import EngineRun

BLOCKS, PAGE, HEADS = 32, 16, 2


@exercise("09.1", correct="a prefill that continues cached tokens, found in the cache or of an earlier chunk")
def calls_gather(answer: Callable[..., Any]) -> None:
    cases = {
        "a whole prompt, nothing cached": (44, 44),
        "a prompt of 44 tokens, of which 32 were found": (12, 44),
        "the second chunk of a prompt, nothing found": (8, 44),
        "a decode": (1, 45),
        "the first chunk of a long prompt": (512, 512),
        "two new tokens after 16 that were found": (2, 18),
        "a second chunk after 5 tokens": (39, 44),
        "a second chunk after 3 tokens": (7, 10),
    }
    for name, (new, tokens) in cases.items():
        got = answer(new, tokens)
        expect(Row(new, tokens, ()).extends, bool(got), f"{name}, new {new}, tokens {tokens}")


@exercise("09.2", correct="the engine's caller says what the scales are, and the engine's tokens are right")
def flag_of(answer: Callable[..., Any]) -> str | None:
    expected = BLOCKS * HEADS * PAGE
    one, heads, per_token = torch.ones(1), torch.ones(HEADS), torch.ones(BLOCKS, HEADS, PAGE)

    def name(k: torch.Tensor, v: torch.Tensor) -> str:
        return f"K {list(k.shape)} and V {list(v.shape)}, {expected} tokens and heads"

    for k, v, flag in ((one, one, False), (one.view(1, 1, 1), one, False), (per_token, per_token, True)):
        must_return(flag, answer, k, v, expected, name=name(k, v))
    kinds = (one, heads, per_token)
    for k, v in ((k, v) for k in kinds for v in kinds if k is heads or k is not v):
        must_refuse(answer, k, v, expected, name=name(k, v))
    return _in_an_engine(answer)


def _in_an_engine(answer: Callable[..., Any]) -> str | None:
    """Three requests, of which two find the first one's blocks, with the reader's flag in the caller."""
    from kvgather.lab.before_fix import cp_mha_gather_cache

    before: Callable[..., None] = cp_mha_gather_cache

    def call(*arguments: Any) -> None:
        pool, k_scale, v_scale = arguments[0], *arguments[5:7]
        flag = answer(k_scale, v_scale, pool.shape[0] * pool.shape[1])
        before(*arguments, per_token_quant=flag)

    chance = random.Random(0)
    prefix = [chance.randrange(3, 96) for _ in range(16)]
    prompts = [prefix + [chance.randrange(3, 96) for _ in range(4)] for _ in range(3)]
    k_scale, v_scale = scales(0.05, False, furthest_element(BLOCKS, PAGE, 2, 1), torch.device("cpu"))
    sizes = Sizes(num_blocks=BLOCKS, max_batched_tokens=20)
    right, mine = (
        EngineRun(Options(k_scale=k_scale, v_scale=v_scale, gather=gather), prompts, 2, sizes).run()
        for gather in (None, gather_calling(call))
    )
    differing = right.differing(mine)
    return f"in an engine, the requests {differing} of {len(prompts)} have other tokens" if differing else None


@exercise("09.3", correct="whole blocks of an equal beginning, and never all of the prompt")
def cached_tokens(answer: Callable[..., Any]) -> None:
    earlier = list(range(100, 150))
    cases = {
        "nothing is equal": list(range(40)),
        "40 equal tokens, then others": [*earlier[:40], *range(10)],
        "15 equal tokens, then others": [*earlier[:15], *range(20)],
        "the same prompt": list(earlier),
        "48 tokens, all equal to the first three blocks": earlier[:48],
        "16 tokens, all equal to the first block": earlier[:16],
        "equal but for the first token": [7, *earlier[1:]],
        "17 equal tokens": earlier[:17],
        "longer than the earlier prompt": [*earlier, *range(30)],
    }
    for name, prompt in cases.items():
        for page in (16, 4):
            equal = next((i for i, (a, b) in enumerate(zip(prompt, earlier, strict=False)) if a != b), None)
            equal = min(len(prompt), len(earlier)) if equal is None else equal
            right = min(equal, len(prompt) - 1) // page * page
            got = answer(list(prompt), list(earlier), page)
            expect(right, got, f"{name}, blocks of {page}")
