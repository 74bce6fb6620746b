"""Sentences, tables and the picture of chapter 08b's comparison follow from the rows, whoever is ahead in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvgather.bench.peer_fa3 import BF16_POOL, FP8_POOL
from kvgather.bench.peer_flashinfer import NAME as FLASHINFER
from kvgather.bench.peer_kernels import DIRECT, HOPPER
from kvgather.bench.peer_targets import LIMIT, OURS
from kvgather.bench.peers import cases
from kvgather.workbook.figures import png
from kvgather.workbook.measured_paths import rule_takes
from kvgather.workbook.measured_peers import MeasuredPeers, least_time, measured_peers, peers_by_layer
from kvgather.workbook.peers_picture import NOTHING, peers_alt, peers_picture
from kvgather.workbook.peers_verdict import (
    error_range,
    kernel_rows,
    limit_rows,
    limits_verdict,
    time_rows,
    verdict,
    verdict_rows,
)
from kvgather.workbook.tables import table_text

CASES = {case.new[0]: case for case in cases(torch.device("cuda"))[:4]}
ERRORS = {OURS: 2e-3, BF16_POOL: 3e-3, FP8_POOL: 3e-2, FLASHINFER: 2.5e-3}


def at(new: int, **times: float) -> MeasuredPeers:
    names = {"ours": OURS, "bf16": BF16_POOL, "fp8": FP8_POOL, "flashinfer": FLASHINFER, "limit": LIMIT}
    named = {names[short]: us for short, us in times.items()}
    errors = {name: ERRORS[name] for name in named if name in ERRORS}
    return MeasuredPeers(CASES[new], named, errors, {}, {}, "GPU")


POINTS = {
    1: at(1, ours=100, bf16=150, fp8=120, flashinfer=140, limit=70),
    16: at(16, ours=100, bf16=101, fp8=80),
    128: at(128, ours=200, bf16=160, fp8=100),
    512: at(512, ours=800, bf16=500, fp8=400),
}


def test_the_verdict_joins_equal_outcomes() -> None:
    assert verdict(POINTS) == (
        "At 1 new token ours is the fastest; FA3 FP8 takes 1.20 times as long. "
        "At 16, 128 and 512 new tokens FA3 FP8 is the fastest; ours takes 1.25, 2.00 and 2.00 times as long."
    )


def test_the_verdict_leaves_out_those_with_a_larger_error() -> None:
    first, second, third = (
        "At 1 new token ours is the fastest; FlashInfer takes 1.40 times as long.",
        "At 16 new tokens ours and FA3 BF16 are level.",
        "At 128 and 512 new tokens FA3 BF16 is the fastest; ours takes 1.25 and 1.60 times as long.",
    )
    assert verdict(POINTS, 5e-3) == f"{first} {second} {third}"


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (97.0, "ours is the fastest"),
        (99.0, "are level"),
        (101.0, "are level"),
        (103.0, "ours takes 1.03 times as long"),
    ],
)
def test_two_percent_are_level(ours: float, said: str) -> None:
    assert said in verdict({16: at(16, ours=ours, bf16=100)})


def test_a_faster_kernel_of_ours_turns_the_verdict() -> None:
    faster = {
        new: replace(point, times={**point.times, OURS: 0.1 * point.times[OURS]}) for new, point in POINTS.items()
    }
    assert verdict(faster) == (
        "At 1, 16, 128 and 512 new tokens ours is the fastest; FA3 FP8 takes 12.00, 8.00, 5.00 and 5.00 times as long."
    )
    assert "ours takes 0.07 to 0.10 times as long" in limits_verdict([*faster.values()])[0]


def test_missing_rows_are_said() -> None:
    assert verdict({16: at(16, ours=100), 128: at(128, ours=100, fp8=90)}, 5e-3) == (
        "At 16 and 128 new tokens no other was timed."
    )
    assert limits_verdict([at(16, ours=100)]) == ["FA3 BF16 was not timed next to ours."]
    assert limits_verdict([]) == ["FA3 BF16 was not timed next to ours."]
    assert verdict_rows({}) == [] and table_text(verdict_rows({}), ["layer", "among", "the fastest"], wrapped=["among"])


def test_the_table_has_times_ratios_dtypes_and_errors() -> None:
    rows, headers = time_rows("layer", POINTS)
    assert headers == ["layer", "ours", "FA3 BF16", "FA3 FP8", "FlashInfer", "read limit"]
    assert rows[0] == (
        "1 new token",
        "100 µs, direct",
        "150 µs (1.50)",
        "120 µs (1.20)",
        "140 µs (1.40)",
        "70 µs (0.70)",
    )
    assert rows[1][0] == "16 new tokens" and rows[1][2:] == ("101 µs (1.01)", "80 µs (0.80)", None, None)
    assert rows[4] == ("dtypes of pool, Q", "FP8, BF16", "BF16, BF16", "FP8, FP8", "FP8, BF16", None)
    assert rows[5] == ("largest error", "2.0e-3", "3.0e-3", "3.0e-2", "2.5e-3", None)


def test_a_peer_without_times_has_no_column() -> None:
    points = {16: at(16, ours=100)}
    assert time_rows("layer", points)[1] == limit_rows("layer", points)[1] == ["layer", "ours"]


def test_errors_are_a_range() -> None:
    other = replace(POINTS[16], errors={OURS: 3.456e-3})
    assert error_range([POINTS[1], other], OURS) == "2.0e-3 to 3.5e-3"
    assert error_range([other], BF16_POOL) is None


def test_limits_are_named_with_the_share_reached() -> None:
    least = least_time(CASES[128]).us
    rows, _ = limit_rows("layer", {1: POINTS[1], 128: at(128, ours=2 * least)})
    assert rows[1][1:] == ("products, 50%", None, None, None, None)
    assert rows[0][1] == f"bytes, {least_time(CASES[1]).us / 100:.0%}"
    assert rows[0][-1] == f"bytes, {least_time(CASES[1]).us / 70:.0%}"


def test_the_limits_verdict_keeps_bytes_and_products_apart() -> None:
    by_bytes, _, by_products, shares = limits_verdict([*POINTS.values()])
    assert by_bytes == "Where bytes limit both, ours takes 0.67 to 0.99 times as long as FA3 BF16."
    assert by_products == "Where products limit both, ours takes 1.25 to 1.60 times as long as FA3 BF16."
    reached = [f"{least_time(CASES[new]).us / us:.0%}" for new, us in ((128, 200), (512, 800), (128, 160), (512, 500))]
    assert shares == "There ours reaches {} to {} of its limit, FA3 BF16 {} to {}.".format(*reached)


def test_the_paths_of_auto_are_those_of_the_rule() -> None:
    rows, _ = time_rows("layer", POINTS)
    assert [row[1] for row in rows[:4]] == [
        "100 µs, direct", "100 µs, direct, Hopper", "200 µs, direct, Hopper", "800 µs, hybrid",
    ]  # fmt: skip
    assert [rule_takes(at.case, hopper=True) for at in POINTS.values()] == ["direct", "direct", "direct", "hybrid"]


def test_the_kernels_of_the_direct_path_are_compared_where_both_were_timed() -> None:
    kernels = replace(POINTS[16], times={**POINTS[16].times, DIRECT: 132.0, HOPPER: 100.0})
    rows, headers = kernel_rows([POINTS[1], kernels])
    assert rows == [
        ("64 query, 8 KV heads of 64", "16 × (8,192 + 16)", "132 µs", "100 µs", "1.32", "direct, Hopper"),
    ]  # fmt: skip
    assert len(headers) == len(rows[0]) and kernel_rows([POINTS[1]])[0] == []


def test_the_picture_draws_every_ratio() -> None:
    axes = peers_picture({"layer": POINTS, "other": {1: POINTS[1]}}).axes
    lines = {line.get_marker(): [*map(float, np.atleast_1d(line.get_ydata()))] for line in axes[0].lines}
    assert lines["o"] == [1.0] * 4 and lines["*"] == [0.7] and lines["D"] == [1.4]
    assert lines["s"] == [1.5, 1.01, 0.8, 0.625] and lines["^"] == [1.2, 0.8, 0.5, 0.5]
    assert [label.get_text() for label in axes[0].get_xticklabels()][:2] == ["1\n100 µs", "16\n100 µs"]
    low, high = axes[0].get_ylim()
    assert low < 0.5 and high > 1.5 and axes[1].get_ylim() == (low, high)


def test_the_legend_has_the_errors() -> None:
    (legend,) = peers_picture({"layer": POINTS}).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "ours, error 2.0e-3", "FA3 BF16, error 3.0e-3", "FA3 FP8, error 3.0e-2", "FlashInfer, error 2.5e-3",
        "read limit", "faster than ours",
    ]  # fmt: skip


def test_a_picture_without_rows_says_so() -> None:
    drawing = peers_picture({})
    assert [text.get_text() for text in drawing.axes[0].texts] == [NOTHING]
    assert png(drawing).startswith(b"\x89PNG") and NOTHING in peers_alt({})


def test_a_picture_of_ours_alone_is_drawn() -> None:
    assert png(peers_picture({"layer": {16: at(16, ours=100)}})).startswith(b"\x89PNG")


def test_the_alt_text_has_the_verdict_of_the_committed_rows() -> None:
    layers = peers_by_layer(measured_peers())
    assert all(f"{title}: {verdict(points)}" in peers_alt(layers) for title, points in layers.items())
