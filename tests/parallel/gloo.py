"""Ranks as child processes, with gloo on a CPU or NCCL on GPUs: a module of the tests runs in each, and reports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgather.lab.child import environment

if TYPE_CHECKING:
    from kvgather.parallel import ContextParallel

DEVICE = os.environ.get("RANKS_ON", "cpu")
"""Of the ranks: "cpu", with gloo, or "cuda", with NCCL; they share GPUs if there are fewer."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Rank:
    """How a rank ended.

    Attributes:
        code: its exit status; negative for a signal.
        said: what it left as JSON, or None.
        text: its output and errors.
    """

    code: int
    said: Any
    text: str


def run_ranks(
    module: str, size: int, folder: Path, seconds: float, waits_for: int | None = None, **settings: str
) -> list[Rank]:  # fmt: skip
    """Run `python -m module FOLDER RANK SIZE` for each rank, with one thread each, and wait for all.

    A module calls `join` and leaves its result with `leave`. Kernels are interpreted on a CPU, also if the machine has
    a GPU, and compiled on GPUs, whatever this process does: the interpreter's copies from a GPU keep the GIL, and the
    threads that watch over a collective would wait for it.

    Args:
        module: to run.
        size: how many ranks.
        folder: for the store and the results.
        seconds: after which all that still run are killed.
        waits_for: the only rank that is waited for; all others are killed when it has ended. None means all.
        settings: further variables of the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    interpret = "0" if settings.get("RANKS_ON") == "cuda" else "1"
    env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TRITON_INTERPRET=interpret, **settings)
    children = []
    outputs = [folder / f"{rank}.txt" for rank in range(size)]  # not pipes: who waits for one rank does not read others
    for rank, output in enumerate(outputs):
        with output.open("w") as file:
            command = [sys.executable, "-W", "error", "-m", module, str(folder), str(rank), str(size)]
            children.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
            )
    ended = False
    try:
        if waits_for is not None:
            children[waits_for].wait(seconds)
            _kill(children)
        for child in children:
            child.wait(seconds)
        ended = True
    finally:
        _kill(children)
        for child, output in zip(children, outputs, strict=True):
            child.wait()
            if not ended:  # pytest shows it
                print(f"{output.name}:\n{output.read_text(errors='replace')[-3000:]}")
    left = [folder / f"{rank}.json" for rank in range(size)]
    texts = [output.read_text(errors="replace") for output in outputs]
    return [
        Rank(child.returncode, json.loads(file.read_text()) if file.exists() else None, text)
        for child, file, text in zip(children, left, texts, strict=True)
    ]


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def join(seconds: float = 60.0) -> tuple[Path, int, int]:
    """Join the group of the ranks that `run_ranks` started; the folder, this rank, and how many there are."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    device = None
    if DEVICE == "cuda":
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", rank % gpus)
        if size > gpus:  # NCCL refuses two ranks on one GPU of one host
            os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
            # They use sockets, which report a dead peer: torch's watchdog would sleep for a minute and end the process.
            # Over NVLink NCCL does not notice it; with these settings the ranks behave as there.
            os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
            os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "1000"  # a quarter of what the watchdog sleeps
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if DEVICE == "cpu" else "nccl", init_method=(folder / "store").as_uri(), rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds), device_id=device,
    )  # fmt: skip
    return folder, rank, size


def finish(attend: ContextParallel) -> None:
    """End the group of `join`: close its last user, which must leave it nothing that keeps its threads alive.

    A thread of gloo that frees a collective's tensors while the interpreter ends aborts the process: a rare failure,
    and therefore the threads themselves are looked for.
    """
    import torch.distributed as dist

    dist.barrier()
    attend.close()
    dist.destroy_process_group()
    until = time.monotonic() + 10  # a thread that has been joined stays in the list for a moment
    while threads := [name for name in _threads() if "gloo" in name]:
        assert time.monotonic() < until, threads
        time.sleep(0.01)


def _threads() -> list[str]:
    """The names of this process's threads; none but on Linux."""
    names = []
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            names.append((thread / "comm").read_text().strip())
    return names


def leave(folder: Path, rank: int, said: Any) -> None:
    """Leave a result for `run_ranks`."""
    (folder / f"{rank}.json").write_text(json.dumps(said))
