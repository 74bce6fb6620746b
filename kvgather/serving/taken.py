"""Requests that rank 0 has taken from its queue for an exchange with the other ranks that then failed.

Transformers' engine has them in a local variable at that time, and their clients would wait forever. They are put back
into the queue, where the engine's end finds and fails them: with our cache and with transformers' own.
"""

from __future__ import annotations

import queue
from typing import Any

from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus


class TakenQueue:
    """The engine's queue of requests as a batch processor sees it: it remembers what was taken."""

    def __init__(self, requests: queue.Queue[Any]) -> None:
        self._requests = requests
        self._taken: list[Any] = []

    def empty(self) -> bool:
        return self._requests.empty()

    def get_nowait(self) -> Any:
        request = self._requests.get_nowait()
        self._taken.append(request)
        return request

    def accept(self) -> None:
        """All requests have come to all ranks."""
        self._taken.clear()

    def put_back(self) -> None:
        """Put all requests since `accept` back, also beyond the queue's bound."""
        with self._requests.mutex:
            self._requests.queue.extendleft(reversed(self._taken))
        self._taken.clear()


def keep_requests(processor: Any) -> None:
    """Make a batch processor put requests back if their exchange fails, or if another rank stops the engine in it.

    A processor that does already is left as it is: a restarted engine has the processor of its first start.
    """
    if processor.input_queue is None or isinstance(processor.input_queue, TakenQueue):  # None on the other ranks
        return
    requests = processor.input_queue = TakenQueue(processor.input_queue)
    update = processor._update_tp_group_state

    def update_or_put_back() -> bool:
        try:
            stopping: bool = update()
        except Exception:
            requests.put_back()
            raise
        if processor.background_thread_status.tp_status == BackgroundThreadStatus.HARD_STOP:
            requests.put_back()
        requests.accept()
        return stopping

    processor._update_tp_group_state = update_or_put_back
