"""The engines' call finds each page itself: in one launch, with the same rows as a plan, whatever the table holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvgather as kg
from kvgather.gather import again, compat
from kvgather.lab.fence import fenced
from kvgather.lab.trace import trace
from kvgather.plan import cut_sources, records_by_torch
from tests.gather.oracle import assert_same, untouched
from tests.where import CPU, GPU, interpreted, on_each_device

BLOCKS, INT64_MAX = 10, 2**63 - 1
IDS = st.one_of(st.integers(-2, BLOCKS + 2), st.sampled_from([INT64_MAX, -(2**63), 2**32]))
OFFSETS = st.one_of(st.integers(-3, 40), st.sampled_from([INT64_MAX, -(2**63), 2**40]))
STARTS = st.one_of(st.integers(-3, 20), st.sampled_from([INT64_MAX, INT64_MAX - 1, -(2**63)]))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    batch, columns = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    rows = st.lists(IDS, min_size=columns, max_size=columns)
    rising = draw(st.booleans())
    steps = draw(st.lists(st.integers(0, 9) if rising else OFFSETS, min_size=batch + 1, max_size=batch + 1))
    offsets = torch.tensor([0, *steps[:-1]]).cumsum(0) if rising else torch.tensor(steps)
    return {
        "table": torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch))).reshape(batch, columns).long(),
        "offsets": offsets,
        "starts": torch.tensor(draw(st.lists(STARTS, min_size=batch, max_size=batch))).long() if draw(st.booleans())
        else None,
        "page_size": draw(st.sampled_from([1, 3, 4, 16])),
        "total": draw(st.integers(0, 40)),
    }  # fmt: skip


def fits_int32(batch: dict[str, Any]) -> bool:
    tensors = [batch["table"], batch["offsets"], batch["starts"]]
    return all(t is None or not t.numel() or (t.abs().max() < 2**31 and t.min() > -(2**31)) for t in tensors)


def assert_same_records(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], sequences: int) -> None:
    """The same records, from the same offsets; and from the same places, where there are rows."""
    assert torch.equal(got[0], wanted[0])
    (offsets, origin), (wanted_offsets, wanted_origin) = (
        cut_sources(each[1], sequences, len(each[0])) for each in (got, wanted)
    )
    used = wanted[0][:, 2] > 0
    assert torch.equal(offsets, wanted_offsets) and torch.equal(origin[used], wanted_origin[used])


@interpreted
@given(batch=batches())
@settings(max_examples=40)
def test_the_kernel_makes_the_plan_that_plain_torch_makes(batch: dict[str, Any]) -> None:
    from kvgather.plan_kernel import plan_records

    sequences, page_size, total = len(batch["table"]), batch["page_size"], batch["total"]
    capacity = -(-total // page_size) + 2 * sequences if sequences and total else 0
    if not capacity:
        return
    for dtype in (torch.int32, torch.int64) if fits_int32(batch) else (torch.int64,):
        tensors = [None if batch[name] is None else batch[name].to(dtype) for name in ("table", "offsets", "starts")]
        wanted = records_by_torch(*tensors, page_size, BLOCKS, total, capacity)
        got = plan_records(*tensors, page_size, BLOCKS, total, capacity)
        assert_same_records(got, wanted, sequences)


@pytest.mark.parametrize(
    ("sequences", "where"), [*[pytest.param(n, *CPU.values, marks=CPU.marks) for n in (20, 33)],
                             *[pytest.param(n, *GPU.values, marks=GPU.marks) for n in (20, 33, 300)]],
)  # fmt: skip
def test_many_sequences(sequences: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More offsets than a program looks at together."""
    from kvgather import plan_kernel

    if sequences == 20:
        monkeypatch.setattr(plan_kernel, "offset_lanes", lambda batch: 8)
    plan_records = plan_kernel.plan_records
    lengths = torch.arange(sequences, device=where) * 7 % 5
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    offsets[sequences // 2] = -4  # falls
    table = torch.arange(sequences * 3, device=where).view(-1, 3) % (BLOCKS + 1)
    starts, total = torch.arange(sequences, device=where) % 4, int(offsets[-1])
    arguments = (table, offsets, starts, 4, BLOCKS, total, -(-total // 4) + 2 * sequences)
    assert_same_records(plan_records(*arguments), records_by_torch(*arguments), sequences)


def call(layout: str, where: str, batch: dict[str, Any], rows: int, **changes: Any) -> dict[str, Any]:
    """A call of `cp_mha_gather_cache` on a batch, with per-tensor scales."""
    torch.manual_seed(1)
    page = batch["page_size"]
    cache = kg.PagedKVCache(BLOCKS, page, 2, 16, layout=layout, device=where)
    for pool in (cache.key_cache, cache.value_cache):
        pool.view(torch.uint8).random_(0, 120)
    out = [untouched((rows, 2, 16), torch.bfloat16, where) for _ in range(2)]
    return {
        "key_cache": cache.key_cache, "value_cache": cache.value_cache, "key": out[0], "value": out[1],
        "block_tables": batch["table"].to(where, copy=True), "k_scales": torch.tensor([0.5], device=where),
        "v_scales": torch.tensor([2.0], device=where), "cu_seqlens_kv": batch["offsets"].to(where, copy=True),
        "token_to_batch": None, "seq_starts": None if batch["starts"] is None else batch["starts"].to(where, copy=True),
        "dequant": True, "kv_cache_layout": layout, "total_tokens": batch["total"], **changes,
    }  # fmt: skip


def through_a_plan(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a call should fill in, by a plan and plain torch; NaN where the plan says so, nothing elsewhere."""
    pools = arguments["key_cache"], arguments["value_cache"]
    plan = kg.GatherPlan.build(
        arguments["block_tables"], arguments["cu_seqlens_kv"], num_blocks=len(pools[0]),
        page_size=pools[0].shape[{"NHD": 1, "HND": 2, "SHUFFLE": 3}[arguments["kv_cache_layout"]]],
        total_tokens=arguments["total_tokens"], seq_starts=arguments["seq_starts"],
    )  # fmt: skip
    out = arguments["key"].clone(), arguments["value"].clone()
    kg.gather(
        *pools, plan, layout=arguments["kv_cache_layout"], k_scale=arguments["k_scales"],
        v_scale=arguments["v_scales"], out=out, backend="torch",
    )  # fmt: skip
    return out


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines' call takes the path that it takes on a GPU."""
    monkeypatch.setattr(compat, "choose_backend", lambda *_: "triton")
    again.forget()


@interpreted
@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
@given(batch=batches())
@settings(max_examples=10)
def test_any_table_and_any_offsets(layout: str, batch: dict[str, Any]) -> None:
    batch = {**batch, "page_size": 16 if layout == "SHUFFLE" else batch["page_size"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "choose_backend", lambda *_: "triton")
        for _ in range(2):  # the second call is known
            arguments = call(layout, "cpu", batch, batch["total"] + 2)
            wanted = through_a_plan(arguments)
            kg.cp_mha_gather_cache(**arguments)
            assert_same((arguments["key"], arguments["value"]), wanted)


GOOD: dict[str, Any] = {
    "table": torch.tensor([[7, 2, 5], [0, 9, 3]], dtype=torch.int32), "offsets": torch.tensor([0, 6, 8]).int(),
    "starts": torch.tensor([3, 5]).int(), "page_size": 4, "total": 8,
}  # fmt: skip


@on_each_device
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_call_that_is_known_is_the_same(layout: str, where: str, by_triton: None) -> None:
    """Other tensors of the same kinds: other addresses, tables, offsets, lengths of the batch."""
    launched: list[int] = []
    for shift, sequences in ((0, 2), (1, 2), (2, 1), (3, 2)):
        batch = {
            **GOOD, "table": (GOOD["table"][:sequences] + shift) % (BLOCKS + shift % 2),
            "offsets": GOOD["offsets"][: sequences + 1], "starts": GOOD["starts"][:sequences],
            "total": int(GOOD["offsets"][sequences]),
        }  # fmt: skip
        arguments = call(layout, where, batch, 8 + shift)
        wanted = through_a_plan(arguments)
        kg.cp_mha_gather_cache(**arguments)
        assert_same((arguments["key"], arguments["value"]), wanted)
        launched.append(len(again._CALLS))
    assert launched == [1, 1, 1, 1]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "fewer rows": ({"total_tokens": 12}, r"key has shape \[10, 2, 16\]; accepted: at least 12 rows"),
    "offsets": ({"cu_seqlens_kv": torch.zeros(4).int()}, r"cu_seqlens_kv has shape \[4\]; accepted for 2 sequences"),
    "starts": ({"seq_starts": torch.zeros(1).int()}, r"seq_starts has shape \[1\]; accepted for 2 sequences: \[2\]"),
    "tokens": ({"token_to_batch": torch.zeros(7).int()}, r"token_to_batch has shape \[7\]; accepted: at least \[8\]"),
    "total": ({"total_tokens": -1}, r"total_tokens is -1; accepted: 0 to"),
    "no total": ({"total_tokens": True}, r"total_tokens is bool True; accepted: an int"),
    "a flag": ({"dequant": 1}, r"dequant is int 1; accepted: True or False"),
    "scale": ({"k_scales": torch.ones(3)}, r"k_scales has shape \[3\]; accepted for 2 heads"),
    "its value": ({"k_scales": torch.zeros(1)}, r"k_scales is 0.0 at \[0\]; accepted: finite values above 0"),
    "its dtype": ({"v_scales": torch.ones(1).half()}, r"v_scales has dtype float16; accepted: float32"),
    "a number": ({"k_scales": float("nan")}, r"k_scales is nan; accepted: finite values above 0"),
    "a table of floats": ({"block_tables": torch.ones(2, 3)}, r"block_tables has dtype float32; accepted: int32"),
    "a table on its side": ({"block_tables": torch.ones(6).int()}, r"block_tables has shape \[6\]; accepted: 2 dim"),
    "rows of another head": ({"key": torch.ones(10, 3, 16).bfloat16()}, r"key has shape \[10, 3, 16\]; accepted"),
    "rows of another dtype": ({"value": torch.ones(10, 2, 16)}, r"value has dtype float32; accepted: bfloat16"),
}


@interpreted
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_call_drops_no_check(mistake: str, by_triton: None) -> None:
    good = call("NHD", "cpu", GOOD, 10)
    known = {**good, "token_to_batch": torch.zeros(8).int()}
    for arguments in (good, known, {**good, "k_scales": 0.5}):
        kg.cp_mha_gather_cache(**arguments)
    change, message = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=message):
        kg.cp_mha_gather_cache(**{**good, **change})


@interpreted
@pytest.mark.parametrize(
    "name", ["key_cache", "value_cache", "key", "value", "block_tables", "k_scales", "cu_seqlens_kv", "seq_starts",
             "token_to_batch"],
)  # fmt: skip
def test_memory_that_went_away_after_a_call(name: str, by_triton: None) -> None:
    arguments = call("NHD", "cpu", GOOD, 10, token_to_batch=torch.zeros(8).int())
    kg.cp_mha_gather_cache(**arguments)
    memory = arguments[name].untyped_storage()
    memory.resize_(memory.nbytes() - 1)
    with pytest.raises(ValueError, match=rf"{name} with shape .* reaches byte .* of its memory, which has"):
        kg.cp_mha_gather_cache(**arguments)


@interpreted
def test_a_known_call_writes_over_nothing(by_triton: None) -> None:
    arguments = call("NHD", "cpu", GOOD, 10)
    arguments["key_cache"] = arguments["key_cache"].float().bfloat16()
    arguments["value_cache"] = arguments["value_cache"].float().bfloat16()
    kg.cp_mha_gather_cache(**arguments)
    pool = arguments["value_cache"].view(-1)
    for changes in (
        {"key": pool[: 10 * 32].view(10, 2, 16)},
        {"value": pool[-10 * 32 :].view(10, 2, 16)},
        {"key": arguments["value"]},
        {"value": arguments["key"][1:], "key": arguments["key"][:-1]},
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"(key|value) shares memory with a cache, a scale or the other"):
                kg.cp_mha_gather_cache(**{**arguments, **changes})


@interpreted
def test_a_known_call_writes_over_no_scale(by_triton: None) -> None:
    """A scale that lies in the rows' memory has the signature of any other scale."""
    memory = torch.ones(2 * 10 * 32 + 8)
    rows = [memory[i * 320 : (i + 1) * 320].view(10, 2, 16) for i in range(2)]
    arguments = call("NHD", "cpu", GOOD, 10, key=rows[0], value=rows[1])
    kg.cp_mha_gather_cache(**arguments)
    for name, at in (("k_scales", 5), ("v_scales", 325), ("k_scales", 639), ("v_scales", 0)):
        with pytest.raises(ValueError, match=r"(key|value) shares memory with a cache, a scale or the other output"):
            kg.cp_mha_gather_cache(**{**arguments, name: memory[at : at + 1].fill_(1)})
    for name in ("k_scales", "v_scales"):
        kg.cp_mha_gather_cache(**{**arguments, name: memory[640:641]})


@interpreted
def test_a_known_call_is_known_by_alignment(by_triton: None) -> None:
    """What a GPU compiled for addresses that are multiples of 16 may not be launched for others."""
    memory = torch.empty(2, 330, dtype=torch.bfloat16)
    for count, offset in ((1, 0), (2, 1), (2, 0), (2, 1), (3, 4)):
        out = [row[offset : offset + 320].view(10, 2, 16) for row in memory]
        kg.cp_mha_gather_cache(**call("NHD", "cpu", GOOD, 10, key=out[0], value=out[1]))
        assert sum(map(len, again._CALLS.values())) == count


@interpreted
def test_rows_between_each_others_rows(by_triton: None) -> None:
    """K and V in one workspace, row by row: intervals of addresses meet, and no element is shared."""
    workspace = untouched((10, 2, 2, 16), torch.bfloat16)
    arguments = call("NHD", "cpu", GOOD, 10)
    wanted = through_a_plan(arguments)
    for _ in range(2):
        kg.cp_mha_gather_cache(**{**arguments, "key": workspace[:, 0], "value": workspace[:, 1]})
        assert_same((workspace[:, 0], workspace[:, 1]), wanted)


WORST: dict[str, Any] = {
    "table": torch.tensor([[BLOCKS, -1, 5, 2**31 - 1], [0, BLOCKS - 1, -(2**31), 3], [9, 9, 9, 9]]).int(),
    "offsets": torch.tensor([-5, 30, 12, 2**31 - 1]).int(), "starts": torch.tensor([-7, 50, 2**31 - 1]).int(),
    "page_size": 16, "total": 60,
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_nothing_is_read_or_written_outside(layout: str, by_triton: None) -> None:
    """Bad ids, offsets that fall and pass the total, starts that begin nowhere: under the trace, which is strict."""
    for batch in (WORST, {**GOOD, "page_size": 16}, {**WORST, "starts": None, "table": WORST["table"][:, ::2]}):
        arguments = call(layout, "cpu", batch, batch["total"])
        wanted = through_a_plan(arguments)
        for _ in range(2):
            with trace(strict=True) as report:
                kg.cp_mha_gather_cache(**arguments)
            assert not report.violations, report.report()
            assert [launch.kernel for launch in report.launches] == ["gather_kernel"]
            assert_same((arguments["key"], arguments["value"]), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["after", "before"])
def test_nothing_is_read_or_written_outside_on_a_gpu(where: str) -> None:
    """Each tensor at the edge of memory that faults, and a table of bad ids: the context lives on."""
    pytest.importorskip("cuda.bindings.driver", reason="a fence on an NVIDIA GPU needs cuda-bindings")
    arguments = call("SHUFFLE", "cuda", WORST, WORST["total"])
    wanted = through_a_plan(arguments)
    edge = {
        name: fenced(value, "cuda", where) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    kg.cp_mha_gather_cache(**edge)
    torch.cuda.synchronize()
    assert_same((edge["key"], edge["value"]), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["tensors", "numbers"])
def test_the_engines_call_is_one_kernel(scales: str) -> None:
    numbers = {"k_scales": 0.5, "v_scales": 2.0} if scales == "numbers" else {}
    arguments = call("SHUFFLE", "cuda", {**GOOD, "page_size": 16}, 8, **numbers)
    kg.cp_mha_gather_cache(**arguments)
    again.forget()
    for _ in range(2):  # also the first of its kind
        torch.cuda.synchronize()
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        with profiler as profile:
            kg.cp_mha_gather_cache(**arguments)
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1 and "gather_kernel" in kernels[0], kernels


@pytest.mark.gpu
def test_addresses_of_another_alignment_are_another_kernel() -> None:
    """Triton compiles for addresses that are multiples of 16: rows at others must not go through that kernel."""
    batch = {**GOOD, "page_size": 16}
    arguments = call("NHD", "cuda", batch, 8)
    wanted = through_a_plan(arguments)
    memory = torch.empty(2, 8 * 32 + 8, dtype=torch.bfloat16, device="cuda")
    for offset in (0, 1, 8, 3, 0):
        out = [row[offset : offset + 8 * 32].view(8, 2, 16).fill_(7) for row in memory]
        kg.cp_mha_gather_cache(**{**arguments, "key": out[0], "value": out[1]})
        assert_same((out[0], out[1]), wanted)
