"""The set-up of the tests of serving: no network, quiet logs, engines that are stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import transformers

from kvgather.serving import EngineManager

transformers.logging.set_verbosity_error()


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stops every engine that the test starts: an engine's thread would keep the process alive."""
    started: list[EngineManager] = []
    start = EngineManager.start

    def remembered(self: EngineManager) -> None:
        started.append(self)
        start(self)

    monkeypatch.setattr(EngineManager, "start", remembered)
    yield
    for manager in started:
        if manager.is_running():
            manager.stop(timeout=10, hard_stop=True)
