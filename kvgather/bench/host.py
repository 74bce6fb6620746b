"""`kvgather bench host`: the host time of one eager call, in raw launches of upstream's kernel.

An engine calls once per layer, and not always inside a CUDA graph, so the host time of a call is part of its speed.
The yardstick is one raw launch `kernel[grid](…)` of upstream's form of the gather (our rewrite, 21 arguments). A row is
the time until the call returns; it does not include the GPU's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..attention.batch import PrefixBatch
from ..attention.prefix import prefix_attention
from ..cases import Built, Case, build
from ..cases.measured import HOST as CASE
from ..gather.dispatch import gather
from .gather import empty_rows
from .implementations import Outputs, engines_call, ours, upstream_form
from .report import Row
from .runner import Call, check_rows, row_of, run_cases
from .tables import text_table
from .turns import time_on_host

Q_HEADS, WINDOW = 64, 128
YARDSTICK = "raw launch, upstream form"
TARGETS = {
    "cache.gather": 1.0,
    "kg.gather": 1.2,
    "kg.cp_mha_gather_cache": 1.2,
    "cache.write": 1.2,
    "prefix_attention": 3.0,
    "PrefixBatch.build": 6.0,
}
"""The budget of each call, in launches: `cache.write` writes one new token per sequence; `prefix_attention` is one
decode step on the direct path, its write included; `PrefixBatch.build` gets the lengths and one window."""
GATHERS = (YARDSTICK, "cache.gather", "kg.gather", "kg.cp_mha_gather_cache")


def prepare(built: Built, out: Outputs) -> dict[str, Call]:
    """The calls to time, the yardstick first; the last token of each sequence is the new one.

    Args:
        built: the cache and the batch, with per-tensor scales.
        out: rows of K and V that the gathers fill, `[tokens, heads, dim]`.
    """
    case, cache, table = built.case, built.cache, built.block_table
    batch_size, num_blocks = len(case.lengths), cache.geometry.num_blocks
    q, k_new, v_new = (
        torch.randn(batch_size, heads, dim, device=table.device).to(case.out_dtype)
        for heads, dim in ((Q_HEADS, case.k_dim), (case.num_heads, case.k_dim), (case.num_heads, case.v_dim))
    )
    build_batch = partial(
        PrefixBatch.build, table, torch.arange(batch_size + 1, dtype=torch.int32, device=table.device),
        built.cu_seqlens_k, page_size=case.page_size, num_blocks=num_blocks, total_q=batch_size,
        total_k=case.total_tokens, seqlens_q=[1] * batch_size, seqlens_k=list(case.lengths),
    )  # fmt: skip
    batch = build_batch()
    return {
        YARDSTICK: upstream_form(built, out),
        "cache.gather": ours(built, out),
        "kg.gather": partial(
            gather, cache.key_cache, cache.value_cache, built.plan, layout=case.layout, k_scale=cache.k_scale,
            v_scale=cache.v_scale, out_dtype=case.out_dtype, out=out,
        ),
        "kg.cp_mha_gather_cache": engines_call(built, out),
        "cache.write": partial(cache.write, k_new, v_new, batch.slots),
        "prefix_attention": partial(prefix_attention, q, k_new, v_new, cache, batch, path="direct"),
        "PrefixBatch.build": partial(build_batch, windows=[WINDOW]),
    }  # fmt: skip


def cases(device: torch.device) -> tuple[Case, ...]:
    """The one case.

    Raises:
        ValueError: the device is a CPU.
    """
    if device.type != "cuda":
        raise ValueError(f"--device is {device.type}; accepted with host: cuda, for the yardstick is a launch on a GPU")
    return (CASE,)


def check(calls: dict[str, Call], built: Built, out: Outputs) -> None:
    """Compare every gather with the reference, before the calls that write.

    Raises:
        ArithmeticError: a gather's rows are not the reference's.
    """
    reference = built.cache.gather(built.plan, out_dtype=built.case.out_dtype, backend="torch")
    for name in GATHERS:
        check_rows(name, built.case.name, calls[name], out, reference)


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Compare the gathers with the reference on a case, then time all calls in turns.

    Args:
        case: the batch.
        device: where.
        seconds: approximate time to measure each call.

    Returns:
        A row per call, the yardstick first.

    Raises:
        ArithmeticError: a gather's rows are not the reference's.
    """
    built, out = build(case, device, values="normal"), empty_rows(case, device)
    calls = prepare(built, out)
    check(calls, built, out)
    timings = time_on_host(calls, device, seconds=seconds)
    launch = timings[YARDSTICK].p50
    return [
        row_of("host", case.name, name, timing, device, launches=timing.p50 / launch)
        for name, timing in timings.items()
    ]


def summary(rows: Sequence[Row]) -> str:
    """Each call's time in launches, and whether it is within its budget."""
    cells = []
    for row in rows:
        budget = TARGETS.get(row.implementation)
        if budget is not None:
            verdict = "reached" if row.launches <= budget else "NOT reached"
            median, launches = f"{row.p50_us:.1f} µs", f"{row.launches:.2f}"
            cells.append((row.implementation, median, launches, f"≤ {budget:.1f}", verdict))
    return text_table(cells, ("", "median", "launches", "to reach", ""), "lrrrl")


run = partial(run_cases, cases, measure)
"""`kvgather bench host`; the arguments are those of `run_cases` from `device` on."""
