"""Chapter 10: what each rank of `ranks_run` does."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..batch.share import Share
from ..parallel import ContextParallel, RankError
from .dealt import Dealt

__all__ = ["attend_batches", "lose_a_rank"]


def attend_batches(rank: int, ranks: int, batches: dict[str, dict[str, Any]], sink: float) -> dict[str, Any]:
    """Attend to each batch, as one of the ranks; what came out, and the bytes that this rank received."""
    answers = {}
    with ContextParallel() as attend:
        for name, numbers in batches.items():
            batch = Dealt(**numbers)
            pool = batch.pool(attend.share)  # this rank's pages of the cached tokens
            q, k, v = batch.rows()
            new = batch.is_new()
            before = attend.bytes_received, attend.bytes_least
            out = attend(q, k[new], v[new], pool, batch.batch(attend.share), sinks=torch.full((batch.q_heads,), sink))
            answers[name] = {
                "out": out.tolist(),
                "received": attend.bytes_received - before[0],
                "least": attend.bytes_least - before[1],
            }
    return answers


def lose_a_rank(rank: int, ranks: int, batch: dict[str, Any], lost: int, way: str, seconds: float) -> dict[str, Any]:
    """Attend twice; between the two, the lost rank dies or hangs.

    Args:
        rank, ranks: of this process.
        batch: the numbers of a `Dealt`.
        lost: the lost rank.
        way: "dies" or "hangs".
        seconds: the group's time-out.

    Returns:
        The ranks that the error names, and what it says of them, without the back end's own message.
    """
    numbers, share = Dealt(**batch), Share(rank, ranks)
    pool, mine = numbers.pool(share), numbers.batch(share)
    q, _, _ = numbers.rows()
    dist.barrier()  # processes start at different times; the short time-out counts from here
    with ContextParallel(dist.new_group(timeout=timedelta(seconds=seconds))) as attend:
        attend(q, None, None, pool, mine)
        if rank == lost:
            if way == "dies":
                os._exit(1)
            time.sleep(600)  # the parent kills it, once the others have ended
        try:
            attend(q, None, None, pool, mine)
        except RankError as error:
            if ranks > 2:
                time.sleep(seconds + 2)  # other ranks may still wait, and must not miss this one
            return {"ranks": error.ranks, "message": str(error).partition(". ")[0]}
    return {"ranks": [], "message": "no error"}
