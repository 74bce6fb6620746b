"""Histories of a `BlockPool`, their last call the one that is judged, and `cu_seqlens`.

The twin keeps whole prefixes in a list and searches it with a loop: no hash, no chain.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.case import Builder, Case, Draw, Facts, Wrong, bad, good
from tests.fuzz.junk import JUNK

Content = tuple[Hashable, tuple[int, ...]]
KEYS = ("None", "'a'", "1", "True", "1.0", "('a', 1)", "('a', True)", "np.int64(1)", "frozenset({1})", "float('inf')")


@dataclass
class Twin:
    """A pool as it should be.

    Attributes:
        free: ids of free blocks, the next one first among those without content, then among the others.
        seqs: by the variable's name, live ones.
    """

    blocks: int
    page: int
    refs: list[int] = field(default_factory=list)
    content: list[Content | None] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    seqs: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # as PoolStats

    def __post_init__(self) -> None:
        self.refs, self.content = [0] * self.blocks, [None] * self.blocks
        self.free = list(range(self.blocks))

    def order(self) -> list[int]:
        return [b for b in self.free if self.content[b] is None] + [b for b in self.free if self.content[b] is not None]

    def take(self, count: int, shared: list[int]) -> list[int] | None:
        taken = [b for b in self.order() if b not in shared][:count]
        if len(taken) < count:
            return None
        self.counts[3] += sum(self.content[b] is not None for b in taken)
        for b in shared + taken:
            self.refs[b] += 1
            if b in self.free:
                self.free.remove(b)
        for b in taken:
            self.content[b] = None
        return shared + taken

    def allocate(self, name: str, tokens: list[int], key: Hashable) -> bool:
        """Returns whether there was room."""
        shared: list[int] = []
        for end in range(self.page, len(tokens), self.page):
            prefix = (key, tuple(tokens[:end]))
            if prefix not in self.content:
                break
            shared.append(self.content.index(prefix))
        ids = self.take(-(-len(tokens) // self.page) - len(shared), shared)
        if ids is None:
            return False
        cached = len(shared) * self.page
        self.seqs[name] = {"tokens": list(tokens), "ids": ids, "cached": cached, "computed": cached, "key": key,
                           "private": False}  # fmt: skip
        for at, count in enumerate((1, len(tokens), cached)):
            self.counts[at] += count
        return True

    def append(self, name: str, token: int) -> bool:
        seq = self.seqs[name]
        if len(seq["tokens"]) % self.page == 0:
            ids = self.take(1, [])
            if ids is None:
                return False
            seq["ids"] += ids
        seq["tokens"].append(token)
        return True

    def commit(self, name: str, computed: int) -> None:
        seq = self.seqs[name]
        for i in range(seq["computed"] // self.page, computed // self.page):
            prefix = (seq["key"], tuple(seq["tokens"][: (i + 1) * self.page]))
            if not seq["private"] and prefix not in self.content:
                self.content[seq["ids"][i]] = prefix
        seq["computed"] = computed

    def release(self, name: str) -> None:
        for b in reversed(self.seqs.pop(name)["ids"]):
            self.refs[b] -= 1
            if self.refs[b] == 0:
                self.free.append(b)

    def forget(self, ids: list[int]) -> None:
        """These blocks' content, and all that begins like it, is found no more."""
        gone = [c for b in ids if (c := self.content[b]) is not None]
        out = [b for b, c in enumerate(self.content)
               if c is not None and any(c[0] == g[0] and c[1][: len(g[1])] == g[1] for g in gone)]  # fmt: skip
        for b in out:
            self.content[b] = None
        self.free = [b for b in self.free if b not in out] + [b for b in self.free if b in out]
        for seq in self.seqs.values():
            seq["private"] = seq["private"] or any(b in out for b in seq["ids"])


def check_pool(pool: Any, twin: Twin, scope: dict[str, Any]) -> None:
    """Raise unless a pool is as its twin is."""
    if pool.eviction_order() != twin.order() or pool.num_free_blocks != len(twin.free):
        raise Wrong(f"free blocks are {pool.eviction_order()}, and should be {twin.order()}")
    stats = pool.stats
    counts = [stats.prompts, stats.prompt_tokens, stats.hit_tokens, stats.evictions]
    if counts != twin.counts:
        raise Wrong(f"stats are {counts}, and should be {twin.counts}")
    for b in range(twin.blocks):
        view, content = pool.block(b), twin.content[b]
        want = (b, twin.refs[b], None if content is None else content[1][-twin.page :])
        if (view.block_id, view.ref_count, view.token_ids) != want:
            raise Wrong(f"block {b} is {view}, and should be {want}")
    for name, seq in twin.seqs.items():
        have = scope[name]
        got = (have.token_ids, have.block_ids, have.num_cached_tokens, have.num_computed_tokens, have.withdrawn)
        want_seq = (seq["tokens"], seq["ids"], seq["cached"], seq["computed"], seq["private"])
        if got != want_seq:
            raise Wrong(f"{name} is {got}, and should be {want_seq}")


def exact(key: Any) -> Hashable:
    """A key that tells types apart, which Python does not: 1, True and 1.0."""
    if isinstance(key, tuple):
        return tuple(exact(item) for item in key)
    if isinstance(key, frozenset):
        return "frozenset", frozenset(exact(item) for item in key)
    value = key.item() if hasattr(key, "item") else key
    return type(value).__name__, repr(value)


def cu_seqlens(draw: Draw) -> Case:
    lengths = [draw.choice([0, 1, 5, 100]) for _ in range(draw.randint(0, 5))]
    build = Builder(draw, "cu_seqlens", "kg.cu_seqlens", warm=0)
    form = draw.one("{}", "tuple({})", "iter({})", "torch.tensor({}, dtype=torch.int64)",
                    "np.array({}, dtype=np.int32)", "torch.tensor({} * 2, dtype=torch.int32)[::2]",
                    "[np.int64(n) for n in {}]", "(n for n in {})",
                    "torch.tensor({}, dtype=torch.uint8)", "dict.fromkeys({})")  # fmt: skip
    wrong = bad(*(code for code in JUNK if code not in ("[]", "()", "{}", "b'x'", "[1, 2]")), "[1, -1]", "[True]",
                "[2**31 - 1, 1]", "[2**31]", "['1']", "[1.0]", "[None]", "torch.tensor([1.0])",
                "torch.tensor([[1], [2]])", "torch.tensor([-1])", "torch.tensor([True])",
                "torch.ones(2).to('meta')", "np.array([1.5])", "'12'",
                "[float('nan')]", "[10**5000]", "torch.tensor([1, 2]).to_sparse()", "[[1]]", "np.zeros((2, 2), int)",
                "torch.tensor([2**62, 2**62])", "{'a': 1}", "[1j]", "[np.bool_(1)]",
                "torch.tensor([1 + 1j])")  # fmt: skip
    build.arg("lengths", form.format(lengths), wrong, good("[]", "()", "{}", "b'x'", "[1, 2]", "range(4)"))
    build.arg("device", "'cpu'", forms.device(), good("None"), leave_out=0.6)
    plain = form in ("{}", "tuple({})")

    def check(facts: Facts, result: Any) -> None:
        given = facts.args["lengths"]
        if not plain and not isinstance(given, (list, tuple, range, bytes, dict, torch.Tensor)):
            given = lengths
        numbers = list(dict.fromkeys(lengths)) if "fromkeys" in form and given is lengths else [int(n) for n in given]
        want = [sum(numbers[:i]) for i in range(len(numbers) + 1)]
        if result.tolist() != want or result.dtype != torch.int32 or result.device.type != "cpu":
            raise Wrong(f"gave {result}, and should give {want}")

    return build.finish(check)


def pool_of(draw: Draw) -> Case:
    build = Builder(draw, "BlockPool", "kg.BlockPool", warm=0)
    blocks, page = draw.randint(1, 9), draw.randint(1, 5)
    build.arg("num_blocks", str(blocks), forms.integer(1), forms.same_integer(blocks))
    build.arg("page_size", str(page), forms.integer(1), forms.same_integer(page), good("2**31 - 1"))

    def check(facts: Facts, pool: Any) -> None:
        size = int(facts.args["page_size"])
        if (pool.num_blocks, pool.page_size) != (blocks, size):
            raise Wrong(f"it has {pool.num_blocks} blocks of {pool.page_size}")
        check_pool(pool, Twin(blocks, size), {})

    return build.finish(check)
