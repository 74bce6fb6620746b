"""The outcome of a replay as text, and as rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import check_replaceable, csv_text, replace_text
from .run import Outcome


@dataclass(frozen=True)
class Row:
    """One replay as a row.

    Attributes:
        case: model, requests, lengths and budget.
        engine: "kvgather" or "stock".
        gather, guard, sharing, path, dtype, layout, scale: options of the run.
        ranks: processes that held the heads together, each on its own GPU.
        requests, completed, failed, timed_out: numbers of requests.
        died: how the engine ended, or "".
        prompt_tokens, hit_tokens, hit_rate: tokens of the prompts, those that were cached, and their share.
        prefill_tokens: computed tokens of prompts.
        prefill_per_s, decode_per_s: tokens per second: of steps with a prefill, and of the others.
        first_token_p50_s, first_token_p95_s: seconds until the first token; 0 if answers were not streamed.
        seconds: from the first request to the last answer.
        peak_memory: bytes, of rank 0.
        auto_took: how often `auto` took each path, by kind of layer.
        auto_expected_ms: what it expected of these steps for one layer: of its choices, and of each path alone.
        device, driver, torch, triton, commit, date, transformers: machine, versions and date.
    """

    case: str
    engine: str
    gather: str
    guard: bool
    sharing: bool
    path: str
    dtype: str
    layout: str
    scale: str
    ranks: int
    requests: int
    completed: int
    failed: int
    timed_out: int
    died: str
    prompt_tokens: int
    hit_tokens: int
    hit_rate: float
    prefill_tokens: int
    prefill_per_s: float
    decode_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    seconds: float
    peak_memory: int
    auto_took: str
    auto_expected_ms: str
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    transformers: str


KEY = ("case", "engine", "gather", "guard", "sharing", "path", "dtype", "layout", "scale", "ranks", "device")
"""A new row replaces the row of a file that agrees in these columns."""


def measured(outcome: Outcome) -> dict[str, object]:
    """The columns that come from the outcome."""
    s = outcome.status
    prompt, hits = s.get("looked_up_tokens", 0), s.get("hit_tokens", 0)
    return {
        "requests": len(outcome.answers),
        "completed": outcome.completed,
        "failed": outcome.failed,
        "timed_out": outcome.timed_out,
        "died": outcome.death,
        "prompt_tokens": prompt or s.get("prefill_tokens", 0),
        "hit_tokens": hits,
        "hit_rate": round(hits / prompt, 4) if prompt else 0.0,
        "prefill_tokens": s.get("prefill_tokens", 0),
        "prefill_per_s": _rate(s.get("prefill_tokens", 0), s.get("prefill_seconds", 0.0)),
        "decode_per_s": _rate(s.get("decode_tokens", 0), s.get("decode_seconds", 0.0)),
        "first_token_p50_s": round(outcome.first_token(0.5) or 0.0, 4),
        "first_token_p95_s": round(outcome.first_token(0.95) or 0.0, 4),
        "seconds": round(outcome.seconds, 3),
        "peak_memory": s.get("peak_memory", 0),
        "auto_took": _by_kind(s, "steps", 1),
        "auto_expected_ms": _by_kind(s, "expected_us", 1000),
    }


def _by_kind(status: dict[str, Any], what: str, unit: int) -> str:
    """For example "full: direct 120, hybrid 3; window 128: direct 123"."""
    kinds = []
    for kind, log in status.get("paths", {}).items():
        values = [f"{name} {value / unit:g}" for name, value in sorted(log[what].items()) if value]
        if values:
            kinds.append(f"{kind}: {', '.join(values)}")
    return "; ".join(kinds)


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 1) if seconds else 0.0


def text(outcome: Outcome) -> str:
    """The outcome for people, one line for each figure."""
    m, s = measured(outcome), outcome.status
    lines = [
        ("requests", f"{m['requests']}"),
        ("completed", f"{m['completed']}"),
        ("failed", f"{m['failed']}"),
        ("timed out", f"{m['timed_out']}"),
        ("engine", f"died: {outcome.death}" if outcome.death else "alive"),
        ("time", f"{outcome.seconds:.2f} s"),
    ]
    if s.get("lookups"):
        hit = f"{s['hits']} of {s['lookups']} prompts, {s['hit_tokens']:,} of {s['looked_up_tokens']:,} tokens"
        lines.append(("prefix found", f"{hit} ({s['hit_tokens'] / s['looked_up_tokens']:.1%})"))
    if s:
        lines += [
            ("prefill", f"{m['prefill_tokens']:,} tokens, {m['prefill_per_s']:,.0f} per second"),
            ("decode", f"{s.get('decode_tokens', 0):,} tokens, {m['decode_per_s']:,.0f} per second"),
            ("peak memory", f"{s.get('peak_memory', 0) / 2**20:,.0f} MiB"),
        ]
    if (half := outcome.first_token(0.5)) is not None:
        lines.append(("first token", f"{half:.3f} s (p50), {outcome.first_token(0.95) or 0:.3f} s (p95)"))
    lines += [(name, f"{m[column]}") for name, column in PATHS if m[column]]
    for reason, count in outcome.reasons.most_common(3):
        lines.append((f"{count} ×", reason))
    return "\n".join(f"{name:<13} {value}" for name, value in lines)


PATHS = (("auto took", "auto_took"), ("expected ms", "auto_expected_ms"))


def write(row: Row, path: Path) -> None:
    """Write a row to a CSV file, where it replaces the row of the same case, options and device.

    Raises:
        ValueError: the columns of the existing file are not a row's.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    new = as_texts(row)
    old = read(path) if path.is_file() else []
    others = [line for line in old if any(line[name] != new[name] for name in KEY)]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, as_csv([*others, new]))


def check_writable(path: Path) -> None:
    """Raise early, before a run, the errors that `write` would raise after it; creates the file's folder.

    Raises:
        ValueError: the columns of the existing file are not a row's.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)
    if path.is_file():
        read(path)


def as_texts(row: Row) -> dict[str, str]:
    """A row's columns as the texts of a CSV file."""
    return {name: str(value) for name, value in asdict(row).items()}


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """Rows as the text of a CSV file."""
    return csv_text(COLUMNS, rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, as texts.

    Raises:
        ValueError: the file's columns are not a row's.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {list(reader.fieldnames or ())}; accepted: {list(COLUMNS)}")
        return list(reader)


COLUMNS = tuple(field.name for field in fields(Row))
