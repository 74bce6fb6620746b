"""The pytest plugin of `gpu_suite`: selects the GPU tests of one shard, and writes an event for each begin and end.

Events are JSON objects, one a line, in the file that KVGATHER_EVENTS names. The file outlives a process that dies.

    {"collected": [ids]}             before the first test
    {"start": id}
    {"end": id, "outcome": …, "reason": …, "seconds": …}   outcome: passed, failed, error, skipped
    {"broken": file, "reason": …}    a file that cannot be collected
    {"stopped": reason}              this process runs no more tests
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

EVENTS, IDS = "KVGATHER_EVENTS", "KVGATHER_IDS"
"""Environment variables: the file for events, and a JSON list of the ids to run; if it is not set, all tests run."""

_ended: dict[str, dict[str, Any]] = {}


def _write(**event: Any) -> None:
    with Path(os.environ[EVENTS]).open("a") as file:
        file.write(json.dumps(event) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ids = set(json.loads(Path(os.environ[IDS]).read_text())) if IDS in os.environ else None
    selected = [item for item in items if item.get_closest_marker("gpu") and (ids is None or item.nodeid in ids)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
    _write(collected=[item.nodeid for item in items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(broken=report.nodeid, reason=_reason(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    _ended[nodeid] = {"outcome": "passed", "reason": "", "seconds": 0.0}
    _write(start=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    end = _ended[report.nodeid]
    end["seconds"] += report.duration
    if report.failed and end["outcome"] != "failed":
        end["outcome"] = "failed" if report.when == "call" else "error"
        end["reason"] = _reason(report)
    elif report.skipped:
        end["outcome"], end["reason"] = "skipped", _skip_reason(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    end = _ended.pop(nodeid)
    _write(end=nodeid, **end | {"seconds": round(end["seconds"], 2)})
    if end["outcome"] in ("failed", "error") and (message := _context_error()):
        _write(stopped=f"the CUDA context died in {nodeid}: {message}")
        os._exit(3)  # later tests and CUDA's clean-up would fail with the same error


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The exception's message, or the report's last line if it has no exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else (report.longreprtext.splitlines() or [""])[-1].removeprefix("E   ")
    return str(text)[:600]


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    skip = report.longrepr
    return str(skip[2]).removeprefix("Skipped: ") if isinstance(skip, tuple) else str(skip)


def _context_error() -> str:
    """The error of a dead CUDA context; empty if the context works, or if this process has none."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
