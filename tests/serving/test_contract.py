"""Every hook of transformers that we rest on is where, and what, we expect; a moved one is named."""

from __future__ import annotations

import importlib.metadata

import pytest

from kvgather.serving import contract
from kvgather.serving.contract import HOOKS, Hook, TransformersError


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_the_hook_has_not_moved(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "HOOKS", (hook,))
    assert contract.moved() == []


@pytest.mark.parametrize(
    ("hook", "fault"),
    [
        (Hook("transformers.no_such_module", "X", None, "a test"), "is missing: No module named"),
        (Hook("transformers", "AttentionInterface.no_such_method", None, "a test"), "is missing: type object"),
        (
            Hook("transformers.cli.serve", "Serve.__init__", ("self", "gone"), "a test"),
            "has the parameters self, force",
        ),
        (Hook("transformers.cli.serve", "Serve.__init__", None, "a test", "no such line"), "does not contain 'no such"),
    ],
)
def test_a_moved_hook_is_named(hook: Hook, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "HOOKS", (*HOOKS, hook))
    (found,) = contract.moved()
    assert found.startswith(f"{hook.module}.{hook.name} (a test): {fault}")


@pytest.mark.parametrize("version", ["5.17.0", "5.25.0", "6.24.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(TransformersError, match=rf"transformers is {version}; accepted: 5\.24\.\*"):
        contract.check_version()


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(TransformersError, match=r"transformers is not installed; accepted: 5\.24"):
        contract.check_version()
