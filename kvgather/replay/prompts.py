"""Prompts as in the replayed run: a long prefix of worked examples that all share, and a question of each."""

from __future__ import annotations

import random

from ..formats.checks import check_int

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Joy", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "eggs", "maps", "nails", "pens", "shells", "stamps", "tickets")


def prompts(count: int, shared: int, own: int, seed: int = 0) -> list[str]:
    """Arithmetic word problems, from a seeded generator.

    Args:
        count: how many prompts.
        shared: characters of the prefix that all prompts begin with: solved problems.
        own: characters of each prompt's question, on average; between three and five quarters of it.
        seed: equal seeds give equal prompts.

    Raises:
        TypeError, ValueError: `count`, `shared` or `own` is negative or no int.
    """
    check_int(count, "count")
    check_int(shared, "shared")
    check_int(own, "own", minimum=1)
    chance = random.Random(seed)
    prefix = ""
    while len(prefix) < shared:
        question, answer = _problem(chance)
        prefix += f"Q: {question}\nA: {answer}\n"
    prefix = prefix[:shared]
    result = []
    for _ in range(count):
        length = chance.randint(own - own // 4, own + own // 4)
        text = f"Q{chance.randint(100, 999)}: "
        while len(text) < length:
            text += _problem(chance)[0] + " "
        result.append(prefix + text[:length])
    return result


def _problem(chance: random.Random) -> tuple[str, int]:
    name, thing = chance.choice(NAMES), chance.choice(THINGS)
    first, second, third = (chance.randint(2, 60) for _ in range(3))
    if chance.random() < 0.5:
        question = f"{name} has {first} {thing}, buys {second} and gets {third} more. How many {thing} are there?"
        return question, first + second + third
    question = f"{name} packs {first} boxes of {second} {thing} and {third} single ones. How many {thing} is that?"
    return question, first * second + third
