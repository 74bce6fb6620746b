"""`kvgather bench host`: how long one eager call keeps the host busy, in raw launches of upstream's kernel.

An engine calls once a layer, and not always inside a CUDA graph, so what a call costs the host is part of its speed.
The yardstick is one raw launch `kernel[grid](…)` of upstream's form of the gather (our rewrite, 21 arguments). A row is
the time until the call returns; the GPU's work is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..attention.batch import PrefixBatch
from ..attention.prefix import prefix_attention
from ..gather.dispatch import gather
from .cases import Built, Case, build
from .implementations import Outputs, engines_call, ours, upstream_form
from .report import Row
from .runner import Call, machine, run_cases
from .turns import time_on_host

CASE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=(512,) * 16, starts=())
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
"""Launches that each call may take: `cache.write` of a new token for each sequence; `prefix_attention` of one decode
step on the direct path, its write included; `PrefixBatch.build` with lengths and one window."""
GATHERS = (YARDSTICK, "cache.gather", "kg.gather", "kg.cp_mha_gather_cache")


def prepare(built: Built, out: Outputs) -> dict[str, Call]:
    """The calls to time, the yardstick first; in each sequence the last token is the new one.

    Args:
        built: the cache and the batch, per-tensor scales.
        out: K and V to gather into, `[tokens, heads, dim]`.
    """
    case, cache, table = built.case, built.cache, built.block_table
    batch_size, blocks = len(case.lengths), cache.geometry.num_blocks
    q, k_new, v_new = (
        torch.randn(batch_size, heads, dim, device=table.device).to(case.out_dtype)
        for heads, dim in ((Q_HEADS, case.k_dim), (case.num_heads, case.k_dim), (case.num_heads, case.v_dim))
    )
    build_batch = partial(
        PrefixBatch.build, table, torch.arange(batch_size + 1, dtype=torch.int32, device=table.device),
        built.cu_seqlens_k, page_size=case.page_size, num_blocks=blocks, total_q=batch_size, total_k=case.total_tokens,
        seqlens_q=[1] * batch_size, seqlens_k=list(case.lengths),
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


def check(calls: dict[str, Call], built: Built, out: Outputs) -> None:
    """Raise unless every gather gives the reference's bits; the calls that write come after the gathers.

    Raises:
        ArithmeticError: one does not.
    """
    reference = built.cache.gather(built.plan, out_dtype=built.case.out_dtype, backend="torch")
    for name in GATHERS:
        for tensor in out:
            tensor.fill_(float("nan"))
        calls[name]()
        if not all(torch.equal(got, expected) for got, expected in zip(out, reference, strict=True)):
            raise ArithmeticError(f"{name} is not the reference on {built.case.name}")


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Check the gathers on a case, then time all calls in turns.

    Args:
        case: the batch.
        device: where.
        seconds: about how long to measure each call.

    Returns:
        A row per call, the yardstick first.

    Raises:
        ArithmeticError: a gather's rows are not the reference's.
    """
    built = build(case, device, values="normal")
    out = tuple(
        torch.empty(case.total_tokens, case.num_heads, dim, dtype=case.out_dtype, device=device)
        for dim in (case.k_dim, case.v_dim)
    )
    calls = prepare(built, (out[0], out[1]))
    check(calls, built, (out[0], out[1]))
    timings = time_on_host(calls, device, seconds=seconds)
    launch = timings[YARDSTICK].p50
    return [
        Row(
            benchmark="host", case=case.name, implementation=name,
            p20_us=round(timing.p20, 2), p50_us=round(timing.p50, 2), p80_us=round(timing.p80, 2),
            samples=timing.samples, bytes=0, gb_per_s=0.0, share_of_cast=0.0, against_loop=0.0, against_token=0.0,
            launches=round(timing.p50 / launch, 3), **machine(device.type),
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """The calls in launches, with what each has to reach."""
    width = max(len(name) for name in TARGETS)
    lines = [f"{'':{width}}  {'median':>10}  {'launches':>8}  to reach"]
    for row in rows:
        most = TARGETS.get(row.implementation)
        if most is not None:
            said = "reached" if row.launches <= most else "NOT reached"
            time = f"{row.p50_us:.1f} µs"
            lines.append(f"{row.implementation:{width}}  {time:>10}  {row.launches:8.2f}  ≤ {most:.1f}     {said}")
    return "\n".join(lines)


def run(
    device: torch.device,
    *,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[str], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure the one case; arguments as in `bench.gather.run`.

    Raises:
        ValueError: the device is a CPU, or the case's name does not hold `only`.
    """
    if device.type != "cuda":
        raise ValueError(f"--device is {device.type}; accepted with host: cuda, for the yardstick is a launch on a GPU")
    return run_cases([CASE], partial(measure, device=device, seconds=seconds), only=only, progress=progress, keep=keep)
