"""The pytest plugin of `gpu_suite`: keeps the GPU tests of one shard, and writes down what becomes of each at once.

A process that dies leaves its events behind: one JSON object a line, in the file that KVGATHER_EVENTS names.

    {"collected": [ids]}             before the first test
    {"start": id}
    {"end": id, "outcome": …, "reason": …, "seconds": …}   outcome: passed, failed, error, skipped
    {"broken": file, "reason": …}    a file that cannot be collected
    {"stopped": reason}              no more tests are run in this process
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

EVENTS, IDS = "KVGATHER_EVENTS", "KVGATHER_IDS"
"""Environment variables: the file to write events to, and a file of the ids to run, as a JSON list; without it, all."""

_ended: dict[str, dict[str, Any]] = {}


def _write(**event: Any) -> None:
    with Path(os.environ[EVENTS]).open("a") as file:
        file.write(json.dumps(event) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(json.loads(Path(os.environ[IDS]).read_text())) if IDS in os.environ else None
    kept = [item for item in items if item.get_closest_marker("gpu") and (wanted is None or item.nodeid in wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
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
    if end["outcome"] in ("failed", "error") and (dead := _dead_context()):
        _write(stopped=f"the CUDA context died in {nodeid}: {dead}")
        os._exit(3)  # every later test would fail for this test's reason, and so would CUDA's own clean-up


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The exception's first lines, or the report's last line where there is no exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else (report.longreprtext.splitlines() or [""])[-1].removeprefix("E   ")
    return str(text)[:600]


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    skip = report.longrepr
    return str(skip[2]).removeprefix("Skipped: ") if isinstance(skip, tuple) else str(skip)


def _dead_context() -> str:
    """Why the GPU takes no more work from this process; empty if it does, or if none was used."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
