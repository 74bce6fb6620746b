"""Tensor parallelism on gloo ranks: tokens as of one process, pools of each rank's heads, ranks that die or hang."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather import cli
from kvgather.lab.child import run_module
from kvgather.parallel.heads import heads_of
from kvgather.replay.process import HOST, free_port
from tests.parallel import ranks as each
from tests.parallel.killed import check_replay_with_a_killed_rank, figure

REPLAY = ["replay", "--device", "cpu", "--commit", "abc", "--ranks", "2"]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return {
        name: {
            "elements": each.elements(each.model(name)),
            "fp32": each.run(each.engine(each.model(name), each.FP32)),
            "fp8": each.run(each.engine(each.model(name), each.FP8)),
        }
        for name in each.CONFIGS
    }


@pytest.fixture(scope="module", params=[2, 3])
def on_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """What each rank has saved."""
    folder = tmp_path_factory.mktemp("ranks")
    each.model("tiny-6").save_pretrained(folder / "model")
    child = run_module(
        "torch.distributed.run", "--nproc-per-node", f"{request.param}", "--master-addr", HOST, "--master-port",
        f"{free_port()}", "-m", "tests.parallel.ranks", str(folder), device="cpu", timeout=120,
    )  # fmt: skip
    assert child.code == 0, child.stderr
    yield [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", each.CONFIGS)
def test_tokens_are_those_of_one_process(name: str, on_ranks: Results, one_process: dict[str, Any]) -> None:
    tokens, _ = on_ranks[0][name]["fp32"]
    assert tokens == one_process[name]["fp32"][0] and len({tuple(answer) for answer in tokens}) > 4


def test_a_model_of_a_folder(on_ranks: Results, one_process: dict[str, Any]) -> None:
    assert on_ranks[0]["folder"][0] == one_process["tiny-6"]["fp32"][0]


@pytest.mark.parametrize("name", each.CONFIGS)
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_pools_hold_the_heads_of_their_rank(
    name: str, dtype: str, on_ranks: Results, one_process: dict[str, Any]
) -> None:
    """K and V of the first layer depend on the embeddings alone. A sum in another order may change a code."""
    for rank, results in enumerate(on_ranks):
        heads = heads_of(each.HEADS, rank, len(on_ranks))
        whole, part = one_process[name][dtype][1], results[name][dtype][1]
        assert part.keys() == whole.keys() and ("k_scale" in part) is (dtype == "fp8")
        for pool in ("k", "v"):
            expected, got = (x.float() for x in (whole[pool][:, :, heads.start : heads.stop], part[pool]))
            assert got.shape == expected.shape and int((got != 0).sum()) > 1000
            same = (got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)
            assert float(same.float().mean()) > (0.999 if dtype == "fp8" else 0.999999)
        for scale in part.keys() - {"k", "v"}:
            assert part[scale].tolist() == whole[scale][heads.start : heads.stop].tolist()


@pytest.mark.parametrize("name", each.CONFIGS)
def test_a_rank_keeps_its_part_of_the_attention_and_no_more(
    name: str, on_ranks: Results, one_process: dict[str, Any]
) -> None:
    whole = one_process[name]["elements"]
    for results in on_ranks:
        for parameter, (part, memory) in results[name]["elements"].items():
            all_elements = whole[parameter][0]
            if re.search(r"self_attn\.([qkv]_proj|o_proj\.weight|sinks)", parameter):
                assert part * len(on_ranks) == all_elements, parameter
            if part < all_elements:
                assert memory == part, f"{parameter} keeps {memory} elements alive for {part}"
    if name == "tiny-6" and len(on_ranks) == 2:  # 3 ranks do not divide 4 experts, and all compute all of them
        experts = "model.layers.0.mlp.experts.gate_up_proj"
        assert on_ranks[0][name]["elements"][experts][0] * 2 == whole[experts][0]


def test_a_part_that_is_a_view_gets_memory_of_its_own(on_ranks: Results) -> None:
    part = 12 // len(on_ranks)
    for results in on_ranks:
        assert results["views"] == ({"first": (part, part)}, True, True)


def test_a_rank_that_hangs_is_named_to_the_clients_and_to_the_other_ranks(on_ranks: Results) -> None:
    if len(on_ranks) == 2:
        assert "hang" not in on_ranks[0]
        return
    assert on_ranks[0]["hang"] == ["rank 2 does not answer"] * 2 and on_ranks[1]["hang"] == ["rank 2 does not answer"]


def test_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    status = cli.main([*REPLAY, "--config", "tiny-6", "--limit", "100", "--csv", str(path)])
    text = capsys.readouterr().out
    assert status == cli.OK, text
    assert (figure(text, "completed"), figure(text, "engine")) == ("65", "alive")
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["ranks"], row["completed"], row["died"]) == ("2", "65", "")


def test_replay_starts_no_process_if_the_heads_do_not_divide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(subprocess, "Popen")
    assert cli.main([*REPLAY, "--config", "tiny"]) == cli.USAGE
    assert "kvgather: num_kv_heads is 1; accepted for 2 ranks: a multiple of 2" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "engine", "new"), [(0, "kvgather", 300), (1, "kvgather", 300), (1, "stock", 100)])
def test_a_killed_rank_ends_the_server_and_every_client_knows_why(
    rank: int, engine: str, new: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*REPLAY, "--config", "tiny-6", "--engine", engine, "--new", f"{new}", "--limit", "100"]
    if engine == "stock":  # the default budget takes four times as long
        arguments += ["--max-batched-tokens", "256"]
    check_replay_with_a_killed_rank(rank, arguments, 20, capsys, monkeypatch)
