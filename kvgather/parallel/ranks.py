"""Who is missing: each rank tells the group's store how far it is, so that a collective that fails can name a rank.

The back end notices that a peer has died, or the group's time-out ends its wait, and says so without a rank. Each rank
therefore has a thread that writes two numbers to the store of the group once in a while: how often it has written, and
how many collectives it has entered. A rank whose first number stands still is dead; one whose second number is behind
hangs before the collective.

A collective on a GPU does not raise: it waits there, and the host goes on. Another thread therefore looks whether the
newest one has finished. If not after most of the time-out, it writes who is missing to stderr and aborts the group's
operations, so that the GPU waits no longer; the next call raises.

A rank that has died is reported about 35 seconds after the start of the collective that waits for it, however long the
time-out is. Over a network, the back end reports the lost peer at once, and torch's watchdog then ends the process
after a minute, without the name of a rank. A third thread therefore reads the other ranks' numbers while the newest
collective has not been seen to finish.

The store may stop to answer, and then it blocks who asks. Whoever waits for it is therefore a thread that does nothing
else, and nobody waits for that thread without a bound.

All these threads need the GIL. While a caller keeps it and waits for the GPU, as the copies of Triton's interpreter do,
nobody is named. Torch's watchdog then waits for the GIL, too, until torch's heartbeat monitor ends the process.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

LATE = 0.7
"""Share of the time-out after which a collective on a GPU counts as failed: before torch's watchdog reports it."""
DEAD = 30.0
"""Seconds without a sign after which a rank is reported as dead, even if the collective is not late yet.

Long, because a live rank gives no sign while another of its threads keeps the GIL. Less than the minute after which
torch's watchdog ends the process.
"""
LOOK = 2.0
"""Seconds between two looks for dead ranks."""
BEAT = 0.5
"""Seconds between two messages of a rank; less for a group with a short time-out."""
MISSED = 4
"""Beats without news after which a rank counts as dead; on a CPU after `SILENCE` seconds at least."""
SILENCE = 1.0
ANSWER = 5.0
"""Seconds in which the store has to answer; less for a group of GPUs with a short time-out."""
_MADE: Counter[str] = Counter()
"""How many `Ranks` of a name this process has made: several of one group must not write to the same keys."""


class RankError(RuntimeError):
    """A collective failed, because a rank has died, hangs, or does something else.

    Attributes:
        ranks: the ranks of the group that are missing, as far as the others can tell.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        """Pickled with the ranks, as a pool of processes sends it."""
        return type(self), (str(self), self.ranks)


class Ranks:
    """The ranks of a group, and what is known of each.

    Attributes:
        rank, size: this process in the group, and how many there are.
        entered: collectives that this rank has entered.
    """

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self._group: dist.ProcessGroup | None = group
        self._group_store: Any = None
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.entered = 0
        self._beats = 0
        device, on_gpu = _watched(dist.get_backend_config(group))
        self._timeout = _timeout_of(group, device)
        self._seconds = min(BEAT, self._timeout / (8 * MISSED))
        # Ranks on a GPU are asked before the time-out is over, and have to answer until then; on a CPU after it.
        self._silence = MISSED * self._seconds if on_gpu else max(MISSED * self._seconds, SILENCE)
        self._patience = min(ANSWER, self._timeout / 8) if on_gpu else ANSWER
        self._newest: tuple[torch.Event, float, str] | None = None  # the end of the newest collective on a GPU
        self._over: object = None  # the newest collective that was seen to have finished
        self._looked: object = None  # the collective of the last look for dead ranks
        self._signs: dict[int, tuple[int, int]] = {}  # of each rank: its beats, and the looks at which they stood still
        self._dead: tuple[object, dict[int, str]] = None, {}  # a collective, and the ranks that died during it
        self._late: RankError | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        if self.size > 1:
            _MADE[name] += 1
            self._prefix = f"kvgather/{name}/{_MADE[name]}"
            self._group_store = group.get_group_store()
            self._write(self._store())
            self._start(self._beat)
            if on_gpu:
                self._start(self._watch)
                self._start(self._listen)
        atexit.register(self.close)

    @property
    def group(self) -> dist.ProcessGroup:
        """The group.

        Raises:
            RuntimeError: after `close`.
        """
        if self._group is None:
            raise RuntimeError("this ContextParallel is closed; accepted: calls before close()")
        return self._group

    def close(self) -> None:
        """Stop the threads, and forget the group. The other ranks regard this one as dead from then on.

        Both must happen before the interpreter ends: a thread that then talks to the store, or one of the group's that
        then frees a collective's tensors, aborts the process. The group's threads end with the last reference to it.
        """
        self._ended.set()
        end = time.monotonic() + ANSWER
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._threads.clear()
        self._group = self._group_store = None
        atexit.unregister(self.close)

    def _start(self, target: Callable[[], object]) -> None:
        thread = threading.Thread(target=target, name="kvgather ranks", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _store(self) -> Any:
        """A connection to the store, for one thread: a thread that waits on the store holds up others that share it."""
        if (store := self._group_store) is None:
            raise RuntimeError("closed")
        return distributed_c10d.PrefixStore(self._prefix, store.clone())

    def enter(self, what: str, collective: Callable[..., object], *arguments: object) -> None:
        """Run a collective, and turn its failure into an error that names the missing ranks.

        Args:
            what: its name, for errors.
            collective: a function of torch.distributed that does not return its `Work`.
            arguments: of it.

        Raises:
            RankError: the back end raised, or an earlier collective on a GPU has not ended in time.
        """
        if self._late is not None:
            raise self._late
        self.entered += 1
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise self._named(what, error, self.missing()) from error

    def started(self, what: str) -> None:
        """Watch a collective for which the current stream of a GPU waits.

        By an event, which takes 2 µs: keeping the collective's own `Work` takes 27, when it is freed. `torch.Event`
        finds the current stream itself; `torch.cuda.Event` creates a `torch.cuda.Stream` for that, in Python.
        """
        event = torch.Event("cuda") if self._newest is None else self._newest[0]
        self._newest = event, time.monotonic(), what
        event.record()  # last: the thread must not find it unfinished with the time of the collective before

    def _look_at_newest(self) -> None:
        newest = self._newest
        if newest is None or newest is self._over or self._late is not None:
            return
        _, since, what = newest
        seconds = time.monotonic() - since
        during, dead = self._dead
        if during is not newest:
            dead = {}
        # A late query, and few of them: each would end a CUDA graph's capture in another thread.
        if (seconds < LATE * self._timeout and not dead) or not self._unfinished(newest):
            return
        error = RuntimeError(f"the collective has not ended after {seconds:.0f} s")
        late = self._named(what, error, dead or self.missing())
        if self._unfinished(newest):  # still, after the time that it took to ask the others
            self._late = late
            sys.stderr.write(f"kvgather: {late}\n")
            with contextlib.suppress(RuntimeError):  # closed meanwhile, or nothing is left to abort
                self.group.abort()  # the GPU would wait for ever, and with it a host that synchronizes

    def _unfinished(self, newest: tuple[torch.Event, float, str]) -> bool:
        """Whether a collective is the newest one, and has not finished."""
        event, _, what = newest
        try:
            if event.query():
                self._over = newest
                return False
        except RuntimeError:  # a capture, or a GPU that has failed, of which the host's next call hears
            if self._newest is newest:
                self._newest = event, time.monotonic(), what  # asked again after as long a wait
            return False
        return self._newest is newest  # else the event has been recorded again

    def _look_for_dead(self, store: Any) -> None:
        """Find the ranks that have given no sign for `DEAD` seconds during the newest collective.

        Counts looks instead of seconds: a store that stops for a while keeps back the signs of live ranks, too.
        """
        newest = self._newest
        if newest is None or newest is self._over or self._late is not None:
            return
        if newest is not self._looked:  # a new one: nothing is read as long as collectives follow each other
            self._looked, self._signs = newest, {}
            return
        for rank in range(self.size):
            if rank != self.rank and (read := _read(store, rank)) is not None:
                beats, still = self._signs.get(rank, (0, 0))
                self._signs[rank] = read[0], still + 1 if read[0] == beats else 0
        dead = [rank for rank, (_, still) in self._signs.items() if still * LOOK >= DEAD]
        self._dead = newest, dict.fromkeys(dead, _silent(DEAD))

    def _named(self, what: str, error: RuntimeError, missing: dict[int, str] | None) -> RankError:
        said = str(error).strip().splitlines()[0]
        if missing:
            who = "; ".join(f"rank {rank} {state}" for rank, state in missing.items())
        elif missing is None:
            who = "the group's store does not answer, and so the process that holds it has died or hangs"
        else:
            who = "every rank answers, and has entered this collective"
        return RankError(f"rank {self.rank}: {what} of {self.size} ranks failed: {who}. {said}", tuple(missing or ()))

    def missing(self) -> dict[int, str] | None:
        """What is wrong with each rank that is missing; None if the store does not answer. Takes a few beats."""
        found: list[dict[int, str]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                found.append(self._ask())

        asking = threading.Thread(target=ask, name="kvgather asks", daemon=True)
        asking.start()
        asking.join(self._silence + self._patience)
        return found[0] if found else None

    def _ask(self) -> dict[int, str]:
        store = self._store()
        before = [_read(store, rank) for rank in range(self.size)]
        self._ended.wait(self._silence)
        after = [_read(store, rank) for rank in range(self.size)]
        missing = {}
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            if rank == self.rank:
                continue
            if new is None:
                missing[rank] = "has made no ContextParallel of this group"
            elif old == new:
                missing[rank] = _silent(self._silence)
            elif new[1] < self.entered:
                missing[rank] = f"hangs, or does something else: it has entered {new[1]} of {self.entered} collectives"
        return missing

    def _write(self, store: Any) -> None:
        self._beats += 1
        store.set(str(self.rank), f"{self._beats} {self.entered}")

    def _beat(self) -> None:
        store: Any = None
        written = time.monotonic()
        while not self._ended.wait(self._seconds):
            try:
                store = store or self._store()
                self._write(store)
                written = time.monotonic()
            except (RuntimeError, dist.DistError):
                # One failure makes no dead rank. But torch logs each, and a store whose process has ended stays away.
                if time.monotonic() - written > ANSWER:
                    return

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self._look_at_newest()

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store has gone: `_watch` goes on
            store = self._store()
            while not self._ended.wait(LOOK):
                self._look_for_dead(store)


def _silent(seconds: float) -> str:
    """What is wrong with a rank that has written nothing for so long."""
    return f"has died, or stands still: it gave no sign for {seconds:.2g} s"


def _read(store: Any, rank: int) -> tuple[int, int] | None:
    """How often a rank has written, and how many collectives it has entered; None if it has not written that."""
    key = str(rank)
    if not store.check([key]):
        return None
    try:
        beats, entered = map(int, store.get(key).decode().split())
    except ValueError:
        return None
    return beats, entered


def _watched(config: str) -> tuple[str, bool]:
    """The device whose collectives are watched, and whether it waits for them itself while the host goes on.

    Args:
        config: a group's back end for each type of device, such as "cpu:gloo,cuda:nccl".
    """
    backends = dict(pair.split(":") for pair in config.split(","))
    for device, backend in backends.items():
        if device != "cpu" and backend != "gloo":  # gloo makes the host wait, also for tensors on a GPU
            return device, True
    return next(iter(backends)), False


def _timeout_of(group: dist.ProcessGroup, device: str) -> float:
    """The time-out of a group's collectives on a type of device, in seconds."""
    options: Any = getattr(group._get_backend(torch.device(device)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return 600.0 if timeout is None else float(timeout.total_seconds())
