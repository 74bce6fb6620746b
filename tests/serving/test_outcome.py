"""Prompts, figures, rows, and the small parts of the replay; no server is started."""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvgather.replay import arguments as replay_arguments
from kvgather.replay import table
from kvgather.replay.clients import Answer
from kvgather.replay.prompts import prompts
from kvgather.replay.run import Outcome
from kvgather.serving.characters import CHARACTERS, character_tokenizer
from kvgather.serving.counters import KEPT, Counters, Step
from kvgather.serving.models import CONFIGS, random_model
from kvgather.serving.serve import Source

DONE = [Answer("abc", "", 1.0, first) for first in (0.1, 0.2, 0.3, 0.4)]
STATUS = {
    "prefill_tokens": 50, "decode_tokens": 30, "prefill_seconds": 0.5, "decode_seconds": 0.1, "lookups": 4, "hits": 2,
    "looked_up_tokens": 100, "hit_tokens": 48, "peak_memory": 2**21,
}  # fmt: skip


def test_prompts_share_exactly_the_prefix() -> None:
    texts = prompts(65, 48, 16, seed=3)
    assert texts == prompts(65, 48, 16, seed=3) != prompts(65, 48, 16, seed=4)
    assert len({text[:48] for text in texts}) == 1 and len(set(texts)) == 65
    assert {len(text) - 48 for text in texts} == set(range(12, 21))
    tokenizer = character_tokenizer(128)
    assert all(len(tokenizer(text)["input_ids"]) == len(text) for text in texts)
    with pytest.raises(ValueError, match="own is 0"):
        prompts(3, 48, 0)


def test_any_token_has_a_text_of_its_own() -> None:
    tokenizer = character_tokenizer(300)
    texts = [tokenizer.decode([token]) for token in range(300)]
    assert len(set(texts)) == 300 and "".join(texts[: len(CHARACTERS)]) == CHARACTERS
    assert tokenizer.decode([3, 299, 0, 0, 4]) == f"{CHARACTERS[3]}⟨299⟩  {CHARACTERS[4]}"
    with pytest.raises(ValueError, match="vocab_size is 5; accepted: at least 96"):
        character_tokenizer(5)


def test_figures_of_an_outcome() -> None:
    failed = [Answer("a", "no answer within 5 s", 5.0, None, True), Answer("", "status 500: x", 0.1)]
    outcome = Outcome([*DONE, *failed], "", STATUS, 2.0)
    assert (outcome.completed, outcome.failed, outcome.timed_out, outcome.succeeded) == (4, 1, 1, False)
    assert outcome.first_token(0.5) == pytest.approx(0.25) and outcome.first_token(0.95) == pytest.approx(0.385)
    assert Outcome(DONE, "", STATUS, 2.0).succeeded and not Outcome(DONE, "died", STATUS, 2.0).succeeded
    assert outcome.differing(replace(outcome, answers=[replace(DONE[0], text="abd"), *DONE[1:], *failed])) == 1
    lines = dict(line.split(None, 1) for line in table.text(outcome).replace("timed out", "timed_out").splitlines())
    assert lines["prefill"] == "50 tokens, 100 per second" and lines["decode"] == "30 tokens, 300 per second"
    assert lines["prefix"].split(None, 1)[1] == "2 of 4 prompts, 48 of 100 tokens (48.0%)"


def test_what_auto_took_is_summed_up() -> None:
    paths = {
        "full": {
            "steps": {"hybrid": 3, "direct": 120},
            "expected_us": {"auto": 1500.0, "direct": 2000.0, "gather": 0.0},
        },
        "window 128": {"steps": {"gather": 2}, "expected_us": {}},
    }
    measured = table.measured(Outcome(DONE, "", STATUS | {"paths": paths}, 2.0))
    assert measured["auto_took"] == "full: direct 120, hybrid 3; window 128: gather 2"
    assert measured["auto_expected_ms"] == "full: auto 1.5, direct 2"


def test_reasons_are_counted_without_the_names_of_requests() -> None:
    names = ("0a6f3df3-15b2-4d30-8d7b-ae3dabd7e091", "e8b687d6-9192-45c8-b6f6-0fc76f57fbbe")
    answers = [Answer("", f"status 503: CB worker died during request {name}: why", 0.1) for name in names]
    assert Outcome(answers, "died", {}, 1.0).reasons == {"status 503: CB worker died during request …: why": 2}


def test_rows_replace_those_of_their_case_and_device(tmp_path: Path) -> None:
    path = tmp_path / "results" / "serving.csv"
    columns = dict.fromkeys(table.COLUMNS, "") | table.measured(Outcome(DONE, "", STATUS, 2.0))
    first = table.Row(**columns | {"device": "a", "case": "b"})  # type: ignore[arg-type]
    for row in (first, replace(first, device="other"), replace(first, seconds=9.0)):
        table.write(row, path)
    assert [(row["device"], row["seconds"]) for row in table.read(path)] == [("other", "2.0"), ("a", "9.0")]
    assert table.read(path)[0]["hit_rate"] == "0.48" and table.read(path)[0]["decode_per_s"] == "300.0"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"serving.csv has columns \['a', 'b'\]; accepted: \['case'"):
        table.write(first, path)


def test_committed_rows_have_a_device_a_date_and_versions() -> None:
    for path in (Path(__file__).parents[2] / "benchmarks" / "results").glob("serving_*.csv"):
        for row in table.read(path):
            assert row["device"] and row["torch"] and row["transformers"] and len(row["date"]) == 10, (path.name, row)


def test_counters_keep_totals_of_all_steps_and_the_last_ones() -> None:
    counters = Counters()
    for i in range(KEPT + 10):
        counters.add(Step(float(i), 0.5, i % 2, 3, 7 * (i % 2), 0))
    assert counters.num_steps == KEPT + 10 and len(counters.steps) == KEPT and counters.steps[0].begin == 10.0
    half = (KEPT + 10) // 2
    assert (counters.prefill_tokens, counters.decode_tokens) == (7 * half, 3 * half)
    assert counters.as_json()["steps"][-1]["decodes"] == 3


def test_counters_are_read_while_the_engine_counts() -> None:
    """A number that counts a step when it is copied stands for an engine whose step ends meanwhile."""
    counters = Counters()

    class Begin(float):
        def __deepcopy__(self, memo: object) -> Begin:
            counters.add(Step(2.0, 0.5, 0, 1, 0, 0))
            return self

    counters.add(Step(Begin(1.0), 0.5, 0, 1, 0, 0))
    counters.add(Step(1.5, 0.5, 0, 1, 0, 0))
    first = counters.as_json()
    assert (first["num_steps"], [step["begin"] for step in first["steps"]]) == (2, [1.0, 1.5])
    assert counters.num_steps == len(counters.steps) > 2


def test_the_20b_has_its_published_dimensions() -> None:
    config = CONFIGS["20b"]()
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (24, 2880, 201088)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (64, 8, 64)
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (32, 4, 128)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 12
    with pytest.raises(ValueError, match="config is 'x'; accepted: tiny, 20b"):
        Source("", "x", torch.device("cpu"), torch.float32).model_config()


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = (
        random_model("tiny", device=torch.device("cpu"), dtype=torch.float32, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_server_gets_the_arguments_of_the_replay() -> None:
    parser = argparse.ArgumentParser()
    replay_arguments.add_replay(parser.add_subparsers(), lambda _: 0)
    words = ["replay", "--gather", "before", "--guard", "--num-blocks", "99", "--layout", "SHUFFLE"]
    arguments = replay_arguments.engine_arguments(parser.parse_args(words))
    assert arguments[0] == "--random-weights" and "--guard" in arguments and "--no-sharing" not in arguments
    pairs = dict(itertools.pairwise(arguments))
    assert (pairs["--gather"], pairs["--num-blocks"], pairs["--layout"]) == ("before", "99", "SHUFFLE")
    assert replay_arguments.engine_arguments(parser.parse_args(["replay", "a/folder"]))[:2] == ["a/folder", "--greedy"]


def test_csv_rows_are_readable_as_csv() -> None:
    text = table.as_csv([dict.fromkeys(table.COLUMNS, "x, y")])
    (row,) = csv.DictReader(text.splitlines())
    assert set(row.values()) == {"x, y"}
