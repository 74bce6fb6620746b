"""`kvgather replay`: the bug with a guard, the bug without one, upstream's fix, and this package's gather."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from kvgather import cli
from kvgather.serving.characters import character_tokenizer
from kvgather.serving.models import random_model

REPLAY = ["replay", "--device", "cpu", "--commit", "abc"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main([*REPLAY, *arguments])
    return status, capsys.readouterr().out


def figure(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)
    return found


def test_after(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "serving.csv"
    status, text = run(capsys, "--guard", "--csv", str(path))
    assert status == cli.OK, text
    assert [figure(text, name) for name in ("requests", "completed", "failed", "timed out", "engine")] == [
        "65", "65", "0", "0", "alive",
    ]  # fmt: skip
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["case"] == "tiny, 65 x 48 + 16 + 4, budget 16384" and row["commit"] == "abc"
    assert (row["completed"], row["died"], row["guard"], row["gather"]) == ("65", "", "True", "after")
    assert int(row["prefill_tokens"]) == int(row["prompt_tokens"]) - int(row["hit_tokens"]) > 0
    assert float(row["hit_rate"]) > 0.3 and float(row["first_token_p95_s"]) >= float(row["first_token_p50_s"]) > 0
    assert int(row["peak_memory"]) > 2**20 and row["transformers"].startswith("5.24")


@pytest.mark.triton
def test_before_with_the_guard_ends_the_engine_and_every_client_knows_why(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "--gather", "before", "--guard")
    assert status == cli.NOT_AS_EXPECTED
    assert figure(text, "engine") == "died: the process died of SIGSEGV"
    assert (figure(text, "completed"), figure(text, "timed out")) == ("0", "0")
    assert figure(text, "65 ×") == "the engine's process died of SIGSEGV"
    assert float(figure(text, "time").split()[0]) < 30


@pytest.mark.triton
def test_before_without_the_guard_is_silent_and_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "--gather", "before")
    assert status == cli.OK
    assert (figure(text, "completed"), figure(text, "engine")) == ("65", "alive")
    assert int(figure(text, "other text").split(" of ")[0]) > 16


@pytest.mark.triton
def test_the_shipped_fix_is_as_right_as_ours(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "--gather", "shipped-fix", "--guard", "--no-compare")
    assert status == cli.OK
    assert (figure(text, "completed"), figure(text, "engine")) == ("65", "alive")


def test_stock(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "--engine", "stock", "--requests", "5", "--max-batched-tokens", "64", "--plain")
    assert status == cli.OK
    assert figure(text, "completed") == "5" and "prefix found" not in text
    assert int(figure(text, "prefill").split()[0]) > 5 * 48


def test_a_model_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Saved weights with a tokenizer, as a downloaded model is; prompts have about four characters per token."""
    random_model("qwen3", device=torch.device("cpu"), dtype=torch.float32).save_pretrained(tmp_path)
    character_tokenizer(128).save_pretrained(tmp_path)
    status, text = run(capsys, str(tmp_path), "--requests", "4", "--shared", "8", "--own", "4", "--num-blocks", "128")
    assert status == cli.OK, text
    assert (figure(text, "completed"), figure(text, "engine")) == ("4", "alive")
    assert re.match(r"[1-3] of 4 prompts, (32|64|96) of ", figure(text, "prefix found"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "accepted: either MODEL, the folder of a model, or --random-weights"),
        (["serve", "here", "--random-weights"], "accepted: either MODEL, the folder of a model, or --random-weights"),
        (["serve", "no/such/folder"], "MODEL is 'no/such/folder', which is no folder"),
        (["replay", "no/such/folder"], "MODEL is 'no/such/folder', which is no folder"),
        (["serve", "--random-weights", "--dtype", "float7"], "--dtype is 'float7'; accepted: the name of a dtype"),
        (["serve", "--random-weights", "--cache-dtype", "int8"], "dtype is int8; accepted: float8_e4m3fn"),
        (["serve", "--random-weights", "--gather", "before"], "--gather before without --num-blocks; accepted: a "),
        (
            ["serve", "--random-weights", "--gather", "before", "--scale", "per-head"],
            "--gather before with a scale of kind per-head and torch.float8_e4m3fn; accepted: per-tensor, and FP8",
        ),
        (["serve", "--random-weights", "--guard", "--cache-dtype", "float32"], "--guard with a scale of kind per-t"),
        (["serve", "--random-weights", "--config", "30b"], "config is '30b'; accepted: tiny, 20b, llama"),
        (
            ["serve", "--random-weights", "--gather", "before", "--layout", "HND"],
            "--gather before with --layout HND; accepted: NHD, SHUFFLE",
        ),
        (["serve", "--random-weights", "--layout", "DHN"], "layout is 'DHN'; accepted: NHD, HND, SHUFFLE"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--device", "cpu"]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*REPLAY, "--config", "30b"]) == cli.FAILED
    error = capsys.readouterr().err
    assert "the server did not start: it ended with status 2" in error and "config is '30b'; accepted: tiny" in error
