"""`kvgather bench prefix`: the paths and the choice between them, one program per (token, head), and the limits.

Every call writes the new tokens and attends to cached + new ones, as one layer does. The rows of a case:

    direct, gather, hybrid, auto     `prefix_attention` by its path; in a window hybrid is direct, and has no row
    token per program, dense         the gather of `lab.before_fix`, upstream's form in our rewrite, then one dense
                                     attention to all tokens
    dense, no gather                 that dense attention alone, over contiguous K and V
    dense, no gather, cached part    dense attention to the cached tokens alone, without a mask: the least work of any
                                     gather path
    read limit, contiguous copy      a kernel that reads the cached codes once, and a copy that moves as many bytes
    gather, workspace N              the gather path in a bounded workspace
    …: peak memory                   no time: its `bytes` are the peak memory of one call beyond its inputs

`bytes` of all other rows are the codes and scales that have to be read; `against_token` is the time of
`token per program, dense` over the row's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..attention.dense import dense_attention
from ..attention.prefix import prefix_attention
from ..cases.prefix import BuiltPrefix, PrefixCase, build_prefix, cases
from .prefix_targets import crossing, summary, targets
from .report import Row
from .runner import Call, Timing, copies_for, row_of, run_cases, time_calls
from .turns import time_in_turns

__all__ = ["cases", "crossing", "measure", "run", "summary", "targets"]

Attending = Callable[[], Tensor]
"""A call to time; it returns the output rows."""
Implementation = Callable[[BuiltPrefix], Attending]

TOLERANCE = 1e-2
TOKEN_PER_PROGRAM = "token per program, dense"


def by_path(built: BuiltPrefix, path: str, workspace_tokens: int | None = None) -> Attending:
    """The prefix path as a layer calls it."""

    def run() -> Tensor:
        return prefix_attention(
            built.q, built.k_new, built.v_new, built.cache, built.batch, window=built.case.window,
            workspace_tokens=workspace_tokens, path=path,
        )  # fmt: skip

    return run


def token_per_program(built: BuiltPrefix) -> Attending:
    """Write, gather with one program per (token, head), attend to all tokens in one call."""
    from ..lab.before_fix import cp_mha_gather_cache, token_to_batch

    case, cache, batch = built.case, built.cache, built.batch
    k, v = (built.q.new_empty((batch.total_k, case.kv_heads, case.head_dim)) for _ in range(2))
    sequence_of_token = token_to_batch(batch.cu_seqlens_k)
    starts = torch.zeros(batch.num_sequences, dtype=torch.int32, device=batch.device)

    def run() -> Tensor:
        cache.write(built.k_new, built.v_new, batch.slots)
        cp_mha_gather_cache(
            cache.key_cache, cache.value_cache, k, v, batch.block_table, cache.k_scale, cache.v_scale,
            batch.cu_seqlens_k, sequence_of_token, starts, True, case.layout, batch.total_k,
            per_token_quant=case.kind == "per-token-head",
        )  # fmt: skip
        return _dense(built, k, v)

    return run


def no_gather(built: BuiltPrefix) -> Attending:
    """The dense attention alone."""
    built.cache.write(built.k_new, built.v_new, built.batch.slots)
    k, v = built.cache.gather(built.batch.plan, out_dtype=built.q.dtype)
    return partial(_dense, built, k, v)


def cached_part(built: BuiltPrefix) -> Attending:
    """The dense attention to the cached tokens alone, equally many in each sequence.

    Its output differs from the other implementations' output, so it is compared with plain torch here.

    Raises:
        ArithmeticError: the output is not plain torch's.
    """
    case, batch = built.case, built.batch
    random = torch.Generator(batch.device).manual_seed(0)
    shape = sum(case.cached), case.kv_heads, case.head_dim
    k, v = (torch.randn(shape, generator=random, device=batch.device).to(built.q.dtype) for _ in range(2))
    offsets = torch.tensor([0, *case.cached], device=batch.device).cumsum(0).int()

    def run(backend: str = "auto") -> Tensor:
        return dense_attention(
            built.q, k, v, batch.cu_seqlens_q, offsets, max_q=batch.max_q, max_k=max(case.cached),
            softmax_scale=case.head_dim**-0.5, causal=False, seqlens_q=case.new, seqlens_k=case.cached, backend=backend,
        )[0]  # fmt: skip

    check("dense, no gather, cached part", case, run(), run("torch"))
    return run


def _dense(built: BuiltPrefix, k: Tensor, v: Tensor, q: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One dense attention over cached + new tokens of all sequences."""
    case, batch = built.case, built.batch
    causal = batch.max_q > 1 or case.window is not None  # one row without a window sees all keys and needs no mask
    return dense_attention(
        built.q if q is None else q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k, max_q=batch.max_q, max_k=batch.max_k,
        softmax_scale=case.head_dim**-0.5, causal=causal, window=case.window,
        seqlens_q=case.new, seqlens_k=case.lengths, backend=backend,
    )[0]  # fmt: skip


def reference(built: BuiltPrefix) -> Tensor:
    """The expected output: plain torch in FP32, over the pool's K and V of cached and new tokens."""
    built.cache.write(built.k_new, built.v_new, built.batch.slots)
    k, v = built.cache.gather(built.batch.plan, out_dtype=torch.float32)
    return _dense(built, k, v, built.q.float(), "torch")


def check(name: str, case: PrefixCase, actual: Tensor, expected: Tensor) -> None:
    """Compare an output with the expected one.

    Raises:
        ArithmeticError: the relative error is above `TOLERANCE`, or NaN.
    """
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{name} is not the reference on {case.name}: error {error:.2g}, accepted {TOLERANCE}")


def implementations(case: PrefixCase, device: torch.device) -> dict[str, Implementation]:
    """By name and in order; on a CPU without Triton's kernels: the interpreter's times say nothing about them."""
    gpu = device.type == "cuda"
    paths = ["gather"]
    if gpu:
        paths = ["direct", *paths] if case.window is not None else ["direct", *paths, "hybrid"]
    chosen: dict[str, Implementation] = {path: partial(by_path, path=path) for path in paths}
    if case.workspace is not None:
        chosen[f"gather, workspace {case.workspace}"] = partial(
            by_path, path="gather", workspace_tokens=case.workspace
        )  # fmt: skip
    else:
        chosen["auto"] = partial(by_path, path="auto")
    if case.part == "reach":
        chosen |= {TOKEN_PER_PROGRAM: token_per_program} if gpu else {}
        chosen |= {"dense, no gather": no_gather, "dense, no gather, cached part": cached_part}
    return chosen


def measure(case: PrefixCase, device: torch.device, *, seconds: float = 0.1) -> list[Row]:
    """Compare every implementation with the reference on a case, then time them in turns.

    Args:
        case: the batch.
        device: where.
        seconds: approximate time to measure each implementation.

    Returns:
        A row for each implementation, each limit and each peak of memory.

    Raises:
        ArithmeticError: an implementation's rows are not the reference's.
    """
    copies = copies_for(case.read_bytes, device)
    builts = [build_prefix(case, device, seed) for seed in range(copies)]
    calls = {
        name: [prepare(built) for built in builts] for name, prepare in implementations(case, device).items()
    }  # fmt: skip
    expected = reference(builts[0])
    for name in calls:
        if not name.endswith("cached part"):
            check(name, case, calls[name][0](), expected)
    del expected
    timings = time_in_turns(calls, device, seconds=seconds)
    limits: dict[str, Timing] = {}
    if device.type == "cuda" and case.part == "reach" and max(case.new) == 1:
        limits = memory_limits(case.cached_bytes, device, seconds)
    peaks = {}
    if device.type == "cuda" and case.workspace is not None:
        peaks = {name: _peak_bytes(first, device) for name, (first, *_) in calls.items()}
    del builts, calls
    if device.type == "cuda":
        torch.cuda.empty_cache()

    token = timings.get(TOKEN_PER_PROGRAM)

    def row(name: str, timing: Timing, size: int) -> Row:
        against_token = token.p50 / timing.p50 if token and timing.p50 else 0.0
        return row_of("prefix", case.name, name, timing, device, size=size, against_token=against_token)

    return [
        *(row(name, timing, case.read_bytes) for name, timing in timings.items()),
        *(row(name, timing, case.cached_bytes) for name, timing in limits.items()),
        *(row(f"{name}: peak memory", Timing(0, 0, 0, 1), size) for name, size in peaks.items()),
    ]


def memory_limits(size: int, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time one read of `size` bytes, with the fastest tile, and a copy that reads and writes half as many.

    Raises:
        ArithmeticError: the kernel did not read all bytes.
    """
    from .limits import READ_TILES, read, read_results

    copies = copies_for(size, device)
    inputs = [torch.randint(-(2**15), 2**15, (size // 4,), dtype=torch.int32, device=device) for _ in range(copies)]
    reads = []
    for tile in READ_TILES:
        out = read_results(inputs[0], tile)
        read(inputs[0], out, tile)
        if int(out.sum()) != int(inputs[0].sum()):
            raise ArithmeticError("the read limit's kernel did not read all words")
        calls: list[Call] = [partial(read, words, out, tile) for words in inputs]
        reads.append(time_calls(calls, device, seconds=seconds / 2))
    halves = [words.chunk(2) for words in inputs]
    copying: list[Call] = [partial(target.copy_, source) for target, source in halves]
    return {
        "read limit": min(reads, key=lambda timing: timing.p50),
        "contiguous copy": time_calls(copying, device, seconds=seconds),
    }


def _peak_bytes(call: Attending, device: torch.device) -> int:
    """The peak memory of one call beyond the memory allocated before it; its plans were built by the timed calls."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


run = partial(run_cases, cases, measure, seconds=0.1)
"""`kvgather bench prefix`; the arguments are those of `run_cases` from `device` on."""
