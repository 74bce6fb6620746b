"""The control flow of a kernel as `nvdisasm -c` writes it: blocks of instructions, and which block follows which."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Instruction:
    address: str
    guard: str
    opcode: str
    operands: list[str]


@dataclass
class Block:
    label: str
    code: list[Instruction] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def blocks(sass: str) -> dict[str, Block]:
    """The control flow of a disassembled kernel; the first block is its entry."""
    made = {"entry": Block("entry")}
    current = made["entry"]
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            current = _following(made, current, label[1])
        if not (one := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line)):
            continue
        operands = (
            [operand.strip().removesuffix(".reuse") for operand in re.split(r",(?![^\[]*\])", one[4])]
            if one[4].strip()
            else []
        )
        step = Instruction(one[1], one[2] or "", one[3], operands)
        current.code.append(step)
        target = re.search(r"`\((\.L_\w+)\)", one[4])
        kind = step.opcode.split(".")[0]
        if kind in ("BRA", "EXIT", "RET", "CALL"):
            current.next += [target[1]] if target else []
            always = not step.guard and len(operands) <= 1 and kind != "CALL"
            current = _following(made, current, f"after {one[1]}", always)
    for block in made.values():
        _mark_swaps(block.code)
    return made


def _mark_swaps(code: list[Instruction]) -> None:
    """Three exclusive ors exchange two registers: make the first of them a `SWAP`, and the others nothing."""
    for i in range(len(code) - 2):
        three = code[i : i + 3]
        if any(not re.fullmatch(r"U?LOP3\.LUT", step.opcode) or "0x3c" not in step.operands for step in three):
            continue
        (a, *first), (b, *second), (c, *third) = (step.operands[:3] for step in three)
        if a == c != b and all({a, b} == set(pair) for pair in (first, second, third)):
            three[0].opcode, three[0].operands = "SWAP", [a, b]
            for step in three[1:]:
                step.opcode, step.operands = "NOP", []


def _following(made: dict[str, Block], current: Block, label: str, jumps: bool = False) -> Block:
    if not jumps:
        current.next.append(label)
    made[label] = Block(label)
    return made[label]
