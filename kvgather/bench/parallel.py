"""`kvgather bench parallel`: one long context on the GPUs of all ranks, against one GPU and against the ideal.

Started by `torchrun`, once on each rank: NCCL and one GPU for each, or gloo on a CPU, which shows that it works. Each
case is one layer of one sequence with a long cached context, whose pages are distributed over the ranks:

    one GPU             `prefix_attention` on rank 0 alone, with the whole context; the other ranks wait
    context parallel    `ContextParallel` on all ranks
    its parts, alone    local attention, the all-gather, the merge

A time is that of the slowest rank. The ideal is one GPU's time over the number of ranks.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..attention.choose import Layer, route_of
from ..attention.prefix import partial_state, prefix_attention
from ..batch.share import Share
from ..blocks import cu_seqlens
from ..cache import PagedKVCache
from ..cases.context import CONTEXTS, NEW, ContextCase
from ..parallel import ContextParallel
from ..parallel.exchange import Exchange, all_gather
from ..parallel.states import merged
from .keep import RowWriter
from .machine import COMMIT, default_csv, machine
from .progress import Progress
from .ranks import rows as rows_of_ranks
from .ranks.group import joined, link, nccl_version
from .ranks.inputs import Pools, build_pools, check_memory, new_rows
from .ranks.rows import GATHER, LOCAL, MERGE, ONE, TOGETHER, Row, rows_of
from .ranks.targets import summary
from .ranks.turns import largest, time_on_ranks
from .runner import Call

__all__ = ["command", "measure", "run", "summary"]

TOLERANCE, LSE_TOLERANCE = 2e-2, 1e-3
"""Of a merged output, relative; of its log-sum-exp, absolute."""
MOST_TOKENS = 2**30
"""Of a sequence; offsets are int32."""

Attending = Callable[..., Any]
"""A call of `prefix_attention` or of `ContextParallel`; it also takes `return_lse`."""


def cases(contexts: Sequence[int], new: Sequence[int]) -> list[ContextCase]:
    """All cases, those of one context next to each other."""
    return [ContextCase(context, tokens) for context in contexts for tokens in new]


def run(
    device: torch.device,
    *,
    contexts: Sequence[int] = CONTEXTS,
    new: Sequence[int] = NEW,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[Sequence[ContextCase]], Iterable[ContextCase]] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure the cases whose name contains `only`, on all ranks of the default group.

    Args:
        device: this rank's.
        contexts, new: cached and new tokens of the cases.
        only, seconds, progress, keep: as in `run_cases`; `progress` and `keep` on rank 0.

    Returns:
        The rows on rank 0, none on others.

    Raises:
        ValueError: no case's name contains `only`, or a context does not fit on one GPU.
        ArithmeticError: the ranks' output is not that of one GPU; nothing was timed. On all ranks.
    """
    known = cases(contexts, new)
    selected = [case for case in known if only in case.name]
    if not selected:
        raise ValueError(f"--case is {only!r}; accepted: part of one of {', '.join(case.name for case in known)}")
    rows: list[Row] = []
    pools: Pools | None = None
    context = -1
    with ContextParallel() as attend:
        for case in selected if progress is None else progress(selected):
            if case.context != context or pools is None:
                pools = None  # frees the memory of the context before
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                context = case.context
                check_memory(context, max(new), device)
                pools = build_pools(context, max(new), attend.share, device)
            measured = measure(case, attend, pools, device, seconds=seconds)
            if keep is not None:
                keep(measured)
            rows += measured
    return rows


def measure(
    case: ContextCase, attend: ContextParallel, pools: Pools, device: torch.device, *, seconds: float = 0.2
) -> list[Row]:
    """Compare the ranks' output with one GPU's, then time both, and the parts.

    Returns:
        The rows on rank 0, none on others.

    Raises:
        ArithmeticError: the outputs differ; on all ranks.
    """
    q, k_new, v_new = new_rows(case, device)
    offsets = cu_seqlens([case.new], device), cu_seqlens([case.tokens], device)
    layer = Layer(case.Q_HEADS, q.dtype, None, None, "auto")

    def built(build: Callable[..., PrefixBatch], table: Tensor, pool: PagedKVCache) -> tuple[PrefixBatch, str]:
        """The batch, and the path that `auto` takes."""
        batch = build(
            table, *offsets, page_size=case.PAGE, num_blocks=pool.geometry.num_blocks, seqlens_q=[case.new],
            seqlens_k=[case.tokens],
        )  # fmt: skip
        batch.check()
        return batch, route_of(batch, pool, layer).path

    paths = {}
    alone: list[Attending] = []
    if pools.whole is not None and pools.whole_table is not None:
        whole, paths[ONE] = built(PrefixBatch.build, pools.whole_table, pools.whole[0])
        alone = [partial(prefix_attention, q, k_new, v_new, pool, whole) for pool in pools.whole]
    batch, path = built(attend.batch, pools.table, pools.own[0])
    paths |= {TOGETHER: path, LOCAL: path}
    together: list[Attending] = [partial(attend, q, k_new, v_new, pool, batch) for pool in pools.own]
    local = [partial(_local, q, k_new, v_new, pool, batch, attend.share) for pool in pools.own]

    before = attend.calls, attend.bytes_received, attend.bytes_least
    for at, call in enumerate(together):
        expected = alone[at % len(alone)](return_lse=True) if alone else None
        check(case, call(return_lse=True), expected)
    calls, received, least = (
        now - then for now, then in zip((attend.calls, attend.bytes_received, attend.bytes_least), before, strict=True)
    )
    buffers, form, ranks = (exchange := local[0]()).buffers, exchange.form, attend.share.ranks
    own = buffers[attend.share.rank : attend.share.rank + 1]
    gather = partial(all_gather, buffers, own, group=attend.group)  # in place, as `ContextParallel` does
    gather()
    ways: dict[str, Sequence[Call]] = {
        ONE: alone, TOGETHER: together, LOCAL: local, GATHER: [gather],
        MERGE: [partial(merged, buffers, form, ranks, None)],
    }  # fmt: skip
    times = time_on_ranks(ways, device, seconds=seconds)
    if attend.share.rank > 0:
        return []
    where = {"link": link(device), "nccl": nccl_version(device), **machine(device.type)}
    return rows_of(case, times, paths, attend.share.ranks, (received // calls, least // calls), where)


def _local(q: Tensor, k_new: Tensor, v_new: Tensor, pool: PagedKVCache, batch: PrefixBatch, share: Share) -> Exchange:
    """A rank's part of a call: it writes, and attends to its own pages."""
    exchange = Exchange(share, q.device)
    partial_state(q, k_new, v_new, pool, batch, None, None, None, None, "auto", exchange)
    return exchange


def check(case: ContextCase, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor] | None) -> None:
    """Compare every rank's output and log-sum-exp with what rank 0 expects.

    Args:
        case: for the message.
        actual: this rank's.
        expected: on rank 0.

    Raises:
        ArithmeticError: those of a rank differ; on all ranks.
    """
    errors = []
    for at, ours in enumerate(actual):
        wanted = torch.empty_like(ours) if expected is None else expected[at].contiguous()
        dist.broadcast(wanted, 0)
        difference, wanted = ours.double() - wanted.double(), wanted.double()
        error = float(difference.norm() / wanted.norm() if at == 0 else difference.abs().max())
        errors.append(error if math.isfinite(error) else math.inf)
    error, lse_error = largest(errors, actual[0].device)
    if error > TOLERANCE or lse_error > LSE_TOLERANCE:
        raise ArithmeticError(
            f"context parallel is not one GPU's output on {case.name}: error {error:.2g}, accepted {TOLERANCE}; of the "
            f"log-sum-exp {lse_error:.2g}, accepted {LSE_TOLERANCE}"
        )


def command(arguments: Namespace) -> int:
    """`kvgather bench parallel` on this rank; rank 0 prints the rows and writes them to a file.

    Raises:
        ValueError, ArithmeticError: see `run` and `joined`.
    """
    contexts = _numbers(arguments.contexts, "--contexts", CONTEXTS)
    new = _numbers(arguments.new, "--new", NEW)
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    with joined(arguments.device) as device:
        measuring = partial(run, device, contexts=contexts, new=new, only=arguments.case, seconds=arguments.seconds)
        if dist.get_rank() > 0:
            measuring()
            return 0
        path = None
        if arguments.csv is not None:
            default = default_csv("parallel", device.type)
            path = Path(arguments.csv or default.with_stem(f"{default.stem}_x{dist.get_world_size()}"))
        with Progress() as progress, RowWriter(path, progress, form=rows_of_ranks) as keep:
            rows = measuring(progress=progress, keep=keep)
            keep.say(f"\n{summary(rows)}")
    return 0


def _numbers(text: str | None, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers in a text such as "1,16,512".

    Raises:
        ValueError: it has something else.
    """
    if text is None:
        return default
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_TOKENS for part in numbers):
        raise ValueError(
            f"{name} is {text!r}; accepted: numbers from 1 to {MOST_TOKENS:,}, such as {','.join(map(str, default))}"
        )
    return tuple(int(part) for part in numbers)
