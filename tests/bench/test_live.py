"""The live measurement of chapter 07: implementations in turns, on a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvgather.bench import live, turns
from kvgather.bench.implementations import ours
from kvgather.cases import Case

CPU = torch.device("cpu")
CASE = Case(layout="SHUFFLE", num_heads=2, k_dim=16, v_dim=16, lengths=(37, 5), starts=())


def test_a_row_for_each_implementation_and_for_the_copy() -> None:
    rows = live.measure_in_turns(CASE, CPU, seconds=1e-9)
    assert [row.implementation for row in rows] == ["kvgather", "torch index", "contiguous copy"]
    assert {row.samples for row in rows} == {turns.CPU_TURNS}
    assert {row.bytes for row in rows} == {42 * 2 * 32 * 3}
    assert all(0 < row.p20_us <= row.p50_us <= row.p80_us for row in rows)


def test_wrong_rows_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(built, out):
        call = ours(built, out)
        return lambda: (call(), out[1].mul_(2))

    monkeypatch.setattr(live, "torch_index", wrong)
    with pytest.raises(ArithmeticError, match="torch index is not the reference"):
        live.measure_in_turns(CASE, CPU, seconds=1e-9)


def test_on_a_cpu_one_call_of_each_is_a_turn() -> None:
    order: list[str] = []
    ways = {name: [partial(order.append, f"{name}{i}") for i in range(2)] for name in ("a", "b")}
    timings = turns.time_in_turns(ways, CPU, seconds=1e-9)
    assert order[4:12] == ["b0", "a0", "a1", "b1", "b0", "a0", "a1", "b1"]  # after the warm-up
    assert {timing.samples for timing in timings.values()} == {turns.CPU_TURNS}
