"""What test_sanitizer runs under a memory checker: `python -m tests.gather.sanitized good|before DEVICE`.

`good` gathers from block tables and offsets that are wrong in every way, and compares with plain torch on a CPU.
`before` runs the kernel as it was, with a scale of one element: it reads outside it, and the checker has to see that.
"""

from __future__ import annotations

import os
import sys

import torch

import kvgather as kg
from kvgather.cases import Case, build
from kvgather.formats.layout import LAYOUTS
from tests.gather.oracle import assert_same, untouched

PAST = 2**31 - 1
TABLE = [[4, 0, -1], [5, -(2**31), 1], [PAST, 2, 3], [3, 3, 3]]
"""A pool of 5 blocks has ids 0 to 4; all other ids are outside."""
BATCHES = {
    "as many rows as tokens": ([0, 35, 48, 60, 61], [10, 0, 5, 0]),
    "past the table's columns": ([0, 35, 70, 120, 130], [10, 30, 47, 1000]),
    "offsets that fall, and pass the output": ([0, 50, 20, 90, 10**6], [-3, 2**31 - 2, 0, 0]),
}
"""Offsets of the sequences in K, and where each begins."""
GATHERS = len(LAYOUTS) * 2 * len(BATCHES)


def good(device: str) -> int:
    """Gather every layout, with a scale for all and with one for each token, from every bad batch."""
    done = 0
    for layout in LAYOUTS:
        for kind in ("per-tensor", "per-token-head"):
            case = Case(
                layout=layout, k_kind=kind, v_kind=kind, num_heads=3, k_dim=16, v_dim=32, num_blocks=5,
                lengths=(16,), starts=(),
            )  # fmt: skip
            here, there = build(case), build(case)
            cache = there.cache
            moved = kg.PagedKVCache.from_tensors(
                *(tensor.to(device) for tensor in (cache.key_cache, cache.value_cache)), layout=layout,
                k_scale=_to(cache.k_scale, device), v_scale=_to(cache.v_scale, device), k_kind=kind, v_kind=kind,
            )  # fmt: skip
            for offsets, starts in BATCHES.values():
                rows = min(offsets[-1], 96)
                shape = (rows, 3)
                wanted = untouched((*shape, 16), case.out_dtype), untouched((*shape, 32), case.out_dtype)
                got = tuple(tensor.to(device) for tensor in wanted)
                here.cache.gather(_plan(offsets, starts, rows, "cpu"), out=wanted, backend="torch")
                moved.gather(_plan(offsets, starts, rows, device), out=(got[0], got[1]), backend="triton")
                assert_same((got[0], got[1]), wanted)
                assert bool(wanted[0].isnan().any()), "every batch has rows that are nowhere"
                done += 1
    return done


def _to(scale: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if scale is None else scale.to(device)


def _plan(offsets: list[int], starts: list[int], rows: int, device: str) -> kg.GatherPlan:
    def ints(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return kg.GatherPlan.build(
        ints(TABLE), ints(offsets), page_size=16, num_blocks=5, total_tokens=rows, seq_starts=ints(starts)
    )


def before(device: str) -> None:
    """Tokens all over a pool: the scale is read far past its one element, at distances from 8 KB to 512 KB."""
    from kvgather.lab.before_fix import cp_mha_gather_cache, token_to_batch

    built = build(Case(layout="SHUFFLE", num_blocks=4096, lengths=(4,), starts=()))
    cache = built.cache
    assert cache.k_scale is not None and cache.v_scale is not None and cache.k_scale.numel() == 1
    rows = [torch.zeros(4, 2, 16, device=device) for _ in range(2)]
    table = torch.tensor([[63], [700], [2047], [4095]], dtype=torch.int32, device=device)
    offsets = torch.arange(5, dtype=torch.int32, device=device)
    cp_mha_gather_cache(
        cache.key_cache.to(device), cache.value_cache.to(device), rows[0], rows[1], table, cache.k_scale.to(device),
        cache.v_scale.to(device), offsets, token_to_batch(offsets), torch.zeros_like(offsets[:4]), True, "SHUFFLE", 4,
    )  # fmt: skip
    torch.cuda.synchronize()


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "good":
        print(f"{good(where)} gathers are right", flush=True)
    else:
        try:
            before(where)
        except RuntimeError as error:  # the checker ends the kernel at its first bad access
            print(f"stopped: {str(error).splitlines()[0]}", flush=True)
        os._exit(0)  # to free memory in a context that is broken would abort, and hide the checker's own status
