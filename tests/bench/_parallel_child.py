"""A rank of test_parallel: runs a part of the benchmark with something changed, and leaves what it raised."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kvgather.bench import parallel
from kvgather.bench.ranks import turns
from kvgather.bench.ranks.inputs import PAGES_AT_ONCE, Pools, build_pools
from kvgather.cases.context import ContextCase
from kvgather.parallel import ContextParallel
from tests.parallel.gloo import finish, join, leave

CPU = torch.device("cpu")
CASE = ContextCase(100, 2)


def wrong_page(pools: Pools, rank: int) -> None:
    """Other bytes in the last rank's part of the context."""
    if rank == dist.get_world_size() - 1:
        codes = pools.own[0].value_cache.view(torch.uint8)
        codes.copy_(codes.flip(0))


def nan_page(pools: Pools, rank: int) -> None:
    """NaN in the last rank's part."""
    if rank == dist.get_world_size() - 1:
        pools.own[0].value_cache.view(torch.uint8)[0] = 0x7F


def wrong_lse(pools: Pools, rank: int) -> None:
    """Keys that are larger by the same factor for all: the output differs little, the log-sum-exp much."""
    if rank == dist.get_world_size() - 1:
        scale = pools.own[0].k_scale
        assert scale is not None
        scale.mul_(1.01)


def timed(*_: Any, **__: Any) -> None:
    """In place of the timing. No mock: it would keep the calls, and with them the group, until the interpreter ends."""
    raise AssertionError("timed")


def refused(attend: ContextParallel, change: Any) -> str:
    """What `measure` raises with changed pools; it must not time them."""
    pools = build_pools(CASE.context, CASE.new, attend.share, CPU)
    change(pools, attend.share.rank)
    with mock.patch.object(parallel, "time_on_ranks", timed):
        try:
            parallel.measure(CASE, attend, pools, CPU)
        except (ArithmeticError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def same_pages(attend: ContextParallel) -> bool:
    """Whether all pages of the whole context are on their ranks, in several steps of drawing."""
    with mock.patch("kvgather.bench.ranks.inputs.PAGES_AT_ONCE", 3):
        pools = build_pools(100, 33, attend.share, CPU)
    assert PAGES_AT_ONCE > 3
    columns = pools.table.shape[1]
    mine = range(attend.share.rank, columns, attend.share.ranks)
    pages = pools.own[0].key_cache.view(torch.uint8)[pools.table[0, mine.start :: mine.step].long()]
    all_pages: list[Any] = [None] * attend.share.ranks
    dist.all_gather_object(all_pages, pages)
    if pools.whole is None or pools.whole_table is None:
        return True
    whole = pools.whole[0].key_cache.view(torch.uint8)[pools.whole_table[0].long()]
    return all(torch.equal(whole[rank :: attend.share.ranks], held) for rank, held in enumerate(all_pages))


def in_turns(rank: int) -> dict[str, Any]:
    """How often each way ran on this rank, and the times in µs, of which the slowest rank's are reported."""
    clock = mock.Mock(now=0.0, ran=[])
    clock.perf_counter = lambda: clock.now

    def call(name: str, seconds: float) -> Tensor:
        clock.now += seconds
        clock.ran.append(name)
        return torch.empty(0)

    ways = {
        "alone": [lambda: call("alone", 0.02)] if rank == 0 else [],
        "all": [lambda: call("all 0", 0.001 * (1 + rank)), lambda: call("all 1", 0.001 * (1 + rank))],
    }
    with (
        mock.patch.object(turns, "time", clock),
        mock.patch.multiple(turns, SAMPLE=0.01, LEAST_ROUNDS=3),
    ):
        times = turns.time_on_ranks(ways, CPU, seconds=0.05)
    found: dict[str, Any] = {name: each.eager.p50 for name, each in times.items()}
    samples = [each.eager.samples for each in times.values()]
    return found | {"samples": samples, "ran": clock.ran, "graphs": [each.graph for each in times.values()]}


def main() -> None:
    folder, rank, _ = join()
    attend = ContextParallel()
    said: dict[str, Any] = {change.__name__: refused(attend, change) for change in (wrong_page, nan_page, wrong_lse)}
    said["nothing wrong"] = refused(attend, lambda *_: None)
    said["same pages"] = same_pages(attend)
    said["turns"] = in_turns(rank)
    leave(folder, rank, said)
    finish(attend)


if __name__ == "__main__":
    main()
