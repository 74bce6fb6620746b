"""What every test gets: fixed seeds, and a reason where the machine cannot run it."""

import hypothesis
import pytest
import torch

from kvgather import device

# The same examples on every run; a GPU-less machine under load is slow, which is no failure.
hypothesis.settings.register_profile("kvgather", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("kvgather")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not device.has_gpu():
        pytest.skip("needs a GPU, and this machine has none")
    if item.get_closest_marker("triton") and not device.triton_available():
        pytest.skip("needs Triton, which has no build for this machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
