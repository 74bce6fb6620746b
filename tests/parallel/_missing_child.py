"""A rank of test_missing: one rank dies, hangs or raises before a call; the others leave the error that they get."""

from __future__ import annotations

import faulthandler
import os
import sys
import time

import torch

from kvgather.parallel import ContextParallel, RankError
from tests.attention.batches import setup
from tests.parallel.gloo import DEVICE, join, leave
from tests.parallel.pools import distribute, local_pool

SECONDS = 6.0 if DEVICE == "cpu" else 60.0
"""The group's time-out: on a GPU longer than a kernel takes to compile, and than a dead rank takes to be reported."""
LAST = 3
"""Calls until the rank is missing."""


def main() -> None:
    how, which = os.environ["MISSING"].split()
    folder, rank, ranks = join(SECONDS)
    faulthandler.dump_traceback_later(SECONDS + 60, exit=True)  # says where it waits, if it does so for ever
    attend = ContextParallel()
    made = setup([1, 2], [13, 30], device=DEVICE)
    table = distribute(made, ranks)
    cache = local_pool(made, table, rank, ranks)
    g = cache.geometry
    batch = attend.batch(table, *made.offsets, page_size=g.page_size, num_blocks=g.num_blocks)
    for call in range(1, LAST + 2):
        if call == LAST and rank == int(which):
            if how == "dies":
                os._exit(7)
            if how == "hangs":
                time.sleep(600)
            if how == "raises":
                attend(made.q, None, None, cache, batch, sinks=torch.zeros(3, device=DEVICE))
        begin = time.monotonic()
        try:
            attend(made.q, *made.new_tokens(), cache, batch)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except RankError as error:
            leave(folder, rank, {"call": call, "seconds": time.monotonic() - begin, "ranks": error.ranks,
                                 "text": str(error)})  # fmt: skip
            sys.exit(3)


if __name__ == "__main__":
    main()
