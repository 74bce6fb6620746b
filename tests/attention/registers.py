"""The uniform registers of a disassembled kernel, followed through its control flow up to each `wgmma`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from tests.attention.sass import Block, Instruction
from tests.attention.words import ADDRESS, BITS32, UNDEFINED, Multiply, State, Word

NO_REGISTER = ("ISETP", "FSETP", "HSETP", "DSETP", "UISETP", "PLOP3", "UPLOP3", "R2P")
"""Instructions that write predicates alone."""


def run(flow: dict[str, Block]) -> tuple[dict[str, Multiply], list[str]]:
    """Follow the uniform registers until nothing changes.

    Returns:
        The tensor cores' instructions by address, and a line for each register read that was never written.
    """
    before: dict[str, State] = {next(iter(flow)): {}}
    found: dict[str, Multiply] = {}
    unwritten: dict[str, str] = {}
    todo = [next(iter(flow))]
    while todo:
        block = flow[todo.pop()]
        state = dict(before[block.label])
        for step in block.code:
            _step(step, state, found, unwritten)
        for label in block.next:
            if label not in flow:
                continue
            joined = _joined(before[label], state, label) if label in before else dict(state)
            if joined != before.get(label):
                before[label] = joined
                todo.append(label)
    return dict(sorted(found.items(), key=lambda one: int(one[0], 16))), list(unwritten.values())


def _joined(a: State, b: State, label: str) -> State:
    """The state after two paths meet; of thread registers and the stack only what both know is kept."""
    names = {name for name in {*a, *b} if name.startswith("U") or (name in a and name in b)}
    return {name: _either(a.get(name, UNDEFINED), b.get(name, UNDEFINED), f"{name} at {label}") for name in names}


def _either(a: Word, b: Word, root: str) -> Word:
    if a == b:
        return a
    if UNDEFINED in (a, b) or not (a.defined and b.defined):
        return Word(root="written on some paths only", defined=False)
    return Word(0, root, all(word.small and word.offset == 0 for word in (a, b)))


def _step(step: Instruction, state: State, found: dict[str, Multiply], unwritten: dict[str, str]) -> None:
    if step.guard in ("!UPT", "!PT"):
        return
    if step.opcode.startswith("HGMMA"):
        found[step.address] = _multiply(step, state)
    if step.opcode == "SWAP":
        a, b = step.operands
        state[a], state[b] = _value(b, state), _value(a, state)
        return
    if local := re.fullmatch(r"(STL|LDL)(\.\w+)*", step.opcode):
        _spill(step, state, local[1] == "STL")
        return
    operands = list(step.operands)
    while operands and re.fullmatch(r"U?P(\d|T)", operands[0]):  # predicates that are written, before the register
        name = operands.pop(0)
        state[name] = Word(0, f"{name} of {step.address}")
    written = operands[0] if operands and re.fullmatch(r"U?R\d+", operands[0]) else ""
    written = "" if step.opcode.startswith(NO_REGISTER) else written
    sources = operands[1:] if written else operands
    for name in re.findall(r"\bUR\d+", " ".join(sources)):
        if not step.opcode.startswith("HGMMA") and state.get(name, UNDEFINED) == UNDEFINED:
            unwritten[step.address] = f"{step.address}: {step.opcode} reads {name}, which was never written"
    if not written:
        return
    old = dict(state)
    _write(replace(step, operands=operands), state)
    if step.guard:
        for name in [name for name in state if state[name] != old.get(name)]:
            state[name] = _either(_value(name, old), state[name], f"{name} after {step.address}")


def _spill(step: Instruction, state: State, stores: bool) -> None:
    """Follow thread registers into the thread's stack and back, by the distance from the stack pointer."""
    flags = step.opcode.split(".")
    register, place = step.operands[::-1] if stores else step.operands
    at = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", place)
    for i in range(_width("", flags)):
        thread = "RZ" if register == "RZ" else f"R{int(register[1:]) + i}"
        stack = f"L{int(at[1] or '0', 16) + 4 * i}" if at else f"L{place}+{i}"
        source, target = (thread, stack) if stores else (stack, thread)
        if not step.guard and (source in state or source == "RZ"):
            state[target] = _value(source, state)
        else:
            state.pop(target, None)


def _multiply(step: Instruction, state: State) -> Multiply:
    at = next(i for i, operand in enumerate(step.operands) if operand.startswith("gdesc["))
    first = int(re.findall(r"UR(\d+)", step.operands[at])[0])
    both = at == 1  # A is in shared memory too
    pairs = [(state.get(f"UR{i}", UNDEFINED), state.get(f"UR{i + 1}", UNDEFINED)) for i in (first, first + 2)]
    shape = step.opcode.split(".")[1]
    return Multiply(
        shape, "tnspB" in step.operands[at], tuple(_descriptor(*pair) for pair in pairs[0 if both else 1 :])
    )


def _descriptor(low: Word, high: Word) -> tuple[bool, int, int] | None:
    if high.number is None or not low.defined or (low.root and not low.small):
        return None
    return bool(low.root), low.offset, high.number


def _write(step: Instruction, state: State) -> None:
    """The effect of one instruction that writes a register; what is not understood becomes unknown.

    Thread registers count because uniform ones are saved in them. Their instructions are the uniform ones without U.
    """
    target, *operands = step.operands
    kind, *flags = step.opcode.split(".")
    kind = kind if kind in ("S2UR", "R2UR", "UMOV") else kind.removeprefix("U")
    carries = [operand for operand in operands if re.fullmatch(r"!?U?P(\d|T)", operand)]
    plain = [operand for operand in operands if operand not in carries]
    number, name = int(target.lstrip("UR")), target.rstrip("0123456789")
    unknown = Word(0, f"{target} of {step.address}")
    values, inputs = [_value(operand, state) for operand in plain], [_value(operand, state) for operand in carries[-2:]]
    both = _sum64(plain, state, unknown) if kind == "IADD3" and "64" in flags else None
    for i in range(_width(kind, flags)):
        if name == "R":
            state.pop(f"R{number + i}", None)
        else:
            state[f"UR{number + i}"] = Word(0, f"UR{number + i} of {step.address}")
    if both:
        state[f"{name}{number}"], state[f"{name}{number + 1}"] = both
        return
    carry: int | None = None
    result = _result(kind, flags, values, plain, unknown)
    if kind == "IMAD" and plain[1:2] in (["RZ"], ["0x1"]) and flags in (["X"], ["IADD"]):
        values = [values[0], values[2]] if plain[1] == "0x1" else values[2:]
        kind = "IADD3"
    if kind in ("IADD3", "VIADD"):
        result, carry = _sum([*values, *(inputs if "X" in flags else [])], unknown)
    for operand in carries:
        if operands.index(operand) < 2 and re.fullmatch(r"U?P\d", operand):
            state[operand] = Word(0, f"{operand} of {step.address}") if carry is None else Word(carry)
    if name == "UR" or result != unknown:
        state[target] = result


def _width(kind: str, flags: list[str]) -> int:
    """How many registers an instruction writes; where that is uncertain, rather too many."""
    if kind == "HGMMA":
        return int(flags[0].split("x")[1]) // 2
    if kind == "LDSM":
        return int(flags[-1]) if flags[-1].isdigit() else 1
    if "128" in flags or kind == "HMMA":
        return 4
    return 2 if {"64", "WIDE"} & set(flags) else 1


def _result(kind: str, flags: list[str], values: list[Word], operands: list[str], unknown: Word) -> Word:
    if kind in ("S2UR", "S2R"):
        return Word(0) if operands[0] == "SR_CgaCtaId" else unknown  # no clusters here
    known_kinds = ("R2UR", "UMOV", "MOV", "SGXT", "LOP3", "LEA", "SHF")
    moves = kind == "IMAD" and flags in (["U32"], ["MOV", "U32"]) and operands[:2] == ["RZ", "RZ"]
    if not values or (kind not in known_kinds and not moves):
        return unknown
    if any(not value.defined for value in values):
        return Word(root="made of a register that was never written", defined=False)
    numbers = [value.number for value in values]
    if kind in ("UMOV", "MOV", "R2UR") or moves:
        return values[-1 if moves else 0]
    if kind == "SGXT" and "U32" in flags and numbers[1] is not None:
        return values[0].masked(numbers[1], unknown.root)
    if kind == "LOP3":
        return _logic(values, operands, unknown)
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return unknown
    if kind == "LEA" and not flags:
        return Word((known[0] << known[2]) + known[1] & BITS32)
    if kind == "SHF" and flags[:2] == ["R", "U32"] and known[0] == 0:
        return Word(known[2] >> known[1])
    if kind == "SHF" and flags[:2] == ["L", "U32"] and known[2] == 0:
        return Word(known[0] << known[1] & BITS32)
    return unknown


def _logic(values: list[Word], operands: list[str], unknown: Word) -> Word:
    """`LOP3.LUT`: any function of three bits, by its truth table."""
    table = values[3].number
    if table is None:
        return unknown
    *sources, _ = values[:4]
    numbers = [source.number for source in sources]
    if None not in numbers:
        a, b, c = (number or 0 for number in numbers)
        total = 0
        for bits in range(8):
            if table >> bits & 1:
                total |= (a if bits & 4 else ~a) & (b if bits & 2 else ~b) & (c if bits & 1 else ~c)
        return Word(total & BITS32)
    if table == 0xC0 and 1 in [value.number is None for value in sources[:2]]:
        mask = next((number for number in numbers[:2] if number is not None), None)
        if mask is not None and mask <= ADDRESS:
            return Word(0, unknown.root, True)
    if table == 0xFC:
        one = next(source for source in sources if source.number is None)
        rest = next((number for number in numbers[:2] if number is not None), None)
        if one.small and rest is not None and not (rest | one.offset) & ADDRESS:
            return Word(one.offset | rest, one.root, True)
    return unknown


def _value(operand: str, state: State) -> Word:
    sign, name = (operand[0], operand[1:]) if operand[0] in "-!" else ("", operand)
    if name in ("URZ", "RZ"):
        return Word(0)
    if name in ("UPT", "PT"):
        return Word(0 if sign == "!" else 1)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return Word(int(operand, 0) & BITS32)
    word = state.get(name, UNDEFINED) if re.fullmatch(r"UR\d+|UP\d", name) else state.get(name, Word(0, name))
    if not sign:
        return word
    known = word.number
    if known is None:
        return Word(0, f"{sign}{word.root}", False, word.defined)
    return Word(1 - known if sign == "!" else 2**32 - known)  # 2**32 itself carries, as ~0 + 1 does


def _sum(values: Iterable[Word], unknown: Word) -> tuple[Word, int | None]:
    terms = list(values)
    if any(not term.defined for term in terms):
        return Word(root="made of a register that was never written", defined=False), None
    roots = [term for term in terms if term.root]
    if len(roots) > 1:
        return unknown, None
    return (roots[0] if roots else Word(0)).plus(sum(term.offset for term in terms if not term.root))


def _sum64(operands: list[str], state: State, unknown: Word) -> tuple[Word, Word]:
    total, roots, fine = 0, [], True
    for operand in operands:
        sign, name = ("-", operand[1:]) if operand.startswith("-UR") else ("", operand)
        low, high = _value(name, state), Word(0)
        if name.startswith("UR") and name != "URZ":
            high = state.get(f"UR{int(name[2:]) + 1}", UNDEFINED)
        elif low.offset >> 31:
            high = Word(BITS32)
        if not (low.defined and high.defined):
            return (Word(root="made of a register that was never written", defined=False),) * 2
        fine &= high.number is not None and (not low.root or (low.small and not sign))
        roots += [low] if low.root else []
        total += (low.offset + (high.offset << 32)) * (-1 if sign else 1)
    total %= 2**64
    if not fine or len(roots) > 1 or (roots and (total & BITS32) + ADDRESS > BITS32):
        return unknown, Word(0, f"high half, {unknown.root}")
    root = roots[0] if roots else Word(0)
    return Word(total & BITS32, root.root, root.small), Word(total >> 32)
