"""The repository agrees with itself: versions, dependencies and contents; the package's arrows are in test_house."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked_files() -> list[Path]:
    """What git tracks; in an unpacked archive, which has no git, nothing is checked and the tests say so."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


PLACES = (
    "kvgather/__init__.py", "kvgather/py.typed", "notebooks", "tests", "pyproject.toml", "constraints.txt",
    "environment.yml", "Makefile", ".ci/run", ".devcontainer/devcontainer.json", ".github/PULL_REQUEST_TEMPLATE.md",
    "book/conf.py", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
)  # fmt: skip


def test_everything_is_in_its_place() -> None:
    assert [name for name in PLACES if not (ROOT / name).exists()] == []


def test_issue_forms_are_valid_and_a_bug_needs_its_environment_and_its_tensors() -> None:
    forms = {}
    for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir()):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() == {"name", "description", "body"}
        for field in form["body"]:
            assert field["type"] == "textarea" and field["attributes"]["label"], field
        forms[path.stem] = {field["id"]: field.get("validations", {}).get("required", False) for field in form["body"]}
        assert len(forms[path.stem]) == len(form["body"]), "two fields have the same id"
    assert forms.keys() == {"bug", "question"}
    assert all(forms["bug"][field] for field in ("doctor", "call", "tensors", "result"))


def test_devcontainer_is_valid_and_runs_targets_of_the_makefile() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    python = Version(re.fullmatch(r"python:(3\.\d+)-bookworm", container["image"])[1])
    assert str(python) in SpecifierSet(PROJECT["requires-python"])
    assert container["forwardPorts"] == [8888]
    assert set(container["portsAttributes"]) == {"8888"}
    make, *targets = container["postCreateCommand"].split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert make == "make" and "setup" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_newest_version_in_the_changelog_is_the_packages() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    versions = [Version(heading) for heading in headings]
    assert versions == sorted(versions, reverse=True)
    assert headings[0] == PROJECT["version"]


def test_dependencies_are_ranges() -> None:
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        operators = {clause.operator for clause in requirement.specifier}
        assert ">=" in operators and "==" not in operators, requirement


def test_triton_is_asked_for_where_it_exists() -> None:
    platforms = {}
    for platform in ("linux", "win32", "darwin"):
        names = {
            item.name
            for item in requirements()
            if item.marker is None or item.marker.evaluate({"sys_platform": platform})
        }
        platforms[platform] = names
    assert platforms == {
        "linux": {"torch", "triton"},
        "win32": {"torch", "triton-windows"},
        "darwin": {"torch"},
    }


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    pins = constraints()
    for requirement in requirements("bench", "notebooks", "test"):
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"}):
            assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement


def test_ci_tests_the_oldest_triton_and_the_newest() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^VERSIONS = (.+)$", makefile, re.MULTILINE)
    oldest, *_, newest = map(Version, line.split())
    (triton,) = (item for item in requirements() if item.name == "triton")
    (bound,) = triton.specifier
    assert bound.operator == ">=" and oldest == Version(bound.version)
    assert oldest <= constraints()["triton"] <= newest
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in commands if "make " in line and not line.startswith("#")] == [
        "make test-triton </dev/null",
        "exec make test </dev/null",  # last, because its closing line counts the tests
    ]


def test_constraints_are_pins_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0", "3.14.0"])
def test_pins_install_on_every_python(python: str) -> None:
    """Debian 12 has 3.11.2: one pin that wants 3.11.5 sends pip looking through every version of everything."""
    pins = constraints()
    unfit = []
    for package in importlib.metadata.distributions():
        wants = package.metadata.get("Requires-Python")
        if canonical(package.name) in pins and wants and not SpecifierSet(wants).contains(python):
            unfit.append(f"{package.name} {package.version} wants Python {wants}")
    assert not unfit


def test_the_notebooks_extra_contains_what_bench_prints_with() -> None:
    """`make` installs the extras notebooks and test alone."""
    extras = PROJECT["optional-dependencies"]
    assert set(extras["bench"]) <= set(extras["notebooks"])


def test_environment_yml_installs_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    *conda, through_pip = environment["dependencies"]
    conda = [Requirement(line) for line in conda]
    assert [item.name for item in conda] == ["python", "pip", "make"]
    assert PROJECT["requires-python"] in str(conda[0].specifier).split(",")
    constraint, editable = through_pip["pip"]
    assert constraint == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable)
    assert extras, editable
    assert set(extras[1].split(",")) == set(PROJECT["optional-dependencies"]) - {"nvidia"}


FORBIDDEN = {
    "a package registry's host": re.compile(r"pypi\.org|pythonhosted|deb\.debian"),
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_file_names(what: str) -> None:
    found = []
    for path in tracked_files():
        if path.is_relative_to(ROOT / "tests"):
            continue  # some tests are about such paths
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        if path.suffix == ".ipynb":
            text = re.sub(r'"image/png": "[^"]*"', "", text)
        for number, line in enumerate(text.splitlines(), 1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


MODULES = sorted((ROOT / "kvgather").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def kernels(path: Path) -> list[str]:
    """The functions of a file that `triton.jit` or `gluon.jit` decorates."""
    return [
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith(("triton.jit", "gluon.jit")) for decorator in node.decorator_list)
    ]


def test_mypy_lets_only_modules_with_kernels_go_untyped() -> None:
    untyped = [
        module
        for override in PYPROJECT["tool"]["mypy"]["overrides"]
        if override.get("disallow_untyped_defs") is False
        for module in override["module"]
    ]
    assert untyped == [module_name(path) for path in MODULES if kernels(path)]
