"""Plausible wrong answers of chapter 11, and what the check must say to each: wrong places, and every wrong fix."""

from kvgather.lab.hunt import BUGS
from tests.lab.hunt.fixes import LAUNCHERS, RIGHT, answered
from tests.lab.hunt.fixes import WRONG as WRONG_FIXES

OWN = f"11.{len(BUGS) + 1}"


def place(name: str, argument: str, line: object, program: object) -> str:
    """A cell with a fixed kernel, and these three answers."""
    first, _, rest = answered(BUGS[name], next(iter(RIGHT[name].values()))).partition("\n")
    assert first.startswith("argument, line, program = ")
    return f"argument, line, program = {argument!r}, {line!r}, {program!r}\n{rest}"


def places(name: str) -> list[tuple[str, str]]:
    """The right answers with one of them wrong: for each answer of the registry that has a reason, and a plain one."""
    bug = BUGS[name]
    right = bug.arguments[0], bug.lines[0], bug.programs[0]
    cells = [((right[0], right[1], (99,) * len(right[2])), "99")]
    for near, reason in bug.near.items():
        if isinstance(near, tuple):
            answers = right[0], right[1], near
        elif near.endswith("_ptr"):
            answers = near, right[1], right[2]
        else:
            answers = right[0], near, right[2]
        cells.append((answers, reason))
    return [(place(name, *answers), said) for answers, said in cells]


SOFTMAX = """@triton.jit
def my_kernel(out_ptr, x_ptr, stride_row, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0){row}, tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * {stride} + column, mask={mask}, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * columns + column, e{result}, mask=column < columns)


def my_inputs():
    return {inputs}


def my_launch(x):
    out = torch.empty(x.shape)
    my_kernel[({grid},)](out, x, x.stride(0), x.shape[1], BLOCK=16)
    return out


def my_oracle(x):
    return {oracle}
"""


def own(**change: str) -> str:
    parts = {
        "row": "",
        "stride": "stride_row",
        "mask": "column < columns",
        "result": " / tl.sum(e, 0)",
        "inputs": '{"x": torch.randn(5, 20)[:, :13]}',
        "grid": "len(x)",
        "oracle": "x.softmax(-1)",
    }
    return SOFTMAX.format(**parts | change)


WRONG = {
    f"11.{number}": [
        *places(name),
        *((answered(BUGS[name], change), said) for change, said in WRONG_FIXES[name].values()),
        *(
            (answered(BUGS[name]) + f"\n\n{source}\n\nfixed = launch\n", said)
            for source, said in LAUNCHERS.get(name, {}).values()
            if said
        ),
    ]
    for number, name in enumerate(BUGS, start=1)
}
WRONG["11.1"] += [
    (place("slots", "positions", 16, (2,)), "argument is 'positions'; accepted: one of slots_ptr, positions_ptr"),
    (place("slots", "positions_ptr", 3, (2,)), "line is 3; the kernels have the lines"),
    (place("slots", "positions_ptr", "nonsense", (2,)), "no line of the kernel as it was contains 'nonsense'"),
    (place("slots", "positions_ptr", "position", (2,)), "lines contain 'position'; give the whole line"),
    (
        place("slots", "positions_ptr", "position = tl.load(", "two"),
        "program is 'two'; accepted: an index for each axis",
    ),
    (answered(BUGS["slots"], [("inside = token < n", "inside = token < m")]), "NameError"),
    (answered(BUGS["slots"], [("@triton.jit\n", "")]), "slots_kernel has pointers as arguments and no @triton.jit"),
    (answered(BUGS["slots"], [("fixed = slots_kernel", "fixed = 21")]), "fixed is 21; accepted: slots_kernel"),
    (answered(BUGS["slots"], [("PAGE: tl.constexpr, ", "")]), "NameError: name 'PAGE' is not defined"),
]
WRONG[OWN] = [
    (own(mask="column < BLOCK"), "load x_ptr, elements"),
    (own(stride="columns"), "between the view's elements"),
    (own(result=""), "result[0, 0]: expected"),
    (own(grid="2 * len(x)", row=" // 2"), "stored by"),
    (own(oracle="my_launch(x)"), "my_oracle launched my_kernel"),
    (own(oracle="'softmax'"), "my_oracle returned a str; expected a tensor"),
    (own(inputs="torch.randn(5, 20)"), "my_inputs returned a Tensor; expected a dict"),
]
