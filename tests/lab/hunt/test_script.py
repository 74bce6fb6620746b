"""The scripts show the bugs, and every tool says what the registry says."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from kvgather.lab.child import environment

pytestmark = pytest.mark.triton
hunt = pytest.importorskip("kvgather.lab.hunt", reason="needs Triton, which has no build for this machine")

from kvgather.lab.hunt import script, tools  # noqa: E402
from kvgather.lab.hunt.judge import about_writers  # noqa: E402
from kvgather.lab.trace import trace  # noqa: E402


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in hunt.BUGS}
    for outcome in script.script_outcomes(hunt.BUGS.values()):
        found[outcome.bug].append(outcome)
    return found


@pytest.mark.parametrize("name", hunt.BUGS)
def test_a_script_shows_its_bug(outcomes: dict[str, list[Any]], name: str) -> None:
    bug, kinds = hunt.BUGS[name], [outcome.kind for outcome in outcomes[name]]
    assert [outcome.geometry for outcome in outcomes[name]] == list(script.geometries(bug))
    assert kinds[: len(bug.passes)] == ["right"] * len(bug.passes)
    assert kinds[-1] == ("died" if bug.tight or name == "rows" else "wrong")
    assert set(kinds[len(bug.passes) : -1]) <= {"wrong"}


def test_every_tool_says_what_the_registry_says() -> None:
    for name, said in tools.ask_all(hunt.BUGS.values()):
        assert list(said) == list(hunt.TOOLS)
        assert tuple(tool for tool, text in said.items() if text) == hunt.BUGS[name].found_by, (name, said)


def test_poison_is_where_no_token_owns_a_slot() -> None:
    """The oracle runs without NaN in K, V and scales, poison with it, and right results have none."""
    poisoned = {"pages": {"k"}, "chunk": {"k"}, "window": {"k", "v"}, "decode": {"k", "v"}, "scales": {"scale"}}
    for bug in hunt.BUGS.values():
        found = []
        for geometry in (bug.unpoisoned or bug.shows, bug.poisoned or bug.shows):
            inputs = bug.inputs(geometry)
            expected = bug.expected(inputs)
            assert not any(tensor.isnan().any() for tensor in expected.values())
            tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
            floats = {key: value for key, value in tensors.items() if value.is_floating_point() and key not in expected}
            found.append((expected, {key for key, value in floats.items() if value.isnan().any()}))
        (plain, clean), (right, names) = found
        assert clean == set() and names == poisoned.get(bug.name, set()), bug.name
        assert all(torch.equal(right[key], tensor) for key, tensor in plain.items())
        assert bug.poisoned is None or bug.poisoned in bug.hidden


def test_writers_are_reported_in_every_order_and_the_oracle_sees_one_half() -> None:
    bug = hunt.BUGS["write"]
    for slots in itertools.permutations([3, 15, 9, -1]):
        inputs = bug.inputs({"slots": list(slots)})
        expected = bug.expected(inputs)["pool"]
        with trace() as t:
            bug.run(inputs)
        assert about_writers(t)
        assert torch.equal(expected, inputs["pool"]) == (slots.index(-1) < slots.index(15))


def test_no_tool_finds_every_bug_and_every_tool_finds_one() -> None:
    for tool in hunt.TOOLS:
        finds = [tool in bug.found_by for bug in hunt.BUGS.values()]
        assert any(finds) and not all(finds)


def test_a_child_that_cannot_start_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "command", lambda *jobs, seconds: [sys.executable, "-c", "raise SystemExit('no')"])
    (first, *rest) = script.script_outcomes([hunt.BUGS["slots"]])
    assert str(first) == "n = 8: refused, no" and {outcome.kind for outcome in rest} == {"refused"}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(script, "command", lambda *jobs, seconds: sleep)
    kinds = {outcome.kind for outcome in script.script_outcomes([hunt.BUGS["window"]], timeout=0.2)}
    assert kinds == {"timeout"}


def command_line(*names: str) -> Any:
    line = [sys.executable, "-m", "kvgather.lab.hunt", *names]
    return subprocess.run(line, capture_output=True, text=True, env=environment())


def test_the_command_line() -> None:
    listed = command_line()
    assert listed.returncode == 0 and listed.stderr == ""
    assert all(f"{bug.name}: {bug.title}, difficulty" in listed.stdout for bug in hunt.BUGS.values())
    shown = command_line("write")
    assert shown.returncode == 0 and "slots = [3, 15, 9, -1]: wrong, pool[15, 0]: expected" in shown.stdout
    wrong = command_line("wrote")
    assert wrong.returncode == 2 and "name is 'wrote'; accepted: slots, pages, chunk" in wrong.stderr


def test_the_reports_do_not_give_the_cause_away() -> None:
    for bug in hunt.BUGS.values():
        said = f"{bug.title} {bug.report}".lower()
        for word in ("mask", "stride", "int32", "log2", "axis", "fnuz", "clamp", bug.family):
            assert word not in said, (bug.name, word)


def test_from_easy_to_hard() -> None:
    levels = [bug.difficulty for bug in hunt.BUGS.values()]
    assert levels == sorted(levels) and len(levels) == 10 and set(levels) == {1, 2, 3, 4}


def test_a_thread_has_an_address_and_a_status() -> None:
    for bug in hunt.BUGS.values():
        assert bug.threads and all(thread.status for thread in bug.threads)
    assert hunt.BUGS["slots"].threads[0].url == "https://github.com/flagos-ai/FlagGems/issues/5231"
    assert str(hunt.BUGS["slots"].threads[0]) == "flagos-ai/FlagGems#5231 (merged)"
