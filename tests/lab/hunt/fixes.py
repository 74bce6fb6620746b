"""Fixes of the ten bugs, right and wrong, as changes of the skeleton: the cell of chapter 11 that a reader edits.

A fix is a list of (old text, new text); the wrong ones have a part of what the check must say to them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from kvgather.lab.hunt import BUGS, Bug

Change = Sequence[tuple[str, str]]
PLACE = "argument, line, program = ..., ..., ..."


def skeleton(bug: Bug) -> str:
    """The cell that a reader starts from: three open answers, and the code of the package without its docstring."""
    parts = [PLACE, *(textwrap.dedent(inspect.getsource(kernel.fn)).rstrip() for kernel in bug.functions)]
    if bug.name in WITH_LAUNCHER:
        source = inspect.getsource(getattr(bug.module, bug.launcher))
        head, body = source.split('"""', 2)[0], source.split('"""', 2)[2]
        names = re.findall(r"(\w+): ", head.split("(", 1)[1])[: -len(bug.kernels)]
        body = body.strip("\n").replace("kernel[", f"{bug.kernels[0]}[")
        parts.append(f"def {bug.launcher}({', '.join(names)}):\n{body}")
        parts.append(f"fixed = {bug.launcher}")
    else:
        parts.append(f"fixed = {', '.join(bug.kernels)}  # or a launcher with the arguments of {bug.launcher}")
    return "\n\n\n".join(parts) + "\n"


def changed(text: str, change: Change) -> str:
    for old, new in change:
        assert old in text, (old, text)
        text = text.replace(old, new)
    return text


def answered(bug: Bug, change: Change = ()) -> str:
    """The skeleton with right answers to the three questions, and a changed kernel."""
    place = f"argument, line, program = {bug.arguments[0]!r}, {bug.lines[0]!r}, {bug.programs[0]}"
    return changed(skeleton(bug), change).replace(PLACE, place)


WITH_LAUNCHER = ("pages",)
"""Bugs whose fix needs the launcher, so that their skeletons have it."""

FIRST = "position = tl.load(positions_ptr + token)"
ROWS = "row = block * stride_block + token % PAGE * DIM"
SCALE = "scale = tl.load(scale_ptr + row)"
SLOT = "    slot = tl.where(slot < 0, num_slots - 1, slot)\n"
STORE = "tl.store(pool_ptr + slot * DIM + dim, row)"
LEFT = "first = tl.maximum(length - left, 0)"
EXP = "a_weight, b_weight = tl.exp(a_sum - top), tl.exp(b_sum - top)"
LOG = "top + tl.log2(total)"
V = "v = tl.load(v_ptr + at)"
K = "k = tl.load(k_ptr + at)"
NORMAL, SMALL, NAN = "- 7)", "mantissa / 64", "(code & 127) == 127"
BLOCK = "block = tl.load(table_ptr + request * width + column)"
K_ROW = "k = tl.load(k_ptr + slot * DIM + dim)"
FIRST_ROW = "first = block * PAGE * stride_k_slot"
PAGES_LAUNCH = "k.stride(1), PAGE"

RIGHT: dict[str, dict[str, Change]] = {
    "slots": {
        "the mask": [(FIRST, "position = tl.load(positions_ptr + token, mask=inside, other=0)")],
        "clamped to n - 1": [(FIRST, "position = tl.load(positions_ptr + tl.minimum(token, n - 1))")],
    },
    "pages": {
        "the block stride": [
            ("stride_k_slot, PAGE: tl", "stride_k_block, stride_k_slot, PAGE: tl"),
            (FIRST_ROW, "first = block * stride_k_block"),
            (PAGES_LAUNCH, "k.stride(0), k.stride(1), PAGE"),
        ],
        "the distance of two blocks in rows": [
            ("stride_k_slot, PAGE: tl", "stride_k_slot, ratio, PAGE: tl"),
            (FIRST_ROW, "first = block * ratio * stride_k_slot"),
            (PAGES_LAUNCH, "k.stride(1), k.stride(0) // k.stride(1), PAGE"),
        ],
    },
    "chunk": {
        "both loads masked": [
            (BLOCK, "block = tl.load(table_ptr + request * width + column, mask=column < width, other=0)"),
            (K_ROW, "k = tl.load(k_ptr + slot * DIM + dim, mask=column < width, other=0.0)"),
        ],
        "a clamped column, and zero": [
            (BLOCK, "block = tl.load(table_ptr + request * width + tl.minimum(column, width - 1))"),
            ("+ dim, k)", "+ dim, tl.where(column < width, k, 0.0))"),
        ],
    },
    "window": {
        "one less before the clamp": [(LEFT, "first = tl.maximum(length - 1 - left, 0)")],
        "a longer window": [(LEFT, "left = left + 1\n    first = tl.where(length > left, length - left, 0)")],
    },
    "merge": {
        "exp2 in the merge": [(EXP, EXP.replace("tl.exp(", "tl.exp2("))],
        "natural sums": [(LOG, "(top + tl.log2(total)) * 0.6931471805599453")],
        "ln 2 where the sums are read": [
            (
                EXP,
                EXP.replace("top)", "top) * 1.0")
                .replace("tl.exp(a_sum - top) * 1.0", "tl.exp((a_sum - top) * 0.6931471805599453)")
                .replace("tl.exp(b_sum - top) * 1.0", "tl.exp((b_sum - top) * 0.6931471805599453)"),
            )
        ],
    },
    "decode": {
        "V masked": [(V, "v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)")],
        "K and V masked": [
            (K, "k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)"),
            (V, "v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)"),
        ],
        "V replaced after its load": [(V, "v = tl.where(inside[:, None], tl.load(v_ptr + at), 0.0)")],
    },
    "rows": {
        "int64 before": [(ROWS, "row = block.to(tl.int64) * stride_block + token % PAGE * DIM")],
        "int64 ids": [("other=0)\n    row", "other=0).to(tl.int64)\n    row")],
    },
    "scales": {
        "its own order": [(SCALE, "scale = tl.load(scale_ptr + (block * HEADS + head) * PAGE + page_offset)")],
        "from the first of the block": [
            (SCALE, "scale = tl.load(scale_ptr + block * HEADS * PAGE + head * PAGE + page_offset)")
        ],
    },
    "codes": {
        "the other format": [(NORMAL, "- 8)"), (SMALL, "mantissa / 128"), (NAN, "code == 128")],
        "half of it": [
            ("value = sign *", "value = sign * 0.5 *"),
            (NAN, "code == 128"),
        ],
    },
    "write": {
        "a mask": [(SLOT, ""), (STORE, "tl.store(pool_ptr + slot * DIM + dim, row, mask=slot >= 0)")],
        "a branch": [(SLOT, ""), (STORE, "if slot >= 0:\n        " + STORE)],
    },
}

WRONG: dict[str, dict[str, tuple[Change, str]]] = {
    "slots": {
        "the index clamped to n": (
            [(FIRST, "position = tl.load(positions_ptr + tl.minimum(token, n))")],
            "n = 21: ",
        ),
        "no store for the tail": (
            [(FIRST, "position = tl.load(positions_ptr + token, mask=token + 8 < n, other=0)")],
            "slots[",
        ),
    },
    "pages": {
        "a factor of 2": (
            [(FIRST_ROW, "first = block * PAGE * stride_k_slot * 2")],
            "table = [5, 0, 3], planes = 1: ",
        ),
        "contiguous": ([("dim = k.shape", "dim = k.shape\n    k = k.contiguous()")], "got a copy of k"),
    },
    "chunk": {
        "the column clamped": (
            [(BLOCK, "block = tl.load(table_ptr + request * width + tl.minimum(column, width - 1))")],
            "out[4, 0]: expected 0, got",
        ),
        "the table alone": (
            [(BLOCK, "block = tl.load(table_ptr + request * width + column, mask=column < width, other=0)")],
            "out[4, 0]: expected 0, got",
        ),
        "no store": (
            [
                (
                    "if first + token < end:",
                    "if (first + token < end) & (tl.load(starts_ptr + request) + token < width * PAGE):",
                )
            ],
            "out[4, 0]: expected 0, got nan",
        ),
    },
    "window": {
        "no clamp": ([(LEFT, "first = length - 1 - left")], "lengths = [12, 3, 8]: "),
        "after the clamp": (
            [(LEFT, "first = tl.maximum(length - left, 0) - 1")],
            "out[1, 0]: expected 0.333333, got 0.25",
        ),
    },
    "merge": {
        "a sum in two units": ([(LOG, "top + tl.log(total)")], "out[0, 0]: expected"),
        "twice": ([(EXP, EXP.replace("tl.exp(", "tl.exp2(")), (LOG, "top + tl.log(total)")], "out[0, 0]: expected"),
    },
    "decode": {
        "K alone": ([(K, "k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)")], "out[1, 0]: expected"),
        "NaN in the output": (
            [("dim, values / total)", "dim, tl.where(values == values, values / total, 0.0))")],
            "out[1, 0]: expected 0.243568, got 0",
        ),
    },
    "rows": {
        "cast after": (
            [(ROWS, "row = (block * stride_block).to(tl.int64) + token % PAGE * DIM")],
            "load pool_ptr, elements",
        ),
        "cast the program": (
            [("tl.program_id(0) * BLOCK", "tl.program_id(0).to(tl.int64) * BLOCK")],
            "load pool_ptr, elements",
        ),
    },
    "scales": {
        "half a swap": (
            [(SCALE, "scale = tl.load(scale_ptr + (block * HEADS + page_offset) * PAGE + head)")],
            "table = [4, 1, 3]: ",
        ),
        "all zero": (
            [(SCALE, "scale = tl.load(scale_ptr + page_offset)")],
            "table = [4, 1, 3]: out[0, 0, 0]: expected",
        ),
    },
    "codes": {
        "the scale halved": ([("tl.load(scale_ptr)", "tl.load(scale_ptr) / 2")], "codes = all, scale = 1.0: out[127]"),
        "the bias of normals": ([(NORMAL, "- 8)")], "expected"),
        "NaN forgotten": ([(NORMAL, "- 8)"), (SMALL, "mantissa / 128")], "codes = all, scale = 1.0: out[127]"),
    },
    "write": {
        "to slot 0": ([("num_slots - 1, slot)", "0, slot)")], "pool[0, 0]: expected 0, got 0.25"),
        "no mapping": ([(SLOT, "")], "store pool_ptr, elements"),
        "the rows are zero": ([("dim, row)", "dim, tl.where(slot < 0, 0.0, row))")], "pool[15, 0]: expected"),
    },
}

LAUNCHERS: dict[str, dict[str, tuple[str, str]]] = {
    "slots": {
        "positions padded": (
            "def launch(slots, positions, table, page_size):\n"
            "    n = len(positions)\n"
            "    more = torch.cat([positions, positions.new_zeros(-n % 8)])\n"
            "    slots_kernel[(triton.cdiv(n, 8),)](slots, more, table, n, PAGE=page_size, BLOCK=8)\n",
            "",
        ),
    },
    "decode": {
        "a clean copy": (
            "def launch(out, q, k, v, table, lengths):\n"
            "    args = out, q, k, torch.nan_to_num(v, 0, 0, 0), table, lengths, table.shape[1]\n"
            "    decode_kernel[(len(q),)](*args, PAGE=k.shape[1], DIM=k.shape[2])\n",
            "got a copy of v",
        ),
        "the pool cleared": (
            "def launch(out, q, k, v, table, lengths):\n"
            "    v.nan_to_num_(0, 0, 0)\n"
            "    args = out, q, k, v, table, lengths, table.shape[1]\n"
            "    decode_kernel[(len(q),)](*args, PAGE=k.shape[1], DIM=k.shape[2])\n",
            "v has changed, which is an input",
        ),
    },
    "scales": {
        "transposed": (
            "def launch(out, codes, scale, table):\n"
            "    _, page_size, heads, dim = codes.shape\n"
            "    args = out, codes, scale.transpose(1, 2), table\n"
            "    scales_kernel[(len(table), heads)](*args, PAGE=page_size, HEADS=heads, DIM=dim)\n",
            "out[0, 1, 0]: expected",
        ),
        "transposed and copied": (
            "def launch(out, codes, scale, table):\n"
            "    _, page_size, heads, dim = codes.shape\n"
            "    args = out, codes, scale.transpose(1, 2).contiguous(), table\n"
            "    scales_kernel[(len(table), heads)](*args, PAGE=page_size, HEADS=heads, DIM=dim)\n",
            "got a copy of scale",
        ),
    },
    "write": {
        "padding removed": (
            "def launch(pool, new, slots):\n"
            "    real = slots >= 0\n"
            "    new, slots = new[real], slots[real]\n"
            "    if len(slots):\n"
            "        write_kernel[(len(slots),)](pool, new, slots, len(pool), DIM=new.shape[1])\n",
            "",
        ),
    },
}
"""Fixes in a launcher around the kernel with the bug, and a part of the complaint, "" for a right one."""

assert set(RIGHT) == set(WRONG) == set(BUGS)
