"""The commands `kvgather serve` and `kvgather replay`: what they do with their arguments."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .arguments import add_replay, add_serve, check_engine, engine_arguments

OK, NOT_AS_EXPECTED, FAILED = 0, 1, 3
SCALE = 0.05
"""Of K and V: with random weights, values reach a few units, and codes at most 448."""
CHARACTERS_PER_TOKEN = 4
"""Of a model with a tokenizer of its own, about; models with random weights have one token per character."""


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model until the process is told to stop."""
    from ..device import resolve_device

    _check_extra()
    from ..serving import serve as server
    from ..serving.tensor_parallel import Ranks, plan_of

    check_engine(arguments)
    if bool(arguments.model) == arguments.random_weights:
        raise ValueError("accepted: either MODEL, the folder of a model, or --random-weights")
    _check_folder(arguments.model)
    ranks = Ranks.of_torchrun(arguments.rank_timeout)
    device = resolve_device(arguments.device, "--device")
    if ranks.count > 1:
        device = resolve_device(ranks.device(device.type), f"the device of rank {ranks.rank}")
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = server.Source(
        arguments.model, arguments.config, device, _dtype(arguments.dtype, "--dtype", default), arguments.seed,
        arguments.greedy, ranks,
    )  # fmt: skip
    if ranks.count > 1:
        plan_of(source.model_config(), ranks.count)  # raises before anything is allocated
    sizes = server.Sizes(
        arguments.page_size, arguments.num_blocks, arguments.max_batched_tokens, sharing=not arguments.no_sharing,
        exchange_seconds=arguments.rank_timeout,
    )  # fmt: skip
    options = None if arguments.engine == "stock" else _options(arguments, source, sizes)
    server.serve(source, sizes, options, arguments.host, arguments.port)
    return OK


def _options(arguments: argparse.Namespace, source: Any, sizes: Any) -> Any:
    """The options of the engine: **here a caller decides what the scale is, and which gather reads it.**"""
    from ..lab.child import leave_no_core
    from ..serving import Options
    from .gathers import furthest_element, gather_named, scales

    k_scale = v_scale = None
    dtype = _dtype(arguments.cache_dtype, "--cache-dtype", torch.float8_e4m3fn)
    asked = f"--gather {arguments.gather}" if arguments.gather != "after" else "--guard" if arguments.guard else ""
    if arguments.gather != "after" and arguments.layout == "HND":
        raise ValueError(f"{asked} with --layout HND; accepted: NHD, SHUFFLE, which are upstream's layouts")
    if dtype.itemsize == 1 and arguments.scale == "per-tensor":
        furthest = 1
        if arguments.gather != "after":
            leave_no_core()
            if sizes.num_blocks is None:
                raise ValueError(f"{asked} without --num-blocks; accepted: a number of blocks")
            config = source.model_config()
            furthest = furthest_element(
                sizes.num_blocks, sizes.page_size, config.num_hidden_layers, config.num_key_value_heads
            )
        k_scale, v_scale = scales(SCALE, arguments.guard, furthest, source.device)
    elif asked:
        raise ValueError(f"{asked} with a scale of kind {arguments.scale} and {dtype}; accepted: per-tensor, and FP8")
    return Options(
        dtype=dtype, layout=arguments.layout, scale=arguments.scale, k_scale=k_scale, v_scale=v_scale,
        path=arguments.path, gather=gather_named(arguments.gather),
    )  # fmt: skip


def replay(arguments: argparse.Namespace) -> int:
    """Replay, print the outcome, compare the texts, and keep a row."""
    if importlib.util.find_spec("openai") is None:  # the server's process checks the other modules
        raise ValueError("openai is not installed; accepted: kvgather with its extra, kvgather[serving]")
    from ..bench.keep import STDOUT
    from ..bench.machine import default_csv
    from ..device import resolve_device
    from . import run, table
    from .process import ServerError

    check_engine(arguments)
    _check_folder(arguments.model)
    if arguments.ranks > 1:
        _check_heads(arguments)
    lengths = {"20b": (1000, 100, 128)}.get(arguments.config if not arguments.model else "20b", (48, 16, 4))
    for name, value in zip(("shared", "own", "new"), lengths, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.num_blocks is None:
        tokens = arguments.shared + arguments.own * 5 // 4 + arguments.new
        arguments.num_blocks = max(128, arguments.requests * (tokens // arguments.page_size + 2) * 5 // 4)
    path = None
    if arguments.csv is not None:
        path = Path(arguments.csv or default_csv("serving", resolve_device(arguments.device, "--device").type))
        if path != STDOUT:
            table.check_writable(path)
    messages = sys.stderr if path == STDOUT else sys.stdout
    words = engine_arguments(arguments)
    try:
        with _Bar(arguments.requests) as bar:
            outcome = run.replay(
                words, _workload(arguments, arguments.requests, arguments.seed), limit=arguments.limit, tell=bar.tell,
                ranks=arguments.ranks,
                warm_up=_workload(arguments, arguments.warm_up, arguments.seed + 1) if arguments.warm_up else None,
            )  # fmt: skip
        print(table.text(outcome), file=messages, flush=True)
        if outcome.output:
            print(f"\nthe last lines of the server:\n{outcome.output}", file=sys.stderr, flush=True)
        if path is not None:
            row = _row(arguments, table.measured(outcome))
            if path == STDOUT:
                print(table.as_csv([table.as_texts(row)]), end="", flush=True)
            else:
                table.write(row, path)
                print(f"\n1 row in {path}")
        if outcome.succeeded and arguments.gather != "after" and not arguments.no_compare:
            words[words.index("--gather") + 1] = "after"
            fixed = run.replay(
                words, _workload(arguments, arguments.requests, arguments.seed), limit=arguments.limit,
                ranks=arguments.ranks,
            )  # fmt: skip
            wrong = outcome.differing(fixed)
            share = f"{wrong} of {arguments.requests} ({wrong / arguments.requests:.1%})"
            print(f"{'other text':<13} {share} than with the fixed gather", file=messages)
    except ServerError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return FAILED
    return OK if outcome.succeeded else NOT_AS_EXPECTED


def _workload(arguments: argparse.Namespace, count: int, seed: int) -> Any:
    from .clients import Workload
    from .prompts import prompts

    factor = CHARACTERS_PER_TOKEN if arguments.model else 1
    texts = prompts(count, arguments.shared * factor, arguments.own * factor, seed)
    name = arguments.model or f"random-{arguments.config}"
    return Workload(name, texts, arguments.new, not arguments.plain, arguments.timeout)


def _row(arguments: argparse.Namespace, measured: dict[str, object]) -> Any:
    import importlib.metadata
    import os

    from ..bench.machine import COMMIT, machine
    from ..device import resolve_device
    from .table import Row

    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    name = Path(arguments.model).name if arguments.model else arguments.config
    lengths = f"{arguments.requests} x {arguments.shared} + {arguments.own} + {arguments.new}"
    stock = arguments.engine == "stock"
    columns: dict[str, Any] = {
        "case": f"{name}, {lengths}, budget {arguments.max_batched_tokens}",
        "engine": arguments.engine,
        "gather": "" if stock else arguments.gather,
        "guard": arguments.guard,
        "sharing": not arguments.no_sharing,
        "path": "" if stock else arguments.path,
        "dtype": "" if stock else arguments.cache_dtype,
        "layout": "" if stock else arguments.layout,
        "scale": "" if stock else arguments.scale,
        "ranks": arguments.ranks,
        **measured,
        **machine(resolve_device(arguments.device, "--device").type),
        "transformers": importlib.metadata.version("transformers"),
    }
    return Row(**columns)


class _Bar:
    """A progress bar on a terminal, if tqdm is installed; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="request", leave=False)

    def tell(self, _: object) -> None:
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _check_folder(model: str) -> None:
    """Raise unless a model is a folder, or random weights.

    Raises:
        ValueError: it is neither.
    """
    if model and not Path(model).is_dir():
        raise ValueError(f"MODEL is {model!r}, which is no folder; accepted: the folder of a model")


def _check_heads(arguments: argparse.Namespace) -> None:
    """Raise before a process starts, if the ranks do not divide the model's heads.

    Raises:
        ValueError: they do not; or kvgather[serving] is not installed.
    """
    _check_extra()
    from ..serving.serve import Source
    from ..serving.tensor_parallel import plan_of

    source = Source(arguments.model, arguments.config, torch.device("cpu"), torch.float32)
    plan_of(source.model_config(), arguments.ranks)


def _check_extra() -> None:
    """Raise unless kvgather[serving] is installed.

    Raises:
        ValueError: a module is missing, or transformers has another version.
    """
    missing = [name for name in ("openai", "fastapi", "uvicorn", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; accepted: kvgather with its extra, kvgather[serving]")
    try:
        importlib.import_module("..serving", __package__)
    except ImportError as error:
        raise ValueError(str(error)) from None


def _dtype(name: str | None, argument: str, default: torch.dtype) -> torch.dtype:
    if name is None:
        return default
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{argument} is {name!r}; accepted: the name of a dtype of torch, such as float32")
    return dtype


COMMANDS: tuple[Callable[[Any], None], ...] = (
    lambda commands: add_serve(commands, serve),
    lambda commands: add_replay(commands, replay),
)
"""What `kvgather.cli` adds."""
