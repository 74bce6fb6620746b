"""What nbval evens out before it compares two outputs, and what it must not touch."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest


def sanitized(text: str) -> str:
    """The text as nbval compares it: each regex of the file replaced, in order."""
    config = configparser.RawConfigParser()
    config.read(Path(__file__).with_name("sanitize.cfg"), encoding="utf-8")
    for section in config.sections():
        text = re.sub(config.get(section, "regex"), config.get(section, "replace"), text)
    return text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<function f at 0x7f3a2c1b9d00>", "<function f at 0x00b4d2ee>"),
        ("took 1.25 ms", "took 980 ms"),
        ("the child ran for 2.4 s", "the child ran for 13.0 s"),
        ("recorded 2026-11-22 14:03", "recorded 2027-01-05"),
        ("2,790 GB/s", "512.5 GB/s"),
        ("/home/a/kvgather/kvgather/lab/before_fix.py:62", "/Users/b c/kvgather/lab/before_fix.py:62".replace(" ", "")),
        ("File /tmp/ipykernel_11/334.py", "File /tmp/ipykernel_7/9.py"),
        ("Cell In[8], line 4:  x = 1 / 0", "Cell In[1], line 4:  x = 1 / 0"),
        ("GPU  NVIDIA H100 80GB HBM3", "GPU  AMD Instinct MI300X"),
        ("torch           2.13.0+cpu", "torch           2.11.0+cu130"),
    ],
)
def test_what_differs_from_machine_to_machine_is_evened_out(one, other):
    assert one != other and sanitized(one) == sanitized(other)


@pytest.mark.parametrize(
    "text",
    [
        "k_scale_ptr: element 656 of 1, line 62, program (0, 5)",
        "63 of 64 tokens are wrong, largest error: 0.097",
        "code 0x80 is NaN in e4m3fnuz",
        "SHUFFLE      1876       1861",
        "kvgather/lab/before_fix.py:62",
        "exit code -11: segfault",
        "correct: well done",
        "[1024, 512, 256, 16, 1]",
    ],
)
def test_what_a_chapter_says_is_compared_as_it_is(text):
    assert sanitized(text) == text
