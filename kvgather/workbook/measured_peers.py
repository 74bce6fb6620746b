"""The recorded times and errors of our attention, of FlashAttention-3 and of FlashInfer, and the least time of a batch.

The rows are those of `kvgather bench prefix --peers`. A file or a row that is missing leaves a gap, and no exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..attention.choose import PROCESSORS
from ..bench import report
from ..bench.peer_fa3 import BF16_POOL, FP8_POOL
from ..bench.peer_flashinfer import NAME as FLASHINFER
from ..bench.peer_targets import LIMIT, OURS
from ..bench.peers import cases
from ..bench.results import find_results
from ..cases.prefix import PrefixCase
from ..hopper.plan import wins

__all__ = [
    "FILE", "LABELS", "PRODUCT_SPEED", "READ_SPEED", "Form", "LeastTime", "MeasuredPeers", "hopper_attends",
    "least_time", "measured_peers", "peers_by_layer", "sources_of",
]  # fmt: skip

FILE = "peers_h100.csv"
RECORD = "kvgather bench prefix --peers --csv"
READ_SPEED, PRODUCT_SPEED = 3.35e6, 989e6
"""Bytes, and floating-point operations of 16-bit products without sparsity, per µs: the data sheet of an H100 SXM."""


@dataclass(frozen=True)
class Form:
    """An implementation, with what it reads and multiplies.

    Attributes:
        label: its name in tables and pictures.
        pool, q: dtypes of the pool and of q.
        itemsize: bytes of a number of the pool.
        product_speed: floating-point operations per µs of its products, from the data sheet.
    """

    label: str
    pool: str
    q: str
    itemsize: int
    product_speed: float


FORMS: Mapping[str, Form] = {
    OURS: Form("ours", "FP8", "BF16", 1, PRODUCT_SPEED),
    BF16_POOL: Form("FA3 BF16", "BF16", "BF16", 2, PRODUCT_SPEED),
    FP8_POOL: Form("FA3 FP8", "FP8", "FP8", 1, 2 * PRODUCT_SPEED),
    FLASHINFER: Form("FlashInfer", "FP8", "BF16", 1, PRODUCT_SPEED),
}
"""By the name of its rows."""
LABELS: Mapping[str, str] = {name: form.label for name, form in FORMS.items()} | {LIMIT: LIMIT}


@dataclass(frozen=True)
class MeasuredPeers:
    """One batch of the benchmark.

    Attributes:
        case: the batch.
        times: median time in µs by implementation, such as `OURS`; without those that were not timed.
        errors: relative error against float64, of the implementations in `times`.
        reasons: why an implementation was not timed.
        sources: where implementations of others come from, with the version, and with the date if it is another one.
        machine: GPU, date and versions.
    """

    case: PrefixCase
    times: Mapping[str, float]
    errors: Mapping[str, float]
    reasons: Mapping[str, str]
    sources: Mapping[str, str]
    machine: str

    @property
    def layer(self) -> str:
        """The layer's heads."""
        return f"{self.case.q_heads} query, {self.case.kv_heads} KV heads of {self.case.head_dim}"

    @property
    def new(self) -> int:
        """New tokens of each sequence."""
        return self.case.new[0]

    def ratio(self, name: str) -> float | None:
        """The time of an implementation over ours; None if one of them was not timed."""
        if OURS not in self.times or name not in self.times:
            return None
        return self.times[name] / self.times[OURS]

    def share(self, name: str) -> float | None:
        """The least time of an implementation, or of a plain read, over its time; None if it was not timed."""
        if name not in self.times:
            return None
        least = self.case.cached_bytes / READ_SPEED if name == LIMIT else least_time(self.case, FORMS[name]).us
        return least / self.times[name]


@dataclass(frozen=True)
class LeastTime:
    """The least time of a batch, from the data sheet's speeds.

    Attributes:
        read_us: to read K and V of all tokens once.
        product_us: to multiply queries with the keys that they see, and weights with values.
    """

    read_us: float
    product_us: float

    @property
    def limit(self) -> str:
        """Which of the two is longer: "bytes" or "products"."""
        return "bytes" if self.read_us >= self.product_us else "products"

    @property
    def us(self) -> float:
        """The longer one, in µs."""
        return max(self.read_us, self.product_us)


def least_time(case: PrefixCase, form: Form = FORMS[OURS]) -> LeastTime:
    """The least time of a batch for an implementation; Q and the output are not counted.

    Args:
        case: a batch without a window.
        form: what the implementation reads and multiplies.
    """
    pairs = sum(new * cached + new * (new + 1) // 2 for new, cached in zip(case.new, case.cached, strict=True))
    operations = 2 * 2 * case.head_dim * case.q_heads * pairs  # a product and a sum, for K and for V
    return LeastTime(form.itemsize * case.read_bytes / READ_SPEED, operations / form.product_speed)


def measured_peers(path: Path | None = None) -> tuple[MeasuredPeers, ...]:
    """The measured batches in the order of the file; empty if the file is missing.

    Args:
        path: the file; None is the one in the folder of results.

    Raises:
        FileNotFoundError: the folder of results is missing.
        ValueError: the file's columns are not those of a row.
    """
    return _read(find_results() / FILE if path is None else path)


@cache
def _read(path: Path) -> tuple[MeasuredPeers, ...]:
    known = {case.name: case for case in cases(torch.device("cuda"))}
    found: dict[str, list[report.Row]] = {}
    for row in report.read(path) if path.is_file() else []:
        if row.case in known:
            found.setdefault(row.case, []).append(row)
    return tuple(_batch(known[name], rows) for name, rows in found.items())


def _batch(case: PrefixCase, rows: Sequence[report.Row]) -> MeasuredPeers:
    timed = [row for row in rows if not row.reason and row.p50_us]
    return MeasuredPeers(
        case,
        {row.implementation: row.p50_us for row in timed},
        {row.implementation: row.error for row in timed if row.implementation in FORMS},
        {row.implementation: row.reason for row in rows if row.reason},
        {row.implementation: _source(row, rows[0].date) for row in timed if row.peer_version},
        f"{rows[0].device}, {rows[0].date}, torch {rows[0].torch}, triton {rows[0].triton}",
    )


def _source(row: report.Row, date: str) -> str:
    """The version of a row's implementation, and the row's date if it is not that of the others."""
    return row.peer_version if row.date == date else f"{row.peer_version}, {row.date}"


def hopper_attends(case: PrefixCase) -> bool:
    """Whether the Hopper kernel is what the direct path takes for a batch, on the GPU of the rows.

    It runs on all of them: NHD, pages of 16 tokens, per-tensor scales.
    """
    keys = sum(case.lengths) / len(case.lengths)
    return wins(case.new, keys, case.head_dim, case.q_heads // case.kv_heads, case.kv_heads, PROCESSORS)


def peers_by_layer(
    measured: Sequence[MeasuredPeers], sequences: int = 16, cached: int = 8192
) -> dict[str, dict[int, MeasuredPeers]]:
    """The batches with some sequences and cached tokens, by the layer's heads and by the number of new tokens.

    Args:
        measured: from `measured_peers`; batches without a time of ours are left out.
        sequences: number of sequences.
        cached: cached tokens of each.
    """
    layers: dict[str, dict[int, MeasuredPeers]] = {}
    for at in sorted(measured, key=lambda at: at.new):
        if at.case.cached == (cached,) * sequences and OURS in at.times:
            layers.setdefault(at.layer, {})[at.new] = at
    return dict(sorted(layers.items(), key=lambda layer: next(iter(layer[1].values())).case.head_dim))


def sources_of(measured: Sequence[MeasuredPeers]) -> list[str]:
    """Where the rows come from: machines and dates, versions of the implementations, and reasons of missing ones."""
    if not measured:
        return [f"No rows: {FILE} has none of these batches. `{RECORD}` records them."]
    lines = list(dict.fromkeys(at.machine for at in measured))
    names: dict[str, list[str]] = {}
    for at in measured:
        for name, source in at.sources.items():
            names.setdefault(source, [])
            if LABELS[name] not in names[source]:
                names[source].append(LABELS[name])
    lines += [f"{' and '.join(labels)}: {source}" for source, labels in names.items()]
    for name, label in LABELS.items():
        if name in FORMS and not any(name in at.times for at in measured):
            reason = next((at.reasons[name] for at in measured if name in at.reasons), "there are no rows")
            lines.append(f"{label} was not timed: {reason}")
    return lines
