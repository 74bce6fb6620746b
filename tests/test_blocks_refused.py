"""What the block pool refuses: each error names the argument, and the pool is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvgather.blocks import BlockPool, cu_seqlens
from tests.prompts import PROMPT, snapshot

BAD_DEVICES = [
    ("gpu", ValueError, r"device is 'gpu'; accepted: a torch.device or its name"),
    (3.5, TypeError, r"device is float 3.5; accepted: a torch.device or its name"),
    ("meta", ValueError, r"device is meta, which holds no values; accepted: a GPU, or cpu"),
    ("cuda:99", ValueError, r"device is cuda:99, and torch sees \d+ GPUs here; accepted: one of those, or cpu"),
]


@pytest.mark.parametrize(("device", "error", "message"), BAD_DEVICES)
def test_bad_devices(device: Any, error: type[Exception], message: str) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    seq = pool.allocate(PROMPT)
    for call in (lambda: pool.slots(seq, device=device), lambda: pool.block_table([seq], device=device)):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message):
        cu_seqlens([1, 2], device)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (5, TypeError, r"lengths is 5; accepted: a list of integers, or an integer tensor \[n\]"),
        (None, TypeError, r"lengths is None; accepted: a list of integers"),
        (["a"], TypeError, r"lengths\[0\] is str 'a'; accepted: an int"),
        (torch.tensor([1, 2], device="meta"), ValueError, r"lengths is on meta, which holds no values; accepted"),
        (torch.tensor([1, 2]).to_sparse(), ValueError, r"lengths has layout torch.sparse_coo; accepted: a dense"),
        (torch.tensor([1.0]), TypeError, r"lengths\[0\] is float 1.0; accepted: an int"),
        (torch.tensor(3), TypeError, r"lengths is 3; accepted: a list of integers"),
    ],
    ids=["int", "none", "str", "meta", "sparse", "float", "scalar"],
)
def test_bad_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cu_seqlens(lengths)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "token_ids is empty; accepted: at least one token"),
        ([1, -5], ValueError, r"token_ids\[1\] is -5; accepted: 0 to"),
        ([2**63], ValueError, r"token_ids\[0\] is 9223372036854775808"),
        ([1.0], TypeError, r"token_ids\[0\] is float"),
        ([True], TypeError, r"token_ids\[0\] is bool"),
        (["a"], TypeError, r"token_ids\[0\] is str"),
        (7, TypeError, "token_ids is 7; accepted: a list of integers"),
        (torch.tensor(7), TypeError, "token_ids is 7; accepted: a list of integers"),
        (torch.tensor([[1, 2]]), TypeError, r"token_ids\[0\] is list"),
        (torch.tensor([0.5]), TypeError, r"token_ids\[0\] is float"),
        (torch.tensor([1], device="meta"), ValueError, "token_ids is on meta, which holds no values; accepted"),
        (torch.tensor([1]).to_sparse(), ValueError, "token_ids has layout torch.sparse_coo; accepted: a dense"),
    ],
)
def test_bad_tokens_raise_and_change_nothing(tokens: Any, error: type[Exception], message: str) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    before = snapshot(pool)
    with pytest.raises(error, match=message):
        pool.allocate(tokens)
    assert snapshot(pool) == before


def test_bad_extra_key_and_bad_appended_token() -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    with pytest.raises(TypeError, match="extra_key is of too many digits to print; accepted: any hashable value"):
        BlockPool(4, 4).allocate([1], extra_key=[10**5000])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"extra_key is \['a'\]; accepted: any hashable value"):
        pool.allocate([1], ["a"])
    seq = pool.allocate([1, 2, 3, 4])
    before = snapshot(pool, seq)
    for bad, error in [(-1, ValueError), (1.5, TypeError), (None, TypeError)]:
        with pytest.raises(error, match="token_id is"):
            pool.append(seq, bad)
    assert snapshot(pool, seq) == before


@pytest.mark.parametrize("computed", [3, 11, -1])
def test_commit_out_of_range(computed: int) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    seq = pool.allocate(PROMPT)
    pool.commit(seq, 4)
    with pytest.raises(ValueError, match=rf"num_computed_tokens is {computed}; accepted: 4 to 10"):
        pool.commit(seq, computed)
    with pytest.raises(TypeError, match="num_computed_tokens is float"):
        pool.commit(seq, 5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["append", "commit", "free", "withdraw", "slots", "block_table"])
def test_freed_foreign_and_wrong_sequences_raise(call: str) -> None:
    pool, other = BlockPool(4, 4), BlockPool(4, 4)
    freed, foreign = pool.allocate([1]), other.allocate([1])
    pool.free(freed)

    def use(seq: Any) -> None:
        arguments = {"append": (seq, 1), "block_table": ([seq],)}.get(call, (seq,))
        getattr(pool, call)(*arguments)

    before, name = snapshot(pool), r"seqs\[0\]" if call == "block_table" else "seq"
    with pytest.raises(ValueError, match=f"^{name} was freed already"):
        use(freed)
    with pytest.raises(ValueError, match=f"^{name} belongs to another pool"):
        use(foreign)
    with pytest.raises(TypeError, match=rf"^{name} is a list; accepted: what BlockPool\.allocate returned"):
        use([0])
    assert snapshot(pool) == before


@pytest.mark.parametrize("argument", ["num_blocks", "page_size"])
def test_bad_pool_arguments(argument: str) -> None:
    good = {"num_blocks": 4, "page_size": 4}
    with pytest.raises(ValueError, match=f"{argument} is 0; accepted: 1 to"):
        BlockPool(**{**good, argument: 0})
    with pytest.raises(TypeError, match=f"{argument} is float"):
        BlockPool(**{**good, argument: 4.0})


def test_bad_ranges_and_ids() -> None:
    pool = BlockPool(4, 4)
    seq = pool.allocate(PROMPT)
    with pytest.raises(ValueError, match="end is 11; accepted: 0 to 10"):
        pool.slots(seq, 0, 11)
    with pytest.raises(ValueError, match="start is 6; accepted: 0 to 5"):
        pool.slots(seq, 6, 5)
    with pytest.raises(ValueError, match="block_id is 4; accepted: 0 to 3"):
        pool.block(4)
