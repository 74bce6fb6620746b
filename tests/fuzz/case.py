"""A fuzzed call as Python source: what builds its arguments, the call itself, and what has to come of it.

A call is text, so that the one that runs and the one that is printed are the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.fuzz.junk import EVERYWHERE
from tests.fuzz.preamble import SURROUNDINGS

Value = TypeVar("Value")

GOOD, EITHER, BAD = "good", "either", "bad"
"""What has to come of an argument: the right result; that or an error of ours; an error of ours."""


class Wrong(Exception):
    """A call gave what it should not; the message says what."""


class Draw(random.Random):
    """The choices of one call: the same for a seed and a number, whatever was drawn for others."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(f"{seed}:{number}")

    def chance(self, share: float) -> bool:
        return self.random() < share

    def one(self, *options: Value) -> Value:
        return options[self.randrange(len(options))]

    def number(self) -> int:
        """A seed for the contents of a tensor."""
        return self.randrange(1000)


@dataclass(frozen=True)
class Form:
    """One way to give an argument.

    Attributes:
        code: an expression.
        verdict: what has to come of it.
        names: arguments that an error may name beside this one.
        large: whether it requests so much memory that there is too little.
    """

    code: str
    verdict: str = GOOD
    names: tuple[str, ...] = ()
    large: bool = False


def bad(*codes: str, names: tuple[str, ...] = ()) -> list[Form]:
    return [Form(code, BAD, names) for code in codes]


def either(*codes: str, names: tuple[str, ...] = ()) -> list[Form]:
    return [Form(code, EITHER, names) for code in codes]


def large(*codes: str) -> list[Form]:
    return [Form(code, EITHER, large=True) for code in codes]


def good(*codes: str) -> list[Form]:
    return [Form(code) for code in codes]


@dataclass
class Facts:
    """What a check of a result sees.

    Attributes:
        args: the arguments by name, as they are after the call.
        scope: the names that the lines before the call made.
        before: a tensor's elements as they were before the call.
    """

    args: dict[str, Any]
    scope: dict[str, Any]
    before: Callable[[Any], Any]


Check = Callable[[Facts, Any], None]
"""Raises `Wrong` where a result is not right."""


@dataclass
class Case:
    """A call.

    Attributes:
        function: its name in the table.
        lines: statements before it.
        callee: an expression of what is called.
        args: an expression for each argument that is given.
        verdict: GOOD, EITHER or BAD.
        names: what an error has to name, one of them; empty where none may come.
        check: of its result.
        writes: expressions of the tensors whose elements it may change; of the arguments, or of the scope.
        large: whether so much memory is requested that there may be too little.
        surroundings: an expression of what it is made in, or nothing.
        after_refusal: raises `Wrong` where a refused call changed something, seen in the scope.
    """

    function: str
    lines: list[str]
    callee: str
    args: dict[str, str]
    verdict: str
    names: frozenset[str]
    check: Check
    writes: tuple[str, ...] = ()
    large: bool = False
    surroundings: str = ""
    after_refusal: Callable[[dict[str, Any]], None] | None = None

    @property
    def call(self) -> str:
        return f"{self.callee}({', '.join(f'{name}={code}' for name, code in self.args.items())})"


@dataclass
class Builder:
    """Puts a call together: every argument in a good form, then some of them in another."""

    draw: Draw
    function: str
    callee: str
    lines: list[str] = field(default_factory=list)
    args: dict[str, str] = field(default_factory=dict)
    forms: dict[str, list[Form]] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)  # lines after the good call that may come first
    warm: float = 0.3  # how often it does
    spoils: Sequence[float] = (0.45, 0.43, 0.12)  # how often no argument, one, and two take another form

    def line(self, text: str) -> None:
        self.lines.append(text)

    def arg(self, name: str, code: str, *forms: list[Form], leave_out: float = 0.0) -> None:
        """An argument, its good form, and others; left out at times, where it has a default that is as good."""
        if not (leave_out and self.draw.chance(leave_out)):
            self.args[name] = code
        self.forms[name] = [form for group in forms for form in group]

    def by_kernel(self, share: float = 0.12) -> None:
        """Make the call at times as a GPU does, by kernels where a CPU takes plain torch."""
        if self.draw.chance(share):
            self.callee = f"functools.partial(by_kernel, {self.callee})"
            self.function, self.warm = f"{self.function} (as on a GPU)", 0.6

    def trace(self, share: float = 0.3) -> None:
        """Make the call of a kernel inside `trace` at times, which finds accesses outside of tensors."""
        if self.draw.chance(share):
            self.callee = f"functools.partial(traced, {self.callee}, {self.draw.one(True, False)})"
            self.function = f"trace of {self.function.split(' ')[0]}"

    def finish(
        self, check: Check, writes: tuple[str, ...] = (), verdict: str = GOOD, names: tuple[str, ...] = ()
    ) -> Case:
        """The case.

        Args:
            verdict, names: of the call in its good forms, where an error may come all the same.
        """
        draw, args, blamed, verdicts, large = self.draw, dict(self.args), set(names), {verdict}, False
        if (verdict == GOOD or self.late) and draw.chance(self.warm):
            self.lines.append(f"{self.callee}({', '.join(f'{name}={code}' for name, code in args.items())})")
        self.lines += self.late
        able = [name for name, forms in self.forms.items() if forms]
        count = draw.choices(range(len(self.spoils)), self.spoils)[0]
        for name in draw.sample(able, min(count, len(able))):
            rarer = [form for form in self.forms[name] if form.code not in EVERYWHERE]
            form = draw.choice(rarer if rarer and draw.chance(0.6) else self.forms[name])
            args[name] = form.code
            verdicts.add(form.verdict)
            large |= form.large
            if form.verdict != GOOD:
                blamed |= {name, *form.names}
        worst = BAD if BAD in verdicts else EITHER if EITHER in verdicts else GOOD
        return Case(
            self.function, self.lines, self.callee, args, worst, frozenset(blamed), check, writes, large,
            draw.choice(SURROUNDINGS) if draw.chance(0.06) else "",
        )  # fmt: skip
