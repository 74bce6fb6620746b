"""`kvgather bench gather`: our gather, what engines ship, what one would write in plain torch, and the limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..formats.fp8 import FORMATS, dequantize
from ..formats.layout import LAYOUTS, as_nhd
from .cases import Built, Case, build
from .report import Row
from .runner import Call, Timing, cache_bytes, machine, time_calls

Outputs = tuple[Tensor, Tensor]
Implementation = Callable[[Built, Outputs], Call]

RAGGED = tuple(8192 + 113 * (5 * i % 16) - 847 for i in range(16))
"""16 sequences around 8,192 tokens, none a multiple of a page."""
GPU_BASE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=RAGGED, starts=())
CPU_BASE = replace(GPU_BASE, lengths=(4096,) * 8)


def _gpu_cases() -> Iterator[Case]:
    for dim in (64, 128):
        for page in (16, 32, 64, 128):
            for layout in LAYOUTS:
                for kind in ("per-tensor", "per-head", "per-token-head"):
                    yield replace(
                        GPU_BASE, layout=layout, page_size=page, k_dim=dim, v_dim=dim, k_kind=kind, v_kind=kind
                    )
    for layout in LAYOUTS:
        yield replace(GPU_BASE, layout=layout, num_heads=1)
        yield replace(GPU_BASE, layout=layout, k_dim=192, v_dim=128)
        yield replace(GPU_BASE, layout=layout, lengths=(262144,))
        yield replace(GPU_BASE, layout=layout, lengths=(512,) * 256)
        yield replace(GPU_BASE, layout=layout, dtype=torch.bfloat16, k_kind="none", v_kind="none")
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e5m2)
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e4m3fnuz)  # decoded in software here


def _cpu_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for kind in ("per-tensor", "per-token-head"):
            yield replace(CPU_BASE, layout=layout, k_kind=kind, v_kind=kind)


def cases(device: torch.device) -> tuple[Case, ...]:
    """The cases that are measured on a device."""
    return tuple(_gpu_cases() if device.type == "cuda" else _cpu_cases())


def moved_bytes(case: Case) -> int:
    """Bytes a gather has to move: codes and scales read once, rows written once."""
    rows = case.total_tokens * case.num_heads
    codes = rows * (case.k_dim + case.v_dim)
    scales = sum(4 * rows for kind in (case.k_kind, case.v_kind) if kind == "per-token-head")
    return codes * (case.dtype.itemsize + case.out_dtype.itemsize) + scales


def ours(built: Built, out: Outputs) -> Call:
    """This package's gather, checks included."""
    return lambda: built.cache.gather(built.plan, out=out)


def token_per_program(built: Built, out: Outputs) -> Call:
    """The kernel that engines ship, told the right kind of scale."""
    from ..lab.before_fix import cp_mha_gather_cache, token_to_batch

    case, cache = built.case, built.cache
    batches = token_to_batch(built.cu_seqlens_k)
    starts = torch.zeros(len(case.lengths), dtype=torch.int32, device=batches.device)
    return lambda: cp_mha_gather_cache(
        cache.key_cache, cache.value_cache, *out, built.block_table, cache.k_scale, cache.v_scale, built.cu_seqlens_k,
        batches, starts, True, case.layout, case.total_tokens, per_token_quant=case.k_kind == "per-token-head",
    )  # fmt: skip


def torch_index(built: Built, out: Outputs) -> Call:
    """Plain torch: one advanced index per pool over all tokens, then the formula."""
    case = built.case
    position = torch.cat([torch.arange(n, device=out[0].device) for n in case.lengths])
    lengths = built.cu_seqlens_k.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=position.device), lengths)
    block = built.block_table[sequence, position // case.page_size].long()
    slot = position % case.page_size

    def run() -> None:
        for pool, scale, target in _sides(built, out):
            held = pool.view(torch.uint8) if pool.dtype in FORMATS else pool
            which = "key" if target is out[0] else "value"
            if case.layout == "SHUFFLE" and which == "value":
                x = pool.shape[4]
                rows = held[block, :, slot // x, :, slot % x]
            elif case.layout == "SHUFFLE":
                rows = held[block, :, :, slot].flatten(2, 3)
            else:
                rows = held[block, slot] if case.layout == "NHD" else held[block, :, slot]
            target.copy_(dequantize(rows.view(pool.dtype), _factor(scale, block, slot), target.dtype))

    return run


def python_loop(built: Built, out: Outputs) -> Call:
    """What an engine falls back to without a kernel: a Python loop over the blocks of every sequence."""
    case = built.case
    table = built.block_table.tolist()

    def run() -> None:
        row = 0
        for sequence, length in enumerate(case.lengths):
            for column, begin in enumerate(range(0, length, case.page_size)):
                block, rows = table[sequence][column], min(case.page_size, length - begin)
                for pool, scale, target in _sides(built, out):
                    page = as_nhd(pool[block : block + 1], case.layout, "key" if target is out[0] else "value")[0]
                    factor = scale if scale is None or scale.ndim < 3 else scale[block].t()[:, :, None]
                    target[row : row + rows] = dequantize(page, factor, target.dtype)[:rows]
                row += rows

    return run


def _sides(built: Built, out: Outputs) -> Iterable[tuple[Tensor, Tensor | None, Tensor]]:
    cache = built.cache
    return (cache.key_cache, cache.k_scale, out[0]), (cache.value_cache, cache.v_scale, out[1])


def _factor(scale: Tensor | None, block: Tensor, slot: Tensor) -> Tensor | None:
    if scale is None or scale.numel() == 1:
        return scale
    return scale[:, None] if scale.ndim == 1 else scale[block, :, slot][..., None]


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Check every implementation against the reference on a case, then time it.

    Args:
        case: what to gather.
        device: where.
        seconds: about how long to measure each implementation.

    Returns:
        A row per implementation, the limits among them.

    Raises:
        ArithmeticError: an implementation's rows are not the reference's.
    """
    moved = moved_bytes(case)
    copies = 1 if device.type == "cpu" else min(8, -(-3 * cache_bytes(device) // moved))
    builts = [build(case, device, seed, values="normal") for seed in range(copies)]
    outs = [(_empty(case, case.k_dim, device), _empty(case, case.v_dim, device)) for _ in builts]
    reference = builts[0].cache.gather(builts[0].plan, backend="torch")
    timings: dict[str, Timing] = {}
    for name, prepare in _implementations(case, device).items():
        calls = [prepare(built, out) for built, out in zip(builts, outs, strict=True)]
        for tensor in outs[0]:
            tensor.fill_(float("nan"))
        calls[0]()
        for got, expected in zip(outs[0], reference, strict=True):
            if not torch.equal(got, expected):
                raise ArithmeticError(f"{name} is not the reference on {case.name}")
        loop = name == "python loop"
        timings[name] = time_calls(calls[:1] if loop else calls, device, seconds=seconds, graph=not loop)
    limits, limit_bytes = _limits(case, device, seconds)
    rate = {name: moved / t.p50 for name, t in timings.items()} | {
        name: limit_bytes / t.p50 for name, t in limits.items()
    }
    return [
        Row(
            benchmark="gather",
            case=case.name,
            implementation=name,
            p20_us=round(t.p20, 2),
            p50_us=round(t.p50, 2),
            p80_us=round(t.p80, 2),
            samples=t.samples,
            bytes=limit_bytes if name in limits else moved,
            gb_per_s=round(rate[name] / 1e3, 1),
            share_of_cast=round(rate[name] / rate["contiguous cast"], 4),
            against_loop=round(timings["python loop"].p50 / t.p50, 2) if "python loop" in timings else 0.0,
            against_token=round(timings["token per program"].p50 / t.p50, 2) if "token per program" in timings else 0.0,
            **machine(device.type),
        )
        for name, t in (timings | limits).items()
    ]


def _implementations(case: Case, device: torch.device) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {"kvgather": ours}
    plain = case.dtype == torch.float8_e4m3fn and case.k_kind in ("per-tensor", "per-token-head")
    if device.type == "cuda" and plain and case.layout != "HND":
        found["token per program"] = token_per_program
    if device.type == "cpu" or (plain and case.page_size == 16 and case.lengths == RAGGED):
        found["torch index"] = torch_index
        found["python loop"] = python_loop
    return found


def _empty(case: Case, dim: int, device: torch.device) -> Tensor:
    return torch.empty(case.total_tokens, case.num_heads, dim, dtype=case.out_dtype, device=device)


def _limits(case: Case, device: torch.device, seconds: float) -> tuple[dict[str, Timing], int]:
    """A contiguous cast with a scale, and a contiguous copy, of as many codes as the case has, and their bytes."""
    n = case.total_tokens * case.num_heads * (case.k_dim + case.v_dim)
    moved = n * (case.dtype.itemsize + case.out_dtype.itemsize)
    copies = 1 if device.type == "cpu" else min(8, -(-3 * cache_bytes(device) // moved))
    scale = torch.full((1,), 0.5, device=device)
    held = [torch.randn(n, device=device).mul_(16).clamp_(-200, 200).to(case.dtype) for _ in range(copies)]
    out = [torch.empty(n, dtype=case.out_dtype, device=device) for _ in range(copies)]
    halves = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2 * copies)]
    for half in halves:
        half.random_(0, 256)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    copy = time_calls([partial(target.copy_, source) for target, source in pairs], device, seconds=seconds)
    del halves
    if device.type == "cpu":
        plain = partial(dequantize, held[0], scale, case.out_dtype)
        casts = [time_calls([plain], device, seconds=seconds)]
    else:
        from .limits import CAST_TILES, cast

        casts = [
            time_calls(
                [partial(cast, codes, scale, rows, tile) for codes, rows in zip(held, out, strict=True)],
                device,
                seconds=seconds / 2,
            )
            for tile in CAST_TILES
        ]
    return {"contiguous cast": min(casts, key=lambda t: t.p50), "contiguous copy": copy}, moved


def run(
    device: torch.device, *, only: str = "", seconds: float = 0.2, progress: Callable[[str], None] | None = None
) -> list[Row]:
    """Measure every case whose name holds `only`.

    Args:
        device: where.
        only: part of a case's name; empty is all.
        seconds: about how long to measure each implementation.
        progress: called with a line before each case.

    Raises:
        ValueError: no case's name holds `only`.
    """
    chosen: Sequence[Case] = [case for case in cases(device) if only in case.name]
    if not chosen:
        raise ValueError(f"--case is {only!r}; accepted: part of one of {', '.join(c.name for c in cases(device))}")
    rows: list[Row] = []
    for nth, case in enumerate(chosen, 1):
        if progress is not None:
            progress(f"[{nth}/{len(chosen)}] {case.name}")
        rows += measure(case, device, seconds=seconds)
    return rows


def show_progress(line: str) -> None:
    """One line on stderr, replaced by the next where a person is watching."""
    print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
