"""Block tables and offsets, right and wrong in their contents, as code."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fuzz import forms
from tests.fuzz.case import Draw, Form, bad
from tests.fuzz.pools import Sizes

WIDE = {"int32": (2**31 - 1, -(2**31)), "int64": (2**63 - 1, -(2**63))}


@dataclass
class Batch:
    """What a plan is built from.

    Attributes:
        table, cu, starts: as lists.
        total: rows, as given or read.
        given_total: as it is given; None is not at all.
        dtypes: of the three.
    """

    table: list[list[int]]
    cu: list[int]
    starts: list[int] | None
    total: int
    given_total: int | None
    dtypes: list[str] = field(default_factory=lambda: ["int32"] * 3)
    columns: int = 0

    def codes(self, draw: Draw) -> tuple[str, str, str]:
        """Code of the table, the offsets and the starts."""
        table = forms.whole_numbers(draw, self.table, self.dtypes[0], self.columns or 1)
        if not self.table and not self.columns:
            table = f"torch.zeros(0, 0, dtype=torch.{self.dtypes[0]})"
        starts = "None" if self.starts is None else forms.whole_numbers(draw, self.starts, self.dtypes[2])
        return table, forms.whole_numbers(draw, self.cu, self.dtypes[1]), starts


def batch(draw: Draw, of: Sizes, most: int = 24, sick: float = 0.3) -> Batch:
    """A batch over the blocks of a pool.

    Args:
        most: tokens in all, about.
        sick: how often its contents are wrong.
    """
    sequences = draw.choice([0, 1, 1, 2, 2, 3, 4])
    lengths = [draw.choice([0, 1, draw.randint(0, max(1, most // max(1, sequences)))]) for _ in range(sequences)]
    starts = [draw.choice([0, 1, draw.randint(0, 2 * of.page)]) for _ in range(sequences)] if draw.chance(0.3) else None
    ends = [n + (starts[b] if starts else 0) for b, n in enumerate(lengths)]
    columns = max((-(-end // of.page) for end in ends), default=0) + draw.choice([0, 0, 1, 3])
    junk = [0, -1, of.blocks, 2**31 - 1, -(2**31)]
    table = [
        [
            draw.randrange(of.blocks) if of.blocks and column * of.page < end else draw.choice(junk)
            for column in range(columns)
        ]
        for end in ends
    ]
    cu = [sum(lengths[:b]) for b in range(sequences + 1)]
    dtypes = [draw.one("int32", "int64") for _ in range(3)]
    if draw.chance(sick):
        for _ in range(draw.randint(1, 3)):
            _spoil(draw, table, cu, starts, dtypes, of)
            for numbers, dtype in ((cu, dtypes[1]), (starts or [], dtypes[2])):
                numbers[:] = [min(max(number, WIDE[dtype][1]), WIDE[dtype][0]) for number in numbers]
    total = max(0, min(cu[-1], 300))
    given = draw.choice([None, total, total, total + draw.randint(0, 5), max(0, total - 3)])
    if given is None and total != cu[-1]:
        given = total
    return Batch(table, cu, starts, total if given is None else given, given, dtypes, columns)


def _spoil(
    draw: Draw, table: list[list[int]], cu: list[int], starts: list[int] | None, dtypes: list[str], of: Sizes
) -> None:
    """Make one number wrong."""
    what = draw.randrange(4)
    if what == 0 and table and table[0]:
        row = draw.choice(table)
        row[draw.randrange(len(row))] = draw.choice([-1, of.blocks, of.blocks + 1, *WIDE[dtypes[0]], -of.blocks])
    elif what == 1:
        at = draw.randrange(len(cu))
        cu[at] = draw.choice([cu[at] - 1, cu[at] + 2, -1, 0, 17, *WIDE[dtypes[1]]])
    elif what == 2 and starts:
        starts[draw.randrange(len(starts))] = draw.choice([-1, -(of.page), 1000, *WIDE[dtypes[2]]])
    elif what == 3 and len(cu) > 2:
        cu[1], cu[2] = cu[2], cu[1]


def index_forms(name: str, ndim: int, names: tuple[str, ...] = (), optional: bool = False) -> list[Form]:
    """Wrong forms of a table, of offsets or of starts.

    Args:
        names: of the arguments that belong to it.
    """
    wrong = ("float32", "int16", "uint8", "int8", "bfloat16", "float64")
    found = forms.tensors(name, *wrong, optional=optional, names=names)
    long = "torch.zeros(17, 3, dtype=torch.int32)" if ndim == 2 else "torch.zeros(17, dtype=torch.int64)"
    return found + bad(long, f"{name}[..., None]", names=names)
