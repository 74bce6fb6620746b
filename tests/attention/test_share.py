"""The shares of several ranks, one after the other in one process: merged, they give what one pool gives."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.batch.share import Share, check_share
from kvgather.cases import sinks_of
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention.batches import Setup, assert_close, setup
from tests.where import on_each_device

RANKS = (1, 2, 3, 5)


def attended(made: Setup, ranks: int, lengths: bool = True, **more: Any) -> tuple[Tensor, Tensor]:
    """The merged states of all ranks. The pools of all are one pool here: block ids are the same."""
    states = []
    for rank in range(ranks):
        states.append(made.attend(made.batch(lengths, share=Share(rank, ranks)), **more))
    out, lse = states[0]
    for state in states[1:]:
        out, lse = kg.merge_states(out, lse, *state)
    return out, lse


def draw(seed: int, **more: Any) -> tuple[Setup, int | None]:
    """A batch with a spare row or none, and a window or none."""
    number = random.Random(seed)
    page_size = more.pop("page_size", number.choice([1, 3, 4, 8]))
    batch = number.randint(1, 4)
    new = [number.choice([0, 1, 1, 2, number.randint(1, 3 * page_size)]) for _ in range(batch)]
    cached = [number.choice([0, 1, number.randint(0, 9 * page_size)]) for _ in range(batch)]
    window = number.choice([None, None, 1, 3, 20, 300])
    return setup(new, cached, page_size=page_size, spare=number.choice([0, 2]), seed=seed, **more), window


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", range(20))
def test_gathered(seed: int, ranks: int) -> None:
    made, window = draw(seed)
    for lengths in (True, False):
        for workspace in (None, 16):
            got = attended(made, ranks, lengths, window=window, workspace_tokens=workspace, path="gather")
            assert_close(got, made.wanted(window=window), made.rows)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("path", ["direct", "hybrid"])
@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_from_the_pages(layout: str, where: str, path: str, ranks: int) -> None:
    for seed in range(2 if where == "cpu" else 3):  # on a GPU, each rank of each seed takes seconds to compile
        kind = KINDS[(seed + ranks) % len(KINDS)]
        made, window = draw(
            seed + 100 * ranks, page_size=16, layout=layout, dtype=torch.float8_e4m3fn, kind=kind, dims=(32, 16),
            device=where,
        )  # fmt: skip
        got = attended(made, ranks, seed % 2 == 0, window=window, path=path)
        assert_close(got, made.wanted(window=window), made.rows)


@on_each_device
def test_a_common_part_is_gathered(where: str) -> None:
    made = setup([2, 1], [4096, 4100], page_size=64, device=where)
    for ranks in (2, 3):
        batch = made.batch(share=Share(0, ranks))
        assert batch.common_cached > 0
        assert_close(attended(made, ranks, path="hybrid"), made.wanted(), made.rows)


@pytest.mark.parametrize("path", ["gather", "direct"])
def test_only_its_own_pages_are_read(path: str) -> None:
    """What other ranks' pages hold is NaN here, and nothing of it arrives."""
    for seed in range(6):
        made, window = draw(seed)
        wanted = attended(made, 3, window=window, path="gather")
        parts = []
        for rank in range(3):
            other = setup_again(made)
            for sequence, tokens in enumerate(made.total):
                for column in range(-(-tokens // made.cache.geometry.page_size)):
                    if column % 3 != rank:
                        block = int(made.block_table[sequence, column])
                        other.cache.key_cache[block], other.cache.value_cache[block] = math.nan, math.nan
            parts.append(other.attend(other.batch(share=Share(rank, 3)), window=window, path=path))
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = kg.merge_states(out, lse, *part)
        torch.testing.assert_close((out, lse), wanted, rtol=1e-5, atol=1e-5)


def setup_again(made: Setup) -> Setup:
    """The same batch over a copy of the pool."""
    g, cache = made.cache.geometry, made.cache
    copy = kg.PagedKVCache.from_tensors(cache.key_cache.clone(), cache.value_cache.clone(), layout=g.layout)
    return Setup(**{**made.__dict__, "cache": copy})


def test_the_sink_enters_where_it_is_passed() -> None:
    made = setup([2, 1], [13, 30])
    sinks = sinks_of("on", 4)
    assert sinks is not None
    states = [made.attend(made.batch(share=Share(rank, 2)), sinks=sinks if rank else None) for rank in range(2)]
    got = kg.merge_states(*states[0], *states[1])
    assert_close(got, made.wanted(sinks=sinks), made.rows)


def test_bad_blocks_are_nan_on_the_rank_that_has_them() -> None:
    made = setup([2], [30])
    made.block_table[0, 3] = 10_000
    states = [made.attend(made.batch(share=Share(rank, 2))) for rank in range(2)]
    assert not states[0][0].isnan().any() and states[1][0].isnan().all()
    made.batch(share=Share(0, 2)).check()
    with pytest.raises(kg.PlanError, match=r"block_table\[0, 3\] \(sequence 0, column 3\) is 10000"):
        made.batch(share=Share(1, 2)).check()


def test_writers_and_slots() -> None:
    made = setup([3, 2], [6, 0], spare=1)
    batches = [made.batch(share=Share(rank, 2)) for rank in range(2)]
    assert batches[0].writers.tolist() == [1, 1, 0, 0, 0, -1]
    whole = made.batch()
    assert whole.writers.tolist() == [0, 0, 0, 0, 0, -1]
    for rank, batch in enumerate(batches):
        expected = torch.where(batch.writers == rank, whole.slots, -1)
        assert torch.equal(batch.slots, expected)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_held_counts_each_token_once(page_size: int, ranks: int) -> None:
    shares = [Share(rank, ranks) for rank in range(ranks)]
    counts = [0] * ranks
    for tokens in range(5 * page_size * ranks + 2):
        assert [share.held(tokens, page_size) for share in shares] == counts
        counts[tokens // page_size % ranks] += 1
    assert shares[0].held(-3, page_size) == 0


def test_a_share_is_checked() -> None:
    made = setup([1], [9])
    with pytest.raises(TypeError, match=r"share is \(0, 2\), a tuple; accepted: None, or a Share|share is .*accepted"):
        made.batch(share=(0, 2))
    with pytest.raises(ValueError, match=r"share\.rank is 2; accepted: 0 to 1"):
        made.batch(share=Share(2, 2))
    with pytest.raises(ValueError, match=r"share\.ranks is 0; accepted: 1"):
        made.batch(share=Share(0, 0))
    assert check_share(None) is None


def test_a_share_has_no_plan_of_all_tokens() -> None:
    with pytest.raises(ValueError, match="the batch has a share"):
        _ = setup([1], [9]).batch(share=Share(0, 2)).plan


def test_a_workspace_that_is_smaller_than_a_page() -> None:
    made = setup([1], [9])
    with pytest.raises(ValueError, match=r"workspace_tokens is 3; accepted for 1 sequences in pages of 4 tokens"):
        made.attend(made.batch(share=Share(0, 2)), path="gather", workspace_tokens=3)
