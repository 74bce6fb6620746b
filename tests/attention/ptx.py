"""The descriptors that a kernel's PTX asks for, each as "address of the buffer, plus constant"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.attention.words import ADDRESS, ADDRESS_BITS, BASE, BITS32, Multiply


def promised(ptx: str) -> Iterator[Multiply]:
    """The `wgmma` instructions of a PTX text, in its order."""
    registers: dict[str, list[tuple[str, list[str]]]] = {}
    for name, register, rest in re.findall(r"^\s*([a-z][\w.]+)\s+(%\w+),\s*([^;{]+);", ptx, re.M):
        registers.setdefault(register, []).append((name, [part.strip() for part in rest.split(",")]))
    for shape, rest in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\w+)\.\S+ (.*?);", ptx, re.S):
        parts = re.sub(r"\{[^}]*\}", "{}", rest).replace(" ", "").split(",")
        ends = parts.index("p") if "p" in parts else 3
        flags = parts[ends + 3 :]
        names = [part for part in parts[1:ends] if part.startswith("%rd")]
        transposed = bool(flags) and flags[-1] == "1"
        yield Multiply(re.sub(r"[nk]", "x", shape), transposed, tuple(_promise(name, registers) for name in names))


def _promise(name: str, registers: dict[str, list[tuple[str, list[str]]]]) -> tuple[bool, int, int] | None:
    value = _evaluated(name, registers)
    return None if value is None else (value[0], value[1] & BITS32, value[1] >> 32 & BITS32)


def _evaluated(name: str, registers: dict[str, list[tuple[str, list[str]]]], depth: int = 0) -> tuple[bool, int] | None:
    """(Does it contain an address known at run time only, the rest); None: not a sum of that form."""
    if re.fullmatch(r"-?\d+", name):
        return False, int(name)
    if name == "global_smem":
        return False, BASE
    made = registers.get(name, [])
    if len(made) != 1 or depth > 20:
        return None
    opcode, sources = made[0]
    values = [_evaluated(source, registers, depth + 1) for source in sources]
    kind = opcode.split(".")[0]
    if kind == "bfe" and values[1:] in ([(False, 4), (False, bits)] for bits in ADDRESS_BITS):
        return (True, 0) if values[0] is None or values[0][0] else (False, values[0][1] >> 4 & ADDRESS)
    if kind == "and" and values[:1] == [None] and values[1:] in ([(False, 2**bits - 1)] for bits in ADDRESS_BITS):
        return True, 0
    if any(value is None for value in values):
        return None
    known = [value for value in values if value is not None]
    numbers = [number for _, number in known]
    address = any(dynamic for dynamic, _ in known)
    if kind in ("mov", "cvt", "cvta"):
        return known[0]
    if kind in ("add", "or") and not all(dynamic for dynamic, _ in known):
        return address, (numbers[0] + numbers[1] if kind == "add" else numbers[0] | numbers[1]) & 2**64 - 1
    if kind in ("and", "shr") and not address:
        return False, numbers[0] & numbers[1] if kind == "and" else numbers[0] >> numbers[1]
    return None
