"""A group of this process alone: attention without a collective, and the watch over collectives on a GPU."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from kvgather.batch.share import Share
from kvgather.cases import sinks_of
from kvgather.parallel import ContextParallel, RankError, context
from kvgather.parallel import ranks as module
from kvgather.parallel.exchange import Exchange
from kvgather.parallel.ranks import ANSWER, DEAD, LATE, LOOK, Ranks
from tests.attention.batches import assert_close, setup

TIMEOUT = 100.0


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("path", ["gather", "auto"])
@pytest.mark.parametrize("shared", [True, False], ids=["its own batch", "a batch without a share"])
def test_one_rank_attends_without_a_collective(path: str, shared: bool) -> None:
    made, sinks = setup([2, 1], [13, 30]), sinks_of("on", 4)
    with ContextParallel() as attend:
        batch = made.batch(share=attend.share if shared else None)
        got = attend(made.q, *made.new_tokens(), made.cache, batch, sinks=sinks, path=path, return_lse=True)
    assert_close(got, made.wanted(sinks=sinks), made.rows)
    assert attend.share == Share(0, 1) and attend.calls == attend.bytes_received == attend.bytes_least == 0
    assert batch.writers.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="this ContextParallel is closed"):
        attend.group  # noqa: B018


class Event:
    """A GPU's event that finishes when the test says so, and lets the test do something while it is used."""

    def __init__(self) -> None:
        self.finished = True
        self.queries = 0
        self.during: Callable[[], object] | None = None  # once

    def record(self) -> None:
        self.finished = False
        self._do()

    def query(self) -> bool:
        self.queries += 1
        finished = self.finished
        self._do()
        return finished

    def _do(self) -> None:
        during, self.during = self.during, None
        if during is not None:
            during()


class Store:
    """What the other ranks have written, and how often it was read."""

    def __init__(self, *ranks: int) -> None:
        self.beats = dict.fromkeys(ranks, 1)
        self.reads = 0

    def check(self, keys: list[str]) -> bool:
        self.reads += 1
        return int(keys[0]) in self.beats

    def get(self, key: str) -> bytes:
        return f"{self.beats[int(key)]} 0".encode()


class Watched:
    """The watch of a rank's thread over one event, by a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: dist.ProcessGroup) -> None:
        self.event, self.now = Event(), 0.0
        self.ranks = Ranks(group, "watched")
        for where in (torch, torch.cuda):
            monkeypatch.setattr(where, "Event", lambda *_: self.event)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(self.ranks, "missing", lambda: {1: "hangs"})
        monkeypatch.setattr(self.ranks, "_timeout", TIMEOUT)
        self.aborted: list[dist.ProcessGroup] = []
        monkeypatch.setattr(dist.ProcessGroup, "abort", lambda group: self.aborted.append(group))

    def look(self) -> None:
        self.ranks._look_at_newest()

    def listen(self, seconds: float, store: Store, *alive: int) -> None:
        """Both threads look, once in `LOOK` seconds; the ranks that live give a sign before each look."""
        for _ in range(int(seconds / LOOK)):
            self.now += LOOK
            store.beats |= {rank: store.beats[rank] + 1 for rank in alive}
            self.ranks._look_for_dead(store)
            self.look()

    def collective(self) -> None:
        """One that the host has launched, and that a GPU waits for from now on."""
        exchange = Exchange(Share(0, 1), torch.device("cpu"))
        exchange.own((1, 1, 4), torch.float32)
        exchange.gather(self.ranks.group, self.ranks)
        self.ranks.started("a sum")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, group: dist.ProcessGroup) -> Watched:
    return Watched(monkeypatch, group)


def test_a_collective_on_a_gpu_that_does_not_end_is_reported_once(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.collective()
    for watched.now in (0.0, LATE * TIMEOUT - 1, LATE * TIMEOUT + 1, TIMEOUT):
        watched.look()
    said = "rank 0: a sum of 1 ranks failed: rank 1 hangs. the collective has not ended after 71 s"
    assert capsys.readouterr().err == f"kvgather: {said}\n"
    with pytest.raises(RankError, match=said) as raised:
        watched.collective()
    assert raised.value.ranks == (1,)
    assert watched.aborted == [watched.ranks.group]


def test_a_collective_that_ended_is_asked_for_once(watched: Watched) -> None:
    """A query ends a capture in another thread."""
    watched.collective()
    watched.event.finished = True
    for watched.now in range(0, 1000, 10):
        watched.look()
    assert watched.event.queries == 1
    watched.collective()
    watched.now += LATE * TIMEOUT + 1
    watched.look()
    assert watched.event.queries == 3 and watched.ranks._late is not None and len(watched.aborted) == 1


def test_a_collective_that_ends_while_the_others_are_asked_is_not_aborted(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends() -> dict[int, str]:
        watched.event.finished = True
        return {}

    monkeypatch.setattr(watched.ranks, "missing", ends)
    watched.collective()
    watched.now = LATE * TIMEOUT + 1
    watched.look()
    assert watched.ranks._late is None and not watched.aborted and capsys.readouterr().err == ""
    watched.collective()


@pytest.mark.parametrize("when", ["before the event is recorded again", "while the thread queries it"])
def test_a_collective_after_a_pause_is_not_late(watched: Watched, when: str) -> None:
    """Both use the same event: the thread must not take the new one's state with the old one's time."""
    watched.collective()
    watched.now = 10 * TIMEOUT
    if when == "while the thread queries it":
        watched.event.during = lambda: watched.ranks.started("a sum")
        watched.look()
    else:
        watched.event.finished = True
        watched.event.during = watched.look
        watched.ranks.started("a sum")
    assert watched.ranks._late is None and not watched.aborted


def test_a_query_that_is_refused_does_not_end_the_thread(watched: Watched) -> None:
    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    watched.collective()
    watched.now, watched.event.during = TIMEOUT, refuse
    watched.look()
    assert watched.event.queries == 1 and watched.ranks._late is None
    for watched.now in (TIMEOUT + 1, TIMEOUT * (1 + LATE) - 1):  # not at every beat: it may end a capture
        watched.look()
    assert watched.event.queries == 1
    watched.now = TIMEOUT * (1 + LATE) + 1
    watched.look()
    assert watched.ranks._late is not None and len(watched.aborted) == 1


@pytest.fixture
def of_three(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(watched.ranks, "size", 3)
    return watched


def test_a_dead_rank_is_reported_before_the_collective_is_late(
    of_three: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one has not entered the collective either: it lives, and is not named."""
    monkeypatch.setattr(of_three.ranks, "missing", lambda: pytest.fail("the store may block this thread"))
    store = Store(1, 2)
    of_three.collective()
    of_three.listen(DEAD, store, 2)
    assert of_three.event.queries == 0
    of_three.listen(2 * LOOK, store, 2)
    assert of_three.now < 40 < LATE * TIMEOUT
    said = "rank 1 has died, or stands still: it gave no sign for 30 s. the collective has not ended after 34 s"
    assert capsys.readouterr().err == f"kvgather: rank 0: a sum of 3 ranks failed: {said}\n"
    with pytest.raises(RankError, match=said) as raised:
        of_three.collective()
    assert raised.value.ranks == (1,) and of_three.aborted == [of_three.ranks.group]


@pytest.mark.parametrize("how", ["gives signs", "pauses", "has not begun"])
def test_a_slow_rank_is_not_reported_before_the_collective_is_late(how: str, of_three: Watched) -> None:
    store = Store(2) if how == "has not begun" else Store(1, 2)
    alive = (1, 2) if how == "gives signs" else (2,)
    of_three.collective()
    while of_three.now < LATE * TIMEOUT - DEAD:
        of_three.listen(DEAD - LOOK, store, *alive)
        if how == "pauses":
            of_three.listen(LOOK, store, 1, 2)
    of_three.listen(LATE * TIMEOUT - of_three.now - 1, store, *alive)
    assert of_three.event.queries == 0 and of_three.ranks._late is None
    of_three.listen(LOOK, store, *alive)
    assert of_three.ranks._late is not None and of_three.ranks._late.ranks == (1,)


def test_a_store_that_stops_for_a_while_makes_nobody_dead(of_three: Watched) -> None:
    """The live ranks could not write either."""
    store = Store(1, 2)
    of_three.collective()
    of_three.listen(3 * LOOK, store, 1, 2)
    of_three.now += DEAD + 1
    of_three.ranks._look_for_dead(store)
    of_three.look()
    assert of_three.event.queries == 0
    of_three.listen(3 * LOOK, store, 1, 2)
    assert of_three.event.queries == 0 and of_three.ranks._late is None


def test_the_store_is_not_read_during_a_fast_or_a_finished_collective(of_three: Watched) -> None:
    store = Store(1, 2)
    of_three.listen(2 * DEAD, store)
    for _ in range(100):
        of_three.collective()
        of_three.listen(LOOK, store)
    assert store.reads == 0
    of_three.event.finished = True
    of_three.listen(2 * DEAD, store)  # a dead rank: the event is asked for
    assert of_three.event.queries == 1 and of_three.ranks._late is None
    reads = store.reads
    of_three.listen(10 * TIMEOUT, store)
    assert store.reads == reads <= 2 * (DEAD / LOOK + 1)
    of_three.collective()
    of_three.look()
    assert of_three.event.queries == 1  # the new one is given as long


def test_an_early_query_that_is_refused_is_repeated_after_as_long_a_wait(of_three: Watched) -> None:
    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    store = Store(1, 2)
    of_three.collective()
    of_three.event.during = refuse
    of_three.listen(2 * DEAD, store, 2)
    assert of_three.event.queries == 1 and of_three.ranks._late is None
    while of_three.ranks._late is None:
        of_three.listen(LOOK, store, 2)
    assert 2 * DEAD < of_three.now < 2 * DEAD + 6 * LOOK


@pytest.mark.parametrize("store", ["answers", "blocks", "has gone"])
def test_the_threads_of_a_rank_on_a_gpu_report_it(
    store: str, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is with NCCL. Without the store the collective is reported when it is late."""
    made, released, reads = dist.HashStore(), threading.Event(), threading.Event()

    def read(*_: object) -> tuple[int, int]:
        reads.set()
        if store == "blocks":
            released.wait()
        if store != "answers":
            raise RuntimeError("closed")
        return 1, 0

    monkeypatch.setattr(module, "_read", read)
    monkeypatch.setattr(module, "_timeout_of", lambda *_: TIMEOUT)
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(module, "DEAD", 0.1)
    monkeypatch.setattr(Ranks, "_store", lambda _: made)
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cuda:nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda _: None)
    monkeypatch.setattr(torch, "Event", lambda *_: Event())
    ranks = Ranks(group, "on a gpu")
    monkeypatch.setattr(ranks, "missing", lambda: None)
    ranks.started("a sum")
    assert reads.wait(20)
    if store != "answers":
        ranks._timeout = 0.1
    end = time.monotonic() + 20
    while ranks._late is None and time.monotonic() < end:
        time.sleep(0.01)
    said = "rank 1 has died, or" if store == "answers" else "the group's store does not answer"
    assert said in str(ranks._late)
    released.set()
    ranks.close()


def test_a_silent_store_holds_nobody_up(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a TCPStore whose process is stopped: it blocks who asks."""
    ranks, answers = Ranks(group, "stopped"), threading.Event()

    def block() -> None:
        answers.wait()
        raise RuntimeError("closed")

    monkeypatch.setattr(ranks, "_store", block)
    monkeypatch.setattr(ranks, "_patience", 0.1)
    begin = time.monotonic()
    assert ranks.missing() is None
    assert time.monotonic() - begin < 20
    with pytest.raises(RankError, match="the group's store does not answer, and so the process that holds") as raised:
        ranks.enter("a sum", refused)
    assert raised.value.ranks == ()
    answers.set()
    ranks.close()


def refused() -> None:
    raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", "cuda:gloo", None])
def test_a_group_says_its_back_ends_in_several_ways(backend: str | None) -> None:
    group = dist.new_group([0], timeout=timedelta(seconds=50), backend=backend)
    ranks = Ranks(group, "in several ways")
    assert ranks._timeout == 50 and ranks._patience == ANSWER  # as one whose collectives the host waits for
    ranks.close()
    dist.destroy_process_group(group)


@pytest.mark.parametrize(
    ("config", "watched"),
    [("cuda:nccl", ("cuda", True)), ("cpu:gloo,cuda:nccl", ("cuda", True)), ("cpu:gloo", ("cpu", False)),
     ("cpu:mpi", ("cpu", False)), ("cuda:gloo", ("cuda", False))],
)  # fmt: skip
def test_only_a_back_end_that_lets_the_host_go_on_is_watched(config: str, watched: tuple[str, bool]) -> None:
    assert module._watched(config) == watched


def test_a_rank_gives_up_a_store_that_has_gone(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch logs every attempt to reach it, and an engine may live for days. One that comes back in time is used."""
    ranks, tried = Ranks(group, "gone"), []

    def write(_: object) -> None:
        tried.append(len(tried))
        if len(tried) not in (3, 4):
            raise RuntimeError("Broken pipe")

    clock = iter(range(1000))
    monkeypatch.setattr(ranks, "_store", dist.HashStore)
    monkeypatch.setattr(ranks, "_write", write)
    monkeypatch.setattr(ranks, "_seconds", 0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    ranks._beat()
    assert 4 + ANSWER / 2 < len(tried) < 4 + 2 * ANSWER
    monkeypatch.undo()
    ranks.close()


def test_what_others_write_under_a_rank_is_no_sign_of_it() -> None:
    store = dist.HashStore()
    assert module._read(store, 1) is None
    for written, read in (("3 2", (3, 2)), ("junk", None), ("1 2 3", None), ("", None)):
        store.set("1", written)
        assert module._read(store, 1) == read


def test_the_error_is_pickled_with_its_ranks() -> None:
    error = pickle.loads(pickle.dumps(RankError("rank 1 hangs", (1,))))
    assert type(error) is RankError and str(error) == "rank 1 hangs" and error.ranks == (1,)


def test_a_batch_on_another_gpu_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    context._check_current(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="batch is on cuda:1, and the current GPU is 0; accepted: a batch on the GPU"):
        context._check_current(torch.device("cuda", 1))
