"""Batches of cached and new tokens, and what `PrefixBatch` has to make of them, in loops."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz import forms
from tests.fuzz.case import Builder, Draw, Form, bad, good, large
from tests.fuzz.pages import used_offsets
from tests.fuzz.pools import Sizes
from tests.fuzz.tables import WIDE, index_forms

MOST = 2**31 - 1


@dataclass
class Checked:
    """What a batch comes to.

    Attributes:
        used_q: `[batch + 1]`, offsets of new tokens, clamped.
        lens_k: of each sequence, clamped to what it may have.
        refused: sequences that are longer than the batch's bounds.
        blocks: of each sequence, the block of each of its columns; −1 where there is none of the pool.
        max_q, max_k: the bounds.
        page: tokens per block.
        share: rank and ranks where pages are distributed; other ranks' columns have no block.
    """

    used_q: list[int]
    lens_k: list[int]
    refused: list[bool]
    blocks: list[list[int]]
    max_q: int
    max_k: int
    page: int
    share: tuple[int, int] = (0, 1)

    @classmethod
    def of(
        cls, table: list[list[int]], columns: int, cu_q: list[int], cu_k: list[int], page: int, num_blocks: int,
        total_q: int, total_k: int, max_q: int | None, max_k: int | None, known_q: list[int] | None,
        known_k: list[int] | None, share: tuple[int, int] = (0, 1),
    ) -> Checked:  # fmt: skip
        used_q, used_k = [0, *used_offsets(cu_q, total_q)[1:]], [0, *used_offsets(cu_k, total_k)[1:]]
        room = min(max(columns, 1) * page, MOST)
        most_new = total_q if max_k is None else min(total_q, max_k)
        bound_k = min(total_k, room) if max_k is None else min(total_k, room, max_k)
        bound_k = max(bound_k if known_k is None else max(known_k, default=0), min(total_k, 1))
        bound_q = most_new if max_q is None else min(max_q, most_new)
        bound_q = bound_q if known_q is None else max(known_q, default=0)
        if total_k > min(room, bound_k):  # a sequence may be too long; its new tokens are among the tokens it may have
            bound_q = min(bound_q, room, bound_k)
        lens_k, refused, blocks = [], [], []
        for b, row in enumerate(table):
            tokens, new = used_k[b + 1] - used_k[b], used_q[b + 1] - used_q[b]
            refused.append(tokens > min(room, bound_k) or new > bound_q)
            lens_k.append(min(tokens, room, bound_k))
            own = [column % share[1] == share[0] for column in range(max(columns, 1))]
            reached = [mine and column * page < lens_k[-1] for column, mine in enumerate(own)]
            ids = row or [-1]
            blocks.append([
                block if there and 0 <= block < num_blocks and not refused[-1] else -1
                for block, there in zip(ids, reached, strict=True)
            ])  # fmt: skip
        return cls(used_q, lens_k, refused, blocks, bound_q, bound_k, page, share)

    def new(self, sequence: int) -> int:
        return self.used_q[sequence + 1] - self.used_q[sequence]

    def own_blocks(self) -> list[list[int]]:
        """The block table of the rank: its columns alone, at least one."""
        rank, ranks = self.share
        return [ids[rank::ranks] or [-1] for ids in self.blocks]

    def seen(self, sequence: int, row: int, window: int | None) -> list[int]:
        """The positions that a row sees of those in this rank's pool."""
        position = self.lens_k[sequence] - self.new(sequence) + row
        first = 0 if window is None else max(0, position - window + 1)
        rank, ranks = self.share
        return [j for j in range(first, position + 1) if j // self.page % ranks == rank]

    def is_nan(self, sequence: int) -> bool:
        """Whether all rows are NaN, whatever they see: of a sequence that is too long. Of one with too many tokens, a
        rank has NaN only for the columns that are its own."""
        return self.refused[sequence] if self.share[1] == 1 else self.new(sequence) > self.max_q

    def slots(self, total_q: int) -> list[int]:
        """Where each new token goes; −1 is nowhere."""
        slots = [-1] * total_q
        for b, ids in enumerate(self.blocks):
            for i in range(self.new(b)):
                position = self.lens_k[b] - self.new(b) + i
                if position >= 0 and ids[position // self.page] >= 0:
                    slots[self.used_q[b] + i] = ids[position // self.page] * self.page + position % self.page
        return slots


@dataclass
class Prefix:
    """A batch as it is given.

    Attributes:
        sick: whether its contents are wrong somewhere.
        colliding: whether two new tokens may have one slot.
        share: rank and ranks where pages are distributed, or None.
    """

    table: list[list[int]]
    columns: int
    cu_q: list[int]
    cu_k: list[int]
    numbers: dict[str, int | None]
    known: tuple[list[int], list[int]] | None
    sick: bool
    colliding: bool
    share: tuple[int, int] | None

    def checked(self, of: Sizes) -> Checked:
        n, known = self.numbers, self.known or (None, None)
        total_q = n["total_q"] if n["total_q"] is not None else self.cu_q[-1]
        total_k = n["total_k"] if n["total_k"] is not None else self.cu_k[-1]
        return Checked.of(self.table, self.columns, self.cu_q, self.cu_k, of.page, of.blocks, total_q, total_k,
                          n["max_q"], n["max_k"], *known, self.share or (0, 1))  # fmt: skip

    @property
    def total_q(self) -> int:
        return self.numbers["total_q"] if self.numbers["total_q"] is not None else self.cu_q[-1]


def prefix(draw: Draw, of: Sizes, most_new: int = 4, most_cached: int = 14, sick: float = 0.25) -> Prefix:
    """A batch; `of.blocks` becomes as many blocks as it takes, and some."""
    sequences = draw.choice([0, 1, 1, 2, 2, 3])
    lens_q = [draw.choice([0, 1, 1, draw.randint(0, most_new)]) for _ in range(sequences)]
    lens_k = [new + draw.choice([0, 1, draw.randint(0, most_cached)]) for new in lens_q]
    needed = [-(-tokens // of.page) for tokens in lens_k]
    of.blocks = sum(needed) + draw.choice([0, 1, 2])
    ids = draw.sample(range(of.blocks), of.blocks)
    columns = max(needed, default=0) + draw.choice([0, 0, 1, 2])
    table = []
    for count in needed:
        row, ids = ids[:count], ids[count:]
        table.append(row + [draw.choice([-1, 0, of.blocks, MOST, -(2**31)]) for _ in range(columns - count)])
    cu_q, cu_k = ([sum(lens[:b]) for b in range(sequences + 1)] for lens in (lens_q, lens_k))
    share = None
    if draw.chance(0.3):
        ranks = draw.choice([1, 2, 2, 3, 5])
        share = draw.randrange(ranks), ranks
        _other_pools(draw, table, share, of)
    is_sick, colliding = draw.chance(sick), False
    if is_sick:
        for _ in range(draw.randint(1, 2)):
            colliding |= _spoil(draw, table, cu_q, cu_k, of)
        cu_q, cu_k = ([max(min(n, MOST), -MOST - 1) for n in cu] for cu in (cu_q, cu_k))
    total_q, total_k = (max(0, min(cu[-1], 60)) if is_sick else cu[-1] for cu in (cu_q, cu_k))
    spare = [None if not is_sick else 0, 0, 0, draw.randint(1, 3)]
    numbers: dict[str, int | None] = {}
    for name, total in (("total_q", total_q), ("total_k", total_k)):
        more = draw.choice(spare)
        numbers[name] = None if more is None else max(0, total + more - (draw.chance(0.3) and is_sick))
    known = (lens_q, lens_k) if not is_sick and draw.chance(0.5) else None
    longest_q, longest_k = max(lens_q, default=0), max(lens_k, default=0)
    less = 0 if known else draw.choice([0, 0, 0, 1, 2])
    numbers["max_q"] = draw.choice([None, None, max(0, longest_q - less), longest_q + 2])
    numbers["max_k"] = draw.choice([None, None, max(0, longest_k - less), longest_k + 5])
    return Prefix(table, columns, cu_q, cu_k, numbers, known, is_sick, colliding, share)


def _other_pools(draw: Draw, table: list[list[int]], share: tuple[int, int], of: Sizes) -> None:
    """Other ranks' columns have block ids of other pools, which may be larger than this one."""
    rank, ranks = share
    for row in table:
        for column in range(len(row)):
            if column % ranks != rank:
                row[column] = draw.choice([row[column], draw.randint(0, of.blocks + 9), -1])


def _spoil(draw: Draw, table: list[list[int]], cu_q: list[int], cu_k: list[int], of: Sizes) -> bool:
    """Make a number wrong; returns whether two sequences may write to one slot now."""
    what = draw.randrange(4)
    if what == 0 and table and table[0]:
        row = draw.choice(table)
        row[draw.randrange(len(row))] = draw.choice([-1, of.blocks, of.blocks + 3, *WIDE["int32"]])
    elif what == 1:
        at = draw.randrange(len(cu_q))
        cu_q[at] = draw.choice([cu_q[at] - 1, cu_q[at] + 2, -1, 0, 9, *WIDE["int32"]])
    elif what == 2:
        at = draw.randrange(len(cu_k))
        cu_k[at] = draw.choice([cu_k[at] - 1, cu_k[at] + 2, -1, 0, 40, *WIDE["int32"]])
    elif what == 3 and len(table) > 1 and table[0]:
        table[1][draw.randrange(len(table[1]))] = table[0][draw.randrange(len(table[0]))]
    return True


BATCH = ("block_table", "cu_seqlens_q", "cu_seqlens_k")
NUMBERS = ("total_q", "total_k", "max_q", "max_k")


def batch_lines(draw: Draw, given: Prefix) -> list[str]:
    """Lines that make the tensors of a batch."""
    like = draw.one("int32", "int64")
    table = forms.whole_numbers(draw, given.table, like, given.columns or 1)
    if not given.table and not given.columns:
        table = f"torch.zeros(0, 0, dtype=torch.{like})"
    codes = (table, *(forms.whole_numbers(draw, cu, draw.one("int32", "int64")) for cu in (given.cu_q, given.cu_k)))
    return [f"{name} = {code}" for name, code in zip(BATCH, codes, strict=True)]


def batch_args(build: Builder, given: Prefix, of: Sizes) -> None:
    """The arguments of `PrefixBatch.build`."""
    draw, lengths = build.draw, ("seqlens_q", "seqlens_k")
    for name in BATCH:
        wrong = index_forms(name, 2 if name == "block_table" else 1, (*BATCH, *lengths))
        build.arg(name, name, wrong, bad(f"{name}.flatten()" if name == "block_table" else f"{name}[:-1]", names=BATCH))
    near = (*lengths, *NUMBERS)
    build.arg("page_size", str(of.page), forms.integer(1), forms.same_integer(of.page))
    build.arg("num_blocks", str(of.blocks), forms.integer(), forms.same_integer(of.blocks))
    for name in NUMBERS:
        number = given.numbers[name]
        wrong = forms.integer(names=near)[1:]  # None is one of its forms
        same = forms.same_integer(number) if number is not None else []
        same += large("2**31 - 1") if name == "total_q" else []  # 16 GiB of slots
        build.arg(name, str(number), wrong, same, leave_out=0.5 if number is None else 0)
    for at, name in enumerate(lengths):
        lens = given.known[at] if given.known else None
        count = len(given.table)
        wrong = bad("3", "'x'", "object()", "torch.zeros(3)", "{1: 2}", "iter([1])", f"{[1] * (count + 1)}",
                    f"{[-1] * max(1, count)}", f"[True] * {max(1, count)}", f"[1.5] * {max(1, count)}",
                    f"[None] * {max(1, count)}", f"[2**31] * {max(1, count)}", f"b'x' * {count}", f"'1' * {count}",
                    f"torch.ones({count}, dtype=torch.int32)", f"[10**5000] * {max(1, count)}", names=near)  # fmt: skip
        same: list[Form] = [] if lens is None else good(f"tuple({lens})", f"[np.int64(n) for n in {lens}]")
        build.arg(name, str(lens), wrong, same, leave_out=0.5 if lens is None else 0)
    windows = draw.one("()", "(3,)", "[1, 2]", "{4}", "iter([2])", "range(1, 3)", "np.array([2, 3])", "(100,)")
    wrong = bad("None", "3", "'12'", "[0]", "[-1]", "[True]", "[None]", "torch.tensor([2])", "[1.5]", "['2']",
                "[2**31]",
                "object()", "b'x'", "[[1]]", "[10**5000]", "[float('nan')]", "(1, 0)")  # fmt: skip
    build.arg("windows", windows, wrong, leave_out=0.5)
    wrong = bad("(0, 2)", "3", "'x'", "[0, 1]", "object()", "Share", "torch.zeros(2)", "Share(2, 2)", "Share(0, 0)",
                "Share(-1, 2)", "Share(0, -1)", "Share(0.0, 2)", "Share(False, 2)", "Share('0', 1)", "Share(0, None)",
                "Share(0, 2**31)", "Share(10**5000, 2)", "Share(torch.tensor(0), 2)")  # fmt: skip
    same = [] if given.share is None else good("Share(np.int64({}), np.array({}))".format(*given.share))
    build.arg("share", share_code(given), wrong, same, leave_out=0.5 if given.share is None else 0)


def share_code(given: Prefix) -> str:
    return "None" if given.share is None else "Share({}, {})".format(*given.share)


def build_call(given: Prefix, of: Sizes) -> str:
    """Code that builds the batch."""
    numbers = "".join(f", {name}={number}" for name, number in given.numbers.items() if number is not None)
    lens = f", seqlens_q={given.known[0]}, seqlens_k={given.known[1]}" if given.known else ""
    sizes = f"page_size={of.page}, num_blocks={of.blocks}"
    share = "" if given.share is None else f", share={share_code(given)}"
    return f"kg.PrefixBatch.build({', '.join(BATCH)}, {sizes}{numbers}{lens}{share})"
