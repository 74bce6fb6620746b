"""The arguments of `kvgather serve` and `kvgather replay`; both take those of an engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], int]
GATHERS = ("before", "shipped-fix", "after")


def add_serve(commands: Any, run: Run) -> None:
    """Add `kvgather serve`, which calls `run`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model: transformers' OpenAI-compatible server on this package's FP8 pools",
        description="Transformers' server and its continuous batching, with this package's paged cache and attention. "
        "Needs kvgather[serving]. `torchrun --nproc-per-node N -m kvgather serve …` spreads the heads over N GPUs.",
    )
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="the folder of a model")
    parser.add_argument("--random-weights", action="store_true", help="no MODEL: random weights for --config")
    _add_engine(parser)
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--host", default="localhost", help="default: localhost")
    parser.add_argument("--port", type=_port, default=8000, help="0 for any that is free; default: 8000")
    parser.set_defaults(run=run)


def add_replay(commands: Any, run: Run) -> None:
    """Add `kvgather replay`, which calls `run`."""
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
    parser.add_argument(
        "--ranks", type=_count, default=1, metavar="N", help="processes that share the heads, one a GPU; N divides the "
        "KV heads; default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up", type=_count_from_0, default=0, metavar="N", help="requests before, with another prefix; "
        "default: 0",
    )  # fmt: skip
    parser.add_argument(
        "--no-compare", action="store_true", help="do not compare the texts with those of the fixed gather"
    )
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="", help="add a row to FILE; without FILE to serving_DEVICE.csv in "
        "the folder of results; - is the standard output",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="TEXT", help="commit to record; default: KVGATHER_COMMIT, or git's HEAD")
    _add_engine(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    return _number(text, "a count", 1)


def _count_from_0(text: str) -> int:
    return _number(text, "a count", 0)


def _port(text: str) -> int:
    return _number(text, "a port", 0, 65535)


def _number(text: str, what: str, least: int, most: int | None = None) -> int:
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text} is not {what}; accepted: {accepted}")
    return int(text)


ENGINE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--config", {"default": "tiny", "help": "of random weights: tiny, tiny-6, 20b, llama, llama-6, qwen3 or mistral"}),
    ("--device", {"help": "cpu, cuda or cuda:N; default: the GPU if there is one"}),
    ("--dtype", {"help": "of the weights; default: bfloat16 on a GPU, float32 on a CPU"}),
    ("--seed", {"type": int, "default": 0, "help": "of random weights, and of the prompts; default: 0"}),
    ("--engine", {"choices": ("kvgather", "stock"), "default": "kvgather", "help": "stock: transformers' own cache"}),
    ("--cache-dtype", {"default": "float8_e4m3fn", "help": "of the pools; default: float8_e4m3fn"}),
    ("--layout", {"default": "NHD", "help": "of the pools: NHD, HND or SHUFFLE; default: NHD"}),
    ("--scale", {"default": "per-tensor", "help": "the kind of the scales; default: per-tensor"}),
    ("--path", {"default": "auto", "help": "of the attention: auto, direct, gather or hybrid"}),
    ("--page-size", {"type": _count, "default": 16, "help": "tokens per block; default: 16"}),
    ("--num-blocks", {"type": _count, "help": "blocks of the cache; default: as many as fit, or as the requests need"}),
    ("--max-batched-tokens", {"type": _count, "default": 16384, "help": "budget of a step in tokens; default: 16384"}),
    ("--rank-timeout", {"type": float, "default": 120.0, "metavar": "SECONDS",
                        "help": "how long ranks wait for each other; default: 120"}),
    ("--gather", {"choices": GATHERS, "default": "after", "help": "of prefills that find a prefix; default: after"}),
)  # fmt: skip
FLAGS: tuple[tuple[str, str], ...] = (
    ("--guard", "memory that faults follows the scale"),
    ("--no-sharing", "do not share prefixes"),
)
OURS = ("--cache-dtype", "--layout", "--scale", "--path", "--gather", "--guard")
"""Arguments that transformers' own cache does not have."""


def check_engine(arguments: argparse.Namespace) -> None:
    """Raise if the stock engine would ignore an argument.

    Raises:
        ValueError: with `--engine stock`, an argument of this package's engine is not its default.
    """
    if arguments.engine != "stock":
        return
    defaults = {name: options["default"] for name, options in ENGINE if name in OURS}
    for name in OURS:
        value = value_of(arguments, name)
        if value != defaults.get(name, False):
            came, accepted = (value, defaults[name]) if name in defaults else ("given", f"no {name}")
            raise ValueError(f"{name} is {came}; accepted with --engine stock: {accepted}")


def value_of(arguments: argparse.Namespace, name: str) -> Any:
    """The value of an argument such as `--page-size`."""
    return getattr(arguments, name[2:].replace("-", "_"))


def _add_engine(parser: argparse.ArgumentParser) -> None:
    for name, options in ENGINE:
        parser.add_argument(name, **options)
    for name, text in FLAGS:
        parser.add_argument(name, action="store_true", help=text)


def engine_arguments(arguments: argparse.Namespace) -> list[str]:
    """The arguments of `kvgather serve` for an engine as `replay` was asked for."""
    words = [arguments.model, "--greedy"] if arguments.model else ["--random-weights"]
    for name, _ in ENGINE:
        value = value_of(arguments, name)
        if value is not None:
            words += [name, str(value)]
    return words + [name for name, _ in FLAGS if value_of(arguments, name)]


def _seconds(text: str) -> float:
    from ..lab.child import check_seconds

    try:
        return check_seconds(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
