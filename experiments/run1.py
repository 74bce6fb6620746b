"""Experiment 1: the Gluon kernel's variants, and other tiles of the present kernel, beside what ships, on one GPU.

    python experiments/run1.py                 everything, about 3 minutes; a table for each case, fastest first
    python experiments/run1.py case 128 128    one case (head dim, new tokens) in this process

Each case runs in a child process with a time limit. A variant that fails, hangs or is wrong is named, and the case is
started again without it. Errors are relative (norm) against float64: on a small ragged batch, all rows, and on the
timed batch, all rows of the first and the last sequence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
CASES = [(128, 128), (64, 128), (128, 512), (64, 512), (128, 16), (64, 16)]  # head dim, new tokens
FA3 = {  # BF16 pool, FP8 pool and Q; one H100, measured before
    (128, 16): (191, 116), (128, 128): (459, 510), (128, 512): (1732, 1829),
    (64, 16): (128, 113), (64, 128): (674, 620), (64, 512): (2287, 2149),
}  # fmt: skip
LIMIT_S = float(os.environ.get("LIMIT_S", "230"))
VARIANT_S, WORST = float(os.environ.get("VARIANT_S", "15")), 5e-3


def say(**words):
    print("@" + json.dumps(words), flush=True)


def compile_only(dim: int, index: int) -> None:
    import torch
    from hopper_kernels import hopper_kernel
    from variants import HOPPER

    v = HOPPER[dim][index]
    b, i, f = torch.bfloat16, torch.int32, torch.float32
    group = 4 if dim == 128 else 8
    hopper_kernel.warmup(b, i, i, i, i, i, b, f, f, 0.5, 528, 4, grid=(1,), **v.constants(dim, group), **v.options())


def hopper_call(built, v):
    import torch
    from hopper_kernels import hopper_kernel

    q, cache, batch, case = built.q, built.cache, built.batch, built.case
    group = case.q_heads // case.kv_heads
    assert cache.key_cache.is_contiguous() and cache.value_cache.is_contiguous() and q.is_contiguous()
    k, w = (pool.view(torch.uint8).view(torch.int32) for pool in (cache.key_cache, cache.value_cache))
    tiles = -(-max(case.new) * group // (64 * v.consumers))
    grid = (len(case.new) * tiles * case.kv_heads,)
    scale = case.head_dim**-0.5 * 1.4426950408889634
    constants, options = v.constants(case.head_dim, group, case.kv_heads, case.page_size), v.options()
    arguments = (batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k)

    def run():
        out = torch.empty_like(q)
        hopper_kernel[grid](
            q, k, w, *arguments, out, cache.k_scale, cache.v_scale, scale, batch.block_table.shape[1], tiles,
            **constants, **options,
        )  # fmt: skip
        return out

    return run


def prepared(dim: int, new: int):
    """What is timed, by name: functions from a built case to a call."""
    from functools import partial

    import torch
    from variants import HOPPER, TILES, fits

    from kvgather.attention.direct import Tile, direct_attention
    from kvgather.attention.prefix import prefix_attention

    def by_path(path):
        return lambda built: partial(prefix_attention, built.q, None, None, built.cache, built.batch, path=path)

    def by_tile(tile):
        def prepare(built):
            return lambda: direct_attention(
                built.q, built.cache, built.batch, softmax_scale=built.case.head_dim**-0.5, tile=Tile(*tile)
            )[0]

        return prepare

    found = {f"ships: {path}": by_path(path) for path in ("auto", "direct")}
    found |= {f"direct {tile}": by_tile(tile) for tile in TILES[dim]}
    if torch.cuda.is_available():
        found |= {v.name: (lambda built, v=v: hopper_call(built, v)) for v in HOPPER[dim] if fits(v, new * 512 // dim)}
    return found


def case_of(dim: int, new, cached):
    from dataclasses import replace

    from kvgather.cases.prefix import PrefixCase

    case = replace(PrefixCase("peers", new=tuple(new), cached=tuple(cached)), q_heads=4096 // dim, kv_heads=8)
    return replace(case, head_dim=dim)


def expected_of(built, chosen):
    """`bench.peers.expected_of` for chosen sequences."""
    import torch

    from kvgather.attention.reference import reference_attention
    from kvgather.bench.peers import Expected
    from kvgather.blocks import cu_seqlens
    from kvgather.plan import GatherPlan

    case, cache, batch = built.case, built.cache, built.batch
    new, lengths = ([each[index] for index in chosen] for each in (case.new, case.lengths))
    first = [sum(case.new[:index]) for index in chosen]
    rows = torch.cat([torch.arange(at, at + n, device=batch.device) for at, n in zip(first, new, strict=True)])
    cu_q, cu_k = cu_seqlens(new, batch.device), cu_seqlens(lengths, batch.device)
    plan = GatherPlan.build(
        batch.block_table[list(chosen)], cu_k, page_size=case.page_size, num_blocks=batch.num_blocks,
        total_tokens=sum(lengths),
    )  # fmt: skip
    k, v = cache.gather(plan, out_dtype=torch.float32)
    q, group = built.q[rows], case.q_heads // case.kv_heads
    outs = [
        reference_attention(q[:, head * group : (head + 1) * group], k[:, head, None], v[:, head, None], cu_q, cu_k)[0]
        for head in range(case.kv_heads)
    ]
    return Expected(rows, torch.cat(outs, 1), built.q.shape)


def where_wrong(error, out, expected, new):
    """For a wrong result of the small batch: each sequence's error, and rows that are not finite."""
    if error <= WORST:
        return ""
    parts = zip(out.double().split(list(new)), expected.out.split(list(new)), strict=True)
    lines = [f"{float((a - b).norm() / b.norm()):.1e}/{int((~a.isfinite()).any(-1).sum())}" for a, b in parts]
    return "by sequence, error/rows not finite: " + " ".join(lines)


def run_case(dim: int, new: int, skip: list[str], seconds: float) -> None:
    import torch

    from kvgather.bench.runner import copies_for
    from kvgather.bench.turns import time_in_turns
    from kvgather.cases.prefix import build_prefix

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = case_of(dim, (5, 33, 1, 100, 17), (100, 37, 500, 3, 1200))
    big = case_of(dim, (new,) * 16, (8192,) * 16) if device.type == "cuda" else case_of(dim, (3, 2), (50, 20))
    copies = copies_for(big.read_bytes, device)
    smalls, builts = [build_prefix(small, device, 7)], [build_prefix(big, device, seed) for seed in range(copies)]
    for built in (*smalls, *builts):
        built.cache.write(built.k_new, built.v_new, built.batch.slots)
    expected = expected_of(smalls[0], range(5)), expected_of(builts[0], (0, len(big.new) - 1))
    say(ready=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", copies=copies)
    calls = {}
    for name, prepare in prepared(dim, new).items():
        if name in skip:
            continue
        say(trying=name)
        try:
            outs = [prepare(built)() for built in (smalls[0], builts[0])]
            errors = [one.error(out) for one, out in zip(expected, outs, strict=True)]
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            say(failed=name, why=f"{type(cause).__name__}: {str(cause).strip()[:300]}")
            if "CUDA" in str(error) or "illegal" in str(error):  # the context is lost
                os._exit(3)
            continue
        say(tried=name, small=errors[0], large=errors[1], where=where_wrong(errors[0], outs[0], expected[0], small.new))
        calls[name] = [prepare(built) for built in builts]
    say(trying="all, in turns")
    for name, timing in time_in_turns(calls, device, seconds=seconds).items():
        say(timed=name, us=timing.p50)
    say(done=True)


def once(dim: int, new: int, index: int) -> None:
    import torch
    from variants import HOPPER

    from kvgather.cases.prefix import build_prefix

    built = build_prefix(case_of(dim, (new,) * 16, (8192,) * 16), torch.device("cuda"), 0)
    call = hopper_call(built, HOPPER[dim][index])
    for _ in range(3):
        call()
    torch.cuda.synchronize()


def child(arguments: list[str], handle) -> str:
    """Run this file with arguments; `handle` gets what it says. Returns why it was stopped, or nothing."""
    log = open("/tmp/hopper_run1.err", "ab")
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
    heard = [time.monotonic()]
    stopped: list[str] = []

    def watch():
        while process.poll() is None:
            time.sleep(0.5)
            if time.monotonic() - heard[0] > (VARIANT_S if handle.ready else 60):
                stopped.append("hangs")
                process.kill()

    threading.Thread(target=watch, daemon=True).start()
    for line in process.stdout:
        if line.startswith("@"):
            heard[0] = time.monotonic()
            handle(json.loads(line[1:]))
    process.wait()
    return stopped[0] if stopped else "" if process.returncode == 0 else f"exit {process.returncode}"


class Heard:
    def __init__(self):
        self.ready, self.now, self.done, self.errors, self.times, self.failed, self.where = False, None, False, {}, {}, {}, {}

    def __call__(self, words):
        self.ready |= "ready" in words
        if "trying" in words:
            self.now = words["trying"]
        if "tried" in words:
            self.errors[words["tried"]] = words["small"], words["large"]
            self.where |= {words["tried"]: words["where"]} if words["where"] else {}
        if "failed" in words:
            self.failed[words["failed"]] = words["why"]
            self.now = None
        if "timed" in words:
            self.times[words["timed"]] = words["us"]
        self.done |= "done" in words


def main() -> None:
    start = time.monotonic()
    from variants import HOPPER

    jobs = [(dim, index) for dim in (128, 64) for index in range(len(HOPPER[dim]))]

    def compile_one(job):
        return subprocess.run(
            [sys.executable, __file__, "compile", *map(str, job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, timeout=120,
        )  # fmt: skip

    with ThreadPoolExecutor(min(14, (os.cpu_count() or 2) - 1 or 1)) as pool:
        for (dim, index), done in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if done.returncode:
                print(f"not compiled: {dim} {HOPPER[dim][index].name}: {done.stderr[-300:]}")
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    skips: dict[int, dict[str, str]] = {128: {}, 64: {}}
    for dim, new in CASES:
        heard = Heard()
        for _ in range(4):
            left = LIMIT_S - (time.monotonic() - start)
            if left < 15:
                print(f"\n{dim} dims, {new} new: no time left")
                break
            heard = Heard()
            arguments = ["case", str(dim), str(new), json.dumps([*skips[dim]])]
            why = child(arguments, heard)
            skips[dim] |= heard.failed
            if heard.done or not heard.now:
                break
            skips[dim][heard.now] = why
            if heard.now.startswith(("all", "ships")):
                break
        print(f"\n{4096 // dim}q/8x{dim}, {new} new tokens; FA3 with a BF16 pool {FA3[dim, new][0]}, FP8 {FA3[dim, new][1]} us "
              f"[{time.monotonic() - start:.0f} s]")  # fmt: skip
        ships = heard.times.get("ships: auto", 0)
        for name, us in sorted(heard.times.items(), key=lambda item: item[1]):
            small, large = heard.errors[name]
            wrong = "" if max(small, large) <= WORST else "  WRONG"
            print(f"  {us:9.1f} us  {ships / us:5.2f}x auto  errors {small:.1e} {large:.1e}{wrong}  {name}")
        for name, (small, large) in heard.errors.items():
            if name not in heard.times:
                print(f"  not timed  errors {small:.1e} {large:.1e}  {name}")
        for name, where in heard.where.items():
            print(f"  wrong      {name}: {where}")
        for name, reason in skips[dim].items():
            print(f"  left out   {name}: {reason}")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_only(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["case"]:
        run_case(int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]) if len(sys.argv) > 4 else [], 0.15)
    elif sys.argv[1:2] == ["once"]:  # head dim, new tokens, index of a variant: three launches, for a profiler
        once(*map(int, sys.argv[2:5]))
    else:
        main()
