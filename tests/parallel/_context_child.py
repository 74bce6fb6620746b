"""A rank of test_context: runs every case of `CASES`, and leaves what differs from one process."""

from __future__ import annotations

import math
import os
import random
import traceback
from typing import Any

import torch
import torch.distributed as dist

import kvgather as kg
from kvgather.cases import sinks_of
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from kvgather.parallel import ContextParallel
from tests.attention.batches import setup
from tests.parallel.gloo import DEVICE, finish, join, leave
from tests.parallel.pools import distribute, local_pool, pages, parts

MIXES: dict[str, tuple[list[int], list[int]]] = {  # new tokens, cached tokens
    "decode": ([1, 1, 1], [40, 16, 3]),
    "a chunk": ([9], [33]),
    "nothing cached": ([23, 2], [0, 0]),
    "shorter than the ranks": ([1, 2, 1], [0, 1, 2]),
    "a rank without keys": ([1], [2]),
    "empty and cached sequences": ([0, 5, 0], [0, 4, 11]),
    "no sequences": ([], []),
    "no new tokens": ([0, 0], [7, 3]),
}


def cases() -> dict[str, dict[str, Any]]:
    """Arguments of `run` by name."""
    found: dict[str, dict[str, Any]] = {}
    for mix, (new, cached) in MIXES.items():
        for window in (None, 1, 6, 300):
            found[f"{mix}, window {window}"] = {"new": new, "cached": cached, "window": window, "sinks": "on"}
    for layout in LAYOUTS:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            for kind in KINDS:
                if kind != "none" or dtype == torch.float8_e4m3fn:
                    found[f"{layout}, {str(dtype)[6:]}, {kind}"] = {
                        "new": [5, 1, 20], "cached": [30, 49, 0], "layout": layout, "dtype": dtype, "kind": kind,
                        "page_size": 16, "dims": (32, 16), "sinks": "on",
                    }  # fmt: skip
    for sinks in ("off", "very small", "very large"):
        found[f"sinks {sinks}"] = {"new": [4, 1], "cached": [9, 30], "sinks": sinks}
    for path in ("direct", "hybrid"):
        for window in (None, 5):
            for kind in ("per-tensor", "per-token-head"):
                found[f"{path}, window {window}, {kind}"] = {
                    "new": [3, 1], "cached": [37, 16], "page_size": 16, "dims": (32, 16), "window": window,
                    "path": path, "layout": "SHUFFLE", "dtype": torch.float8_e4m3fn, "kind": kind, "sinks": "on",
                }  # fmt: skip
    found["hybrid with a common part"] = {
        "new": [2, 1], "cached": [4096, 4100], "page_size": 64, "path": "hybrid", "sinks": "on",
    }  # fmt: skip
    found["a small workspace"] = {"new": [6, 1], "cached": [50, 20], "workspace_tokens": 8, "sinks": "on"}
    found["without the log-sum-exp"] = {"new": [4, 1], "cached": [9, 30], "sinks": "on", "want_lse": False}
    found["negated sinks"] = {"new": [4, 1], "cached": [9, 30], "sinks": "on", "negated": True}
    found["spare rows"] = {"new": [3, 1], "cached": [8, 5], "spare": 3, "sinks": "on"}
    found["no lengths"] = {"new": [7, 1, 3], "cached": [12, 30, 2], "lengths": False, "sinks": "on"}
    for dtype in (torch.bfloat16, torch.float16):
        found[f"q {str(dtype)[6:]}"] = {"new": [4, 1], "cached": [20, 33], "q_dtype": dtype, "sinks": "on"}
    for seed in range(40):
        draw = random.Random(seed)
        batch = draw.randint(1, 5)
        found[f"random {seed}"] = {
            "new": [draw.choice([0, 1, 1, draw.randint(1, 20)]) for _ in range(batch)],
            "cached": [draw.choice([0, draw.randint(0, 60)]) for _ in range(batch)],
            "window": draw.choice([None, None, draw.randint(1, 40)]), "page_size": draw.choice([1, 3, 4, 8]),
            "lengths": draw.random() < 0.5, "spare": draw.choice([0, 2]), "seed": seed,
            "workspace_tokens": draw.choice([None, 16]), "sinks": draw.choice(["off", "on"]),
        }  # fmt: skip
    return found


CASES = cases()
FIRST, STEP = map(int, os.environ.get("RANKS_CASES", "0 1").split())
"""The first case that this process runs, and the step to the next."""


def run(
    attend: ContextParallel, new: list[int], cached: list[int], sinks: str, window: int | None = None,
    path: str = "auto", workspace_tokens: int | None = None, lengths: bool = True, want_lse: bool = True,
    negated: bool = False, **pool: Any,
) -> str:  # fmt: skip
    """Compare a call on the ranks with one on one pool; what is wrong, or ""."""
    rank, ranks = attend.share
    one = setup(new, cached, device=DEVICE, **pool)
    table = distribute(one, ranks)
    mine = local_pool(one, table, rank, ranks)
    k_new, v_new = one.new_tokens()
    logits = sinks_of(sinks, 4)
    logits = None if logits is None else logits.to(DEVICE)
    if negated:  # a view with the negative bit, of the same values
        logits = torch.view_as_complex(torch.stack((logits, -logits), -1)).conj().imag
        assert logits.is_neg()
    sizes: dict[str, Any] = {"total_q": one.rows + one.spare, "total_k": sum(one.total)}
    if lengths:
        sizes |= {"seqlens_q": one.new, "seqlens_k": one.total}
    g = mine.geometry
    batch = attend.batch(table, *one.offsets, page_size=g.page_size, num_blocks=g.num_blocks, **sizes)
    batch.check(window)
    before = attend.calls
    arguments = one.q, k_new, v_new, mine, batch, 0.4, logits, window, workspace_tokens, path
    given: Any = attend(*arguments, return_lse=want_lse)
    out, lse = given if want_lse else (given, None)
    wanted, wanted_lse = one.attend(one.batch(lengths), softmax_scale=0.4, sinks=logits, window=window, path="gather")
    if attend.calls != before + (len(one.q) > 0):
        return f"{attend.calls - before} collectives"
    close = 1e-5 if one.q.dtype == torch.float32 else 2e-2
    if not torch.allclose(out.float(), wanted.float(), rtol=close, atol=close):
        return f"out differs by {(out.float() - wanted.float()).abs().max()}"
    if lse is not None:
        seen = wanted_lse != -math.inf
        if not torch.equal(seen, lse != -math.inf) or not torch.allclose(
            lse[seen], wanted_lse[seen], rtol=0, atol=1e-4
        ):
            return f"lse differs: {lse.tolist()}, {wanted_lse.tolist()}"
    for ours, theirs in pages(one, table, rank, ranks):
        for a, b in parts(mine, ours, one.cache, theirs):
            if not torch.equal(a, b):
                return f"block {ours} has other bytes than one process writes"
    return _writers(batch, one, ranks)


def _writers(batch: kg.PrefixBatch, one: Any, ranks: int) -> str:
    """Whether each new token has one writer, which has a slot for it."""
    slots = [torch.empty_like(batch.slots) for _ in range(ranks)]
    dist.all_gather(slots, batch.slots)
    writers = batch.writers
    if (writers[one.rows :] != -1).any():
        return "a row of no sequence has a writer"
    for row, writer in enumerate(writers[: one.rows].tolist()):
        if [rank for rank in range(ranks) if slots[rank][row] >= 0] != [writer]:
            return f"row {row} has slots {[s[row].item() for s in slots]}, and the writer {writer}"
    return ""


def main() -> None:
    folder, rank, _ = join()
    attend = ContextParallel()
    said = {}
    for name, arguments in list(CASES.items())[FIRST::STEP]:
        try:
            said[name] = run(attend, **arguments)
        except Exception:
            said[name] = traceback.format_exc()
            leave(folder, rank, said)
            raise
    leave(folder, rank, said)
    finish(attend)


if __name__ == "__main__":
    main()
