"""One replay: start the server, send all requests, watch, and sum up."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .clients import Answer, Workload, ask_all
from .process import ServerProcess


@dataclass(frozen=True)
class Outcome:
    """What a replay gave.

    Attributes:
        answers: one for each prompt, in their order.
        death: how the engine ended, or "" if it was alive at the end.
        status: of the engine at the end, see `kvgather.serving.serve.status`; empty if it does not answer.
        seconds: from the first request to the last answer.
        output: the last lines that a dead server has printed.
    """

    answers: Sequence[Answer]
    death: str
    status: dict[str, Any]
    seconds: float
    output: str = ""

    @property
    def completed(self) -> int:
        return sum(not answer.error for answer in self.answers)

    @property
    def timed_out(self) -> int:
        return sum(answer.timed_out for answer in self.answers)

    @property
    def failed(self) -> int:
        return len(self.answers) - self.completed - self.timed_out

    @property
    def succeeded(self) -> bool:
        """Whether every request completed and the engine lives."""
        return self.completed == len(self.answers) and not self.death

    @property
    def reasons(self) -> Counter[str]:
        """Why requests failed, each with how many did; names of requests in the reasons are left out."""
        return Counter(NAME.sub("…", answer.error) for answer in self.answers if answer.error)

    def first_token(self, share: float) -> float | None:
        """A quantile of the seconds until the first token; None if no answer was streamed."""
        times = sorted(answer.first for answer in self.answers if answer.first is not None)
        if len(times) < 2:
            return times[0] if times else None
        return statistics.quantiles(times, n=100, method="inclusive")[round(share * 100) - 1]

    def differing(self, other: Outcome) -> int:
        """How many requests have another text than in the other outcome."""
        pairs = zip(self.answers, other.answers, strict=True)
        return sum(mine.text != theirs.text for mine, theirs in pairs)


def replay(
    server_arguments: Sequence[str],
    workload: Workload,
    *,
    warm_up: Workload | None = None,
    limit: float = 600.0,
    ranks: int = 1,
    tell: Callable[[Answer], None] = lambda _: None,
    started: Callable[[ServerProcess], None] = lambda _: None,
) -> Outcome:
    """Start a server, let the clients ask, and stop the server.

    Args:
        server_arguments: of `kvgather serve`.
        workload: what the clients ask for.
        warm_up: asked before, and not counted: on a GPU the first requests compile kernels.
        limit: seconds for all of it.
        ranks: processes that run the model together.
        tell: called with each answer when it is complete.
        started: called with the server when it answers.

    Raises:
        ServerError: the server did not start.
    """
    begin = time.monotonic()
    with ServerProcess(("kvgather", "serve", *server_arguments), limit, ranks) as server:
        server.wait_until_ready(limit)
        started(server)
        if warm_up is not None:
            ask_all(server.url, warm_up, server.death)
        before = server.status()
        start = time.perf_counter()
        answers = ask_all(server.url, workload, server.death, tell)
        seconds = time.perf_counter() - start
        status = _since(server.status(), before)
        death = server.death() if status else server.wait_for_death()
        if death:
            death = f"the process {death}"
        elif status.get("error"):
            death = str(status["error"])
        elif not status and time.monotonic() - begin < limit:
            death = "the server does not answer"
        return Outcome(answers, death, status, seconds, server.last_lines() if death else "")


def _since(status: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The counters of a status without those of an earlier one; the peak memory is that of the whole run."""
    counted = {name: _less(value, before.get(name)) for name, value in status.items() if name in COUNTED}
    last = max((step["begin"] for step in before.get("steps", [])), default=0.0)
    steps = [step for step in status.get("steps", []) if step["begin"] > last]
    return status | counted | ({"steps": steps} if status else {})


def _less(value: Any, before: Any) -> Any:
    if isinstance(value, dict):
        return {name: _less(part, (before or {}).get(name)) for name, part in value.items()}
    return value - (before or 0)


NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""The name that the server gives a request."""
COUNTED = (
    "prefill_tokens", "decode_tokens", "prefill_seconds", "decode_seconds", "num_steps", "lookups", "hits",
    "looked_up_tokens", "hit_tokens", "paths",
)  # fmt: skip
