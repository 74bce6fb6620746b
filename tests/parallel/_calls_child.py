"""A rank of test_calls: calls that are refused, groups within the group, and blocks that no rank has."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import kvgather as kg
from kvgather.batch.share import Share
from kvgather.cases import sinks_of
from kvgather.parallel import ContextParallel, RankError
from tests.attention.batches import assert_close, setup
from tests.parallel.gloo import finish, join, leave
from tests.parallel.pools import distribute, local_pool


class Ready:
    """One batch on one pool, and on the pools of the ranks."""

    def __init__(self, attend: ContextParallel, new: list[int], cached: list[int], **pool: Any) -> None:
        self.attend, self.one = attend, setup(new, cached, **pool)
        self.table = distribute(self.one, attend.share.ranks)
        self.pool = local_pool(self.one, self.table, *attend.share)

    def batch(self, table: Tensor | None = None, **more: Any) -> kg.PrefixBatch:
        g = self.pool.geometry
        table = self.table if table is None else table
        return self.attend.batch(table, *self.one.offsets, page_size=g.page_size, num_blocks=g.num_blocks, **more)

    def __call__(self, batch: kg.PrefixBatch | None = None, **more: Any) -> Any:
        q = more.pop("q", self.one.q)
        return self.attend(q, *self.one.new_tokens(), self.pool, batch or self.batch(), **more)


def close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def refused_calls(attend: ContextParallel) -> list[str]:
    """What each wrong call raises; nothing is written or sent."""
    ready, rank, ranks = Ready(attend, [1, 2], [13, 30]), attend.share.rank, attend.share.ranks
    before, calls, said = ready.pool.key_cache.clone(), attend.calls, []
    q, sinks = ready.one.q, sinks_of("on", 4)
    assert sinks is not None
    other = setup([1, 2], [13, 30]).batch
    wrong: list[dict[str, Any]] = [
        *({"batch": other(share=share)} for share in (Share((rank + 1) % ranks, ranks), Share(rank, ranks + 1))),
        {"batch": "junk"}, {"q": None}, {"q": q[:-1]}, {"q": q.double()}, {"q": q[:, :3]}, {"q": q[0]},
        *({"sinks": given} for given in (sinks[:3], sinks[None], sinks.double(), sinks.tolist())),
        {"q": q[0], "sinks": sinks}, {"window": 0}, {"path": "ring"}, {"softmax_scale": 0.0},
    ]  # fmt: skip
    for more in wrong:
        try:
            ready(**more)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}".partition(";")[0])
        else:
            said.append("accepted")
    assert torch.equal(before, ready.pool.key_cache) and attend.calls == calls
    return said


def negative_bits(attend: ContextParallel) -> bool:
    """q and sinks whose negative bit is set, as `prefix_attention` accepts them."""
    ready, sinks = Ready(attend, [1, 2], [13, 30]), sinks_of("on", 4)
    assert sinks is not None

    def negative(x: Tensor) -> Tensor:
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    wanted = ready(sinks=sinks)
    given = ready(q=negative(ready.one.q), sinks=negative(sinks))
    return torch.equal(given, wanted) and torch.equal(ready(q=negative(ready.one.q)), ready())


def ends_at_borders(attend: ContextParallel) -> list[int]:
    """Lengths at which some rank differs: each end of a page, and of a round over the ranks, and next to them."""
    page, found = 4, []
    for tokens in range(1, page * attend.share.ranks * 2 + 2):
        for new in sorted({1, min(page + 1, tokens), tokens}):
            ready = Ready(attend, [new], [tokens - new], page_size=page)
            if not close(ready(), ready.one.attend(ready.one.batch())[0]):
                found.append(tokens)
    return found


def bad_blocks(attend: ContextParallel) -> list[str]:
    """A block id that a rank's pool has not: NaN on every rank, in the rows that see it and in no others."""
    found = []
    ready, sinks = Ready(attend, [3, 1], [30, 9]), sinks_of("on", 4)
    for column in (0, 1, 7, 8):
        table = ready.table.clone()
        table[0, column] = 10**6
        for path in ("gather", "direct"):
            for window in (None, 6):
                out, lse = ready(ready.batch(table), sinks=sinks, window=window, path=path, return_lse=True)
                first_seen = [0 if window is None else 30 + row - window + 1 for row in range(3)]
                sees = [first // 4 <= column <= (30 + row) // 4 for row, first in enumerate(first_seen)] + [False]
                nan = torch.tensor(sees)[:, None].expand(4, 4)
                if not torch.equal(lse.isnan(), nan) or not torch.equal(out.isnan(), nan[..., None].expand_as(out)):
                    found.append(f"column {column}, {path}, window {window}")
    return found


def too_long(attend: ContextParallel) -> bool:
    """A sequence that is longer than `max_k`: NaN on every rank, also on those without its pages."""
    ready = Ready(attend, [1, 1], [3, 30])
    out = ready(ready.batch(max_k=10, total_q=2, total_k=35))
    return bool(out[1].isnan().all()) and close(out[:1], ready.one.attend(ready.one.batch())[0][:1])


def what_no_rank_sees(attend: ContextParallel) -> bool:
    """NaN in all that is in no sequence of a rank's pool changes nothing."""
    ready = Ready(attend, [3, 1], [30, 9])
    seen = torch.zeros(ready.pool.geometry.num_blocks, dtype=torch.bool)
    seen[ready.batch().block_table[ready.batch().block_table >= 0].long()] = True
    ready.pool.key_cache[~seen], ready.pool.value_cache[~seen] = math.nan, math.nan
    return close(ready(), ready.one.attend(ready.one.batch())[0])


def a_short_window_stays_local(attend: ContextParallel) -> list[Any]:
    """A layer whose tokens every rank has, between two that are distributed: what it moves, and whether it is right."""
    ready, sinks = Ready(attend, [3, 1], [30, 9]), sinks_of("on", 4)
    ready()
    one = setup([3, 1], [30, 9], seed=1)
    before = attend.calls, attend.bytes_received
    got = attend(one.q, *one.new_tokens(), one.cache, one.batch(), sinks=sinks, window=6, return_lse=True)
    moved = attend.calls - before[0], attend.bytes_received - before[1]
    assert_close(got, one.wanted(sinks=sinks, window=6), one.rows)
    return [*moved, close(ready(), ready.one.attend(ready.one.batch())[0])]


def two_of_one_group(attend: ContextParallel) -> list[Any]:
    """Both are used unequally often; none takes the other's ranks for missing. One is closed: what its call raises."""
    other, ready = ContextParallel(), Ready(attend, [1, 2], [13, 30])
    for _ in range(3):
        ready()
    Ready(other, [1, 2], [13, 30])()
    time.sleep(0.2)
    dist.barrier()
    missing = [list(each._ranks.missing()) for each in (attend, other)]
    dist.barrier()
    other.close()
    closed = Ready(other, [1, 2], [13, 30])
    before = closed.pool.key_cache.clone()
    try:
        closed()
    except RuntimeError as error:
        said = str(error)
    return [*missing, said, torch.equal(before, closed.pool.key_cache)]


def part_of_the_group(attend: ContextParallel) -> str:
    """A group of all ranks but the first."""
    group = dist.new_group(list(range(1, attend.share.ranks)))
    if attend.share.rank == 0:
        try:
            ContextParallel(group)
        except TypeError as error:
            return str(error)
        return "accepted"
    part = ContextParallel(group)
    ready = Ready(part, [1, 2], [13, 30])
    same = close(ready(), ready.one.attend(ready.one.batch())[0])
    dist.barrier(group)
    part.close()
    return f"rank {part.share.rank} of {part.share.ranks}, {same}, {part.calls} call"


def other_shapes(attend: ContextParallel) -> str:
    """The last rank has more rows than the others. What the error says of it, where torch compares the shapes."""
    ready = Ready(attend, [1, 5 if attend.share.rank == attend.share.ranks - 1 else 2], [13, 30])
    try:
        ready()
    except RankError as error:
        return str(error)
    return "no error"


ALL: tuple[Callable[[ContextParallel], Any], ...] = (
    refused_calls, negative_bits, ends_at_borders, bad_blocks, too_long, what_no_rank_sees,
    a_short_window_stays_local, two_of_one_group, part_of_the_group,
)  # fmt: skip
WITH_SHAPES_COMPARED = (other_shapes,)


def main() -> None:
    folder, rank, _ = join(20.0)
    attend = ContextParallel()
    compared = "TORCH_DISTRIBUTED_DEBUG" in os.environ
    said = {each.__name__: each(attend) for each in (WITH_SHAPES_COMPARED if compared else ALL)}
    leave(folder, rank, said)
    finish(attend)


if __name__ == "__main__":
    main()
