"""The arrows of the package point one way; ARCHITECTURE.md draws them. Planted violations are found."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import House, Order

ROOT = Path(__file__).resolve().parents[1]
ORDER: Order = [
    {"interpreter", "files"},
    {"device"},
    {"formats"},
    {"kernels"},
    {"plan_kernel"},
    {"plan", "blocks"},
    {"gather"},
    {"scatter"},
    {"cache"},
    {"batch"},
    {"hopper"},
    {"attention"},
    {""},  # the public names: `import kvgather`
    {"parallel"},
    {"serving"},
    {"cases"},
    {"lab"},
    {"bench"},
    {"replay"},
    {"workbook"},
    {"cli"},
    {"__main__"},
]
"""From the lowest floor up. A part imports itself and lower floors, never its neighbours on the same one."""
HEAVY = (
    "kvgather.cases", "kvgather.lab", "kvgather.parallel", "kvgather.bench", "kvgather.replay", "kvgather.serving",
    "kvgather.workbook", "kvgather.cli", "IPython", "ipywidgets", "jupyter_core", "matplotlib", "transformers",
)  # fmt: skip
"""What `import kvgather` does not load."""
MOST_IN_ATTENTION = 10


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT, "kvgather")


def loaded(root: Path, package: str, heavy: tuple[str, ...]) -> str:
    """Which of these modules `import package` loads, as a list's text."""
    code = f"import sys, {package}; print([name for name in {heavy!r} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return child.stdout.strip()


def crowd(house: House, folder: str) -> list[str]:
    """The modules of a folder, without its `__init__`."""
    return [module.name for module in house.modules.values() if module.folder == folder and not module.is_package]


def test_no_import_goes_in_a_circle(house: House) -> None:
    assert house.circles() == []


def test_no_import_goes_up(house: House) -> None:
    assert house.upward(ORDER) == []


def test_private_names_stay_at_home(house: House) -> None:
    assert house.private_names() == []


def test_attention_stays_small(house: House) -> None:
    modules = crowd(house, "kvgather.attention")
    assert 0 < len(modules) <= MOST_IN_ATTENTION, modules


def test_import_stays_light() -> None:
    assert loaded(ROOT, "kvgather", HEAVY) == "[]"


def test_the_graph_has_arrows_of_every_kind(house: House) -> None:
    """At the top of a file, in a function, of a package's names, of a module inside a package, under TYPE_CHECKING."""
    for above, below in (
        ("kvgather.attention.prefix", "kvgather.attention.direct"),
        ("kvgather.attention.merge", "kvgather.kernels.merge"),
        ("kvgather.cache", "kvgather.scatter"),
        ("kvgather.bench.steps", "kvgather.lab.steps"),
        ("kvgather.cache", "kvgather.scatter.kernel"),
    ):
        assert below in house.graph[above]
    assert len(house.modules) > 80 and sum(map(len, house.graph.values())) > 250


def test_the_drawing_names_what_there_is(house: House) -> None:
    """In ARCHITECTURE.md: the floors from the top down, paths, and the functions of the files that a row names."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawing = text.split("```")[1].strip().splitlines()
    heads = [re.split(r" {2,}", line)[0] for line in drawing if not line.startswith(" ")]
    floors = [{"" if part == "__init__" else part.rstrip("/") for part in head.split(", ")} for head in heads]
    assert floors == list(reversed(ORDER))
    folders = (
        "cli",
        "replay",
        "serving",
        "parallel",
        "attention",
        "hopper",
        "batch",
        "scatter",
        "gather",
        "kernels",
        "formats",
    )
    for folder in folders:
        (at,) = (i for i, line in enumerate(drawing) if line.startswith(f"{folder}/"))
        end = next((i for i, line in enumerate(drawing) if i > at and not line.startswith(" ")), len(drawing))
        room = re.findall(r"\w+", " ".join(drawing[at:end]))
        unnamed = [name for name in crowd(house, f"kvgather.{folder}") if name.rpartition(".")[2] not in room]
        assert unnamed == []
    paths = re.findall(r"`((?:kvgather|tests|tools|notebooks)/[\w/.]*)`", text)
    assert len(paths) > 30 and [path for path in paths if not (ROOT / path).exists()] == []
    for row in [line for line in text.splitlines() if line.startswith("| ")]:
        files = re.findall(r"`(kvgather/[\w/]+\.py)`", row)
        source = "".join((ROOT / path).read_text(encoding="utf-8") for path in files)
        names = {name for name in re.findall(r"`([\w.]+)`", row) if files}
        assert [name for name in names if not all(part in source for part in name.split("."))] == []


# A small house without faults: two floors and an attic, with imports of every kind.
SOUND = {
    "__init__": "from .hall import greet\n",
    "cellar/__init__": "",
    "cellar/wine": "import os\nSHELF = 3\n\n\ndef _count():\n    return SHELF\n",
    "cellar/_rack": "ROWS = 4\n",
    "cellar/store": "from . import wine\nfrom ._rack import ROWS\nTOTAL = wine.SHELF * ROWS\n",
    "hall": "from .cellar import store\n\n\ndef greet():\n    from .cellar.wine import SHELF\n\n    return SHELF\n",
    "attic": "import home\nfrom home.hall import greet\n",
}
SOUND_ORDER: Order = [{"cellar"}, {"hall"}, {""}, {"attic"}]


def built(folder: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = folder / "home" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(folder, "home")


def test_a_sound_house_has_no_faults(tmp_path: Path) -> None:
    house = built(tmp_path, SOUND)
    assert [*house.circles(), *house.upward(SOUND_ORDER), *house.private_names()] == []
    assert house.graph["home.hall"] == {"home.cellar.store", "home.cellar.wine"}
    assert house.graph["home.attic"] == {"home", "home.hall"}
    assert crowd(house, "home.cellar") == ["home.cellar._rack", "home.cellar.store", "home.cellar.wine"]
    assert loaded(tmp_path, "home", ("home.attic", "home.hall")) == "['home.hall']"


@pytest.mark.parametrize(
    "lines",
    [
        "from .hall import greet",
        "from . import hall",
        "import home.hall",
        "import home.hall as h",
        "from home import hall",
        "def later():\n    from .hall import greet",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .hall import greet",
        "import importlib\nimportlib.import_module('home.hall')",
        "from importlib import import_module\nimport_module('.hall', __package__)",
    ],
)
def test_planted_imports_that_go_up_and_in_a_circle(lines: str, tmp_path: Path) -> None:
    inside = lines.replace("from .hall", "from ..hall").replace("from . import", "from .. import")
    inside = inside.replace("'.hall'", "'..hall'")
    house = built(tmp_path, {**SOUND, "cellar/wine": SOUND["cellar/wine"] + inside + "\n"})
    ast.parse(inside)
    line = SOUND["cellar/wine"].count("\n") + inside.count("\n") + 1
    assert house.upward(SOUND_ORDER) == [f"home.cellar.wine:{line} imports home.hall, which is not below it"]
    (circle,) = house.circles()
    assert " imports ".join(("home.cellar.wine", "home.hall")) in circle


def test_planted_circle_on_one_floor(tmp_path: Path) -> None:
    house = built(tmp_path, {**SOUND, "cellar/wine": "def f():\n    from .store import TOTAL\n"})
    assert house.upward(SOUND_ORDER) == []
    (circle,) = house.circles()
    assert set(circle.split(" imports ")) == {"home.cellar.wine", "home.cellar.store"}


def test_planted_neighbours_and_parts_without_a_floor(tmp_path: Path) -> None:
    house = built(tmp_path, {**SOUND, "shed": "from .hall import greet\n"})
    assert house.upward([{"cellar"}, {"hall", "shed"}, {""}, {"attic"}]) == [
        "home.shed:1 imports home.hall, which is not below it"
    ]
    assert house.upward(SOUND_ORDER) == ["home.shed has no floor in the order"]
    assert house.upward([*SOUND_ORDER, {"shed", "roof"}]) == ["roof is in the order and not in home"]
    low = built(tmp_path / "low", {**SOUND, "hall": SOUND["hall"] + "import home\n"})
    assert low.upward(SOUND_ORDER) == ["home.hall:8 imports home, which is not below it"], "the public face is above"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("from .cellar.wine import _count", "imports _count of home.cellar.wine"),
        ("from home.cellar.wine import SHELF, _count as count", "imports _count of home.cellar.wine"),
        ("from .cellar import wine\nwine._count()", "uses wine._count"),
        ("from .cellar import wine as w\n\n\ndef f():\n    return w._count()", "uses w._count"),
        ("import home.cellar.wine\nhome.cellar.wine._count()", "uses home.cellar.wine._count"),
        ("from .cellar import _rack", "imports home.cellar._rack, which is private to home.cellar"),
        ("from .cellar._rack import ROWS", "imports home.cellar._rack, which is private to home.cellar"),
        ("def f(bottle):\n    return bottle._count", "uses bottle._count"),
        ("from .hall import greet\n\n\ndef _own():\n    pass\n\n\ngreet._own", "uses greet._own"),
    ],
)
def test_planted_uses_of_private_names(lines: str, fault: str, tmp_path: Path) -> None:
    (found,) = built(tmp_path, {**SOUND, "attic": lines + "\n"}).private_names()
    assert found.startswith("home.attic:") and found.endswith(fault)


def test_own_private_names_and_those_of_strangers_are_no_fault(tmp_path: Path) -> None:
    own = "import os\n\n\nclass A:\n    def __init__(self):\n        self._x = os._exit\n\n    def f(self, other):\n"
    own += "        return self._x, other._x, self.__class__, os._count\n"
    named_alike = "from home.cellar import store\n\n\nclass B:\n    def _count(self):\n        return self._count\n"
    house = built(tmp_path, {**SOUND, "hall": SOUND["hall"] + own, "attic": named_alike})
    assert house.private_names() == []


def test_planted_crowd_and_heavy_import(tmp_path: Path) -> None:
    house = built(tmp_path, {**SOUND, "__init__": "from . import attic\n", "attic": "", "cellar/more": ""})
    assert len(crowd(house, "home.cellar")) == 4
    assert loaded(tmp_path, "home", ("home.attic", "home.hall")) == "['home.attic']"
