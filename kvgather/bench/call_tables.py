"""Tables of the committed rows of the engines' call and of host times, for the README and for chapter 07.

    python -m kvgather.bench.call_tables README.md

rewrites the README's tables, between its two markers; without committed rows it leaves nothing between them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..cases import Case
from ..cases.measured import CALLS, HOST
from .calls import EAGER, ENGINES_CALL, UPSTREAM
from .report import Row, read, slug

BEGIN, END = "<!-- the engines' call: begin -->", "<!-- the engines' call: end -->"
CALL_HEADERS = (
    "tokens", "heads × dim, layout", "GPU: planned gather", "GPU: the call", "GPU: upstream's form", "faster",
    "eager: the call", "eager: upstream's form", "faster",
)  # fmt: skip
HOST_HEADERS = ("eager call", "host time", "in launches")
IN_README = (
    ("NHD", 8, 64, 1536),
    ("NHD", 8, 64, 16384),
    ("NHD", 8, 64, 131072),
    ("SHUFFLE", 8, 64, 131072),
    ("SHUFFLE", 8, 128, 131072),
    ("SHUFFLE", 1, 64, 16384),
)
"""Layout, heads, head_dim and tokens of the README's rows; the chapter shows all cases."""

Line = tuple[str, ...]


def committed(results: Path, benchmark: str) -> list[Row]:
    """The rows of the engines' call, or of host times, from the first file that has them.

    Args:
        results: the folder `benchmarks/results`.
        benchmark: "gather" or "host".
    """
    names = {case.name for case in (CALLS if benchmark == "gather" else (HOST,))}
    for path in sorted(results.glob(f"{benchmark}_*.csv")):
        rows = [row for row in read(path) if row.benchmark == benchmark and row.case in names]
        if rows:
            return rows
    return []


def call_lines(rows: Sequence[Row], cases: Iterable[Case] = CALLS) -> list[Line]:
    """A line under `CALL_HEADERS` for each measured case: GPU times, then eager times."""
    by_name = {(row.case, row.implementation): row for row in rows}
    lines: list[Line] = []
    for case in cases:
        names = ("kvgather", ENGINES_CALL, UPSTREAM, ENGINES_CALL + EAGER, UPSTREAM + EAGER)
        measured = [by_name.get((case.name, name)) for name in names]
        planned, call, upstream, eager_call, eager_upstream = (row and row.p50_us for row in measured)
        if planned and call and upstream and eager_call and eager_upstream:
            shape = f"{case.num_heads} × {case.k_dim}, {case.layout}"
            gpu = (_time(planned), _time(call), _time(upstream), f"{upstream / call:.1f} ×")
            eager = (_time(eager_call), _time(eager_upstream), f"{eager_upstream / eager_call:.1f} ×")
            lines.append((f"{case.total_tokens:,}", shape, *gpu, *eager))
    return lines


def host_lines(rows: Sequence[Row]) -> list[Line]:
    """A line under `HOST_HEADERS` for each call, the yardstick first."""
    return [(row.implementation, _time(row.p50_us), f"{row.launches:.2f}") for row in rows]


def where(rows: Sequence[Row]) -> str:
    """The machine and the versions of measured rows."""
    row = rows[0]
    return f"{row.device}, {row.date}, torch {row.torch}, triton {row.triton}"


def readme_block(results: Path) -> str:
    """The text between the README's markers; empty unless both kinds of rows are committed."""
    rows, times = committed(results, "gather"), committed(results, "host")
    by_key = {(case.layout, case.num_heads, case.k_dim, case.total_tokens): case for case in CALLS}
    lines = call_lines(rows, [by_key[key] for key in IN_README])
    if not (lines and times):
        return ""
    return f"""
`kg.cp_mha_gather_cache`, as engines call it, against one raw launch of upstream's form of the kernel (our rewrite, 21
arguments): 16 sequences of equal length, page 16, per-tensor scales, e4m3fn to bfloat16, on one
{where(rows)}.
*GPU* is the time in a CUDA graph. *Eager* is the time per call of a loop on the host: the host's time or the GPU's,
whichever is longer.

{_markdown(CALL_HEADERS, lines)}

What an eager call takes of the host's time, in such launches (16 sequences of 512 tokens, 8 heads of 64;
`prefix_attention` is one decode step straight from the pages, 64 query heads, its write included), on one
{where(times)}:

{_markdown(HOST_HEADERS, host_lines(times))}

These rows, and more cases, are in {_link("gather", rows)} and {_link("host", times)}.
"""


def write_readme(path: Path, results: Path) -> None:
    """Rewrite the README's tables.

    Raises:
        ValueError: the README does not have the two markers in order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no {BEGIN} … {END}; accepted: one pair of markers, each on a line of its own")
    path.write_text(f"{before}{BEGIN}\n{readme_block(results)}{END}{after}", encoding="utf-8")


def _link(benchmark: str, rows: Sequence[Row]) -> str:
    name = f"{benchmark}_{slug(rows[0].device)}.csv"
    return f"[{name}](benchmarks/results/{name})"


def _markdown(headers: Sequence[str], lines: Sequence[Line]) -> str:
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 100 else f"{microseconds:,.0f} µs"


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    write_readme(readme, readme.parent / "benchmarks" / "results")
