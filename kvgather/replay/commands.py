"""The commands `kvgather serve` and `kvgather replay`: their arguments, and what they do with them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OK, NOT_AS_EXPECTED, FAILED = 0, 1, 3
GATHERS = ("before", "shipped-fix", "after")
SCALE = 0.05
"""Of K and V: with random weights, values reach a few units, and codes at most 448."""
CHARACTERS_PER_TOKEN = 4
"""Of a model with a tokenizer of its own, about; models with random weights have one token per character."""


def add_serve(commands: Any) -> None:
    """Add `kvgather serve`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model: transformers' OpenAI-compatible server on this package's FP8 pools",
        description="Transformers' server and its continuous batching, with this package's paged cache and attention. "
        "Needs kvgather[serving].",
    )
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="the folder of a model")
    parser.add_argument("--random-weights", action="store_true", help="no MODEL: random weights for --config")
    _add_engine(parser)
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--host", default="localhost", help="default: localhost")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.set_defaults(run=serve)


def add_replay(commands: Any) -> None:
    """Add `kvgather replay`."""
    parser = commands.add_parser(
        "replay",
        help="replay the run that met the crash: 65 requests with a shared prefix, the bug or the fix in the engine",
        description="Starts `kvgather serve` in a child process, sends all requests at once, each by a client of its "
        "own, and prints what became of them.",
        epilog="exit status: 0 every request completed and the engine is alive; 1 not so; 2 wrong usage; 3 the server "
        "did not start; 130 interrupted",
    )
    parser.add_argument(
        "model", nargs="?", default="", metavar="MODEL", help="the folder of a model; default: random weights"
    )
    parser.add_argument("--requests", type=_count, default=65, metavar="N", help="default: 65")
    parser.add_argument("--shared", type=_count, metavar="N", help="tokens that all prompts begin with")
    parser.add_argument("--own", type=_count, metavar="N", help="further tokens of each prompt, on average")
    parser.add_argument("--new", type=_count, metavar="N", help="tokens to generate for each")
    parser.add_argument("--plain", action="store_true", help="whole answers; default: token by token, as a stream")
    parser.add_argument(
        "--timeout", type=_seconds, default=300.0, metavar="SECONDS", help="of each client; default: 300"
    )
    parser.add_argument("--limit", type=_seconds, default=900.0, metavar="SECONDS", help="of the server; default: 900")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="requests before, with another prefix")
    parser.add_argument(
        "--no-compare", action="store_true", help="do not compare the texts with those of the fixed gather"
    )
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="", help="add a row to FILE, or to the folder of results"
    )
    parser.add_argument("--commit", metavar="TEXT", help="commit to record; default: KVGATHER_COMMIT, or git's HEAD")
    _add_engine(parser)
    parser.set_defaults(run=replay)


ENGINE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--config", {"default": "tiny", "help": "with random weights: tiny or 20b (GPT-OSS), llama, qwen3, mistral"}),
    ("--device", {"help": "cpu, cuda or cuda:N; default: the GPU if there is one"}),
    ("--dtype", {"help": "of the weights; default: bfloat16 on a GPU, float32 on a CPU"}),
    ("--seed", {"type": int, "default": 0, "help": "of random weights, and of the prompts; default: 0"}),
    ("--engine", {"choices": ("kvgather", "stock"), "default": "kvgather", "help": "stock: transformers' own cache"}),
    ("--cache-dtype", {"default": "float8_e4m3fn", "help": "of the pools; default: float8_e4m3fn"}),
    ("--layout", {"default": "NHD", "help": "of the pools: NHD, HND or SHUFFLE; default: NHD"}),
    ("--scale", {"default": "per-tensor", "help": "the kind of the scales; default: per-tensor"}),
    ("--path", {"default": "auto", "help": "of the attention: auto, direct, gather or hybrid"}),
    ("--page-size", {"type": int, "default": 16, "help": "tokens per block; default: 16"}),
    ("--num-blocks", {"type": int, "help": "blocks of the cache; default: as many as fit, or as the requests need"}),
    ("--max-batched-tokens", {"type": int, "default": 16384, "help": "budget of a step in tokens; default: 16384"}),
    ("--gather", {"choices": GATHERS, "default": "after", "help": "of prefills that find a prefix; default: after"}),
)  # fmt: skip
FLAGS: tuple[tuple[str, str], ...] = (
    ("--guard", "memory that faults follows the scale"),
    ("--no-sharing", "do not share prefixes"),
)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    for name, options in ENGINE:
        parser.add_argument(name, **options)
    for name, text in FLAGS:
        parser.add_argument(name, action="store_true", help=text)


def _engine_arguments(arguments: argparse.Namespace) -> list[str]:
    """The arguments of `kvgather serve` for an engine as `replay` was asked for."""
    words = [arguments.model, "--greedy"] if arguments.model else ["--random-weights"]
    for name, _ in ENGINE:
        value = getattr(arguments, name[2:].replace("-", "_"))
        if value is not None:
            words += [name, str(value)]
    return words + [name for name, _ in FLAGS if getattr(arguments, name[2:].replace("-", "_"))]


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model until the process is told to stop."""
    from ..device import resolve_device

    _check_extra()
    from ..serving import serve as server

    if bool(arguments.model) == arguments.random_weights:
        raise ValueError("accepted: either MODEL, the folder of a model, or --random-weights")
    if arguments.model and not Path(arguments.model).is_dir():
        raise ValueError(f"MODEL is {arguments.model!r}, which is no folder; accepted: the folder of a model")
    device = resolve_device(arguments.device, "--device")
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = server.Source(
        arguments.model, arguments.config, device, _dtype(arguments.dtype, "--dtype", default), arguments.seed,
        arguments.greedy,
    )  # fmt: skip
    sizes = server.Sizes(
        arguments.page_size, arguments.num_blocks, arguments.max_batched_tokens, sharing=not arguments.no_sharing
    )
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
    from . import run, table
    from .process import ServerError

    lengths = {"20b": (1000, 100, 128)}.get(arguments.config if not arguments.model else "20b", (48, 16, 4))
    for name, value in zip(("shared", "own", "new"), lengths, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.num_blocks is None:
        tokens = arguments.shared + arguments.own * 5 // 4 + arguments.new
        arguments.num_blocks = max(128, arguments.requests * (tokens // arguments.page_size + 2) * 5 // 4)
    path = None if arguments.csv is None else Path(arguments.csv) if arguments.csv else _default_csv(arguments)
    words = _engine_arguments(arguments)
    try:
        with _Bar(arguments.requests) as bar:
            outcome = run.replay(
                words, _workload(arguments, arguments.requests, arguments.seed), limit=arguments.limit, tell=bar.tell,
                warm_up=_workload(arguments, arguments.warm_up, arguments.seed + 1) if arguments.warm_up else None,
            )  # fmt: skip
        print(table.text(outcome), flush=True)
        if outcome.output:
            print(f"\nthe last lines of the server:\n{outcome.output}", file=sys.stderr, flush=True)
        if path is not None:
            table.write(_row(arguments, table.measured(outcome)), path)
            print(f"\n1 row in {path}")
        if outcome.succeeded and arguments.gather != "after" and not arguments.no_compare:
            words[words.index("--gather") + 1] = "after"
            fixed = run.replay(words, _workload(arguments, arguments.requests, arguments.seed), limit=arguments.limit)
            wrong = outcome.differing(fixed)
            share = f"{wrong} of {arguments.requests} ({wrong / arguments.requests:.1%})"
            print(f"{'other text':<13} {share} than with the fixed gather")
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
        **measured,
        **machine(resolve_device(arguments.device, "--device").type),
        "transformers": importlib.metadata.version("transformers"),
    }
    return Row(**columns)


def _default_csv(arguments: argparse.Namespace) -> Path:
    from ..bench.machine import machine
    from ..bench.report import slug
    from ..bench.results import RESULTS
    from ..device import resolve_device

    kind = resolve_device(arguments.device, "--device").type
    return RESULTS / f"serving_{'cpu' if kind == 'cpu' else slug(machine(kind)['device'])}.csv"


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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count; accepted: 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    from ..lab.child import check_seconds

    try:
        return check_seconds(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


Add = Callable[[Any], None]
COMMANDS: tuple[Add, ...] = (add_serve, add_replay)
"""What `kvgather.cli` adds."""
