"""The set-up of every test: fixed seeds, and skips for tests that this machine cannot run."""

import os

import hypothesis
import pytest
import torch

from kvgather import device

# The same examples on every run, without a deadline: a slow machine is no failure.
hypothesis.settings.register_profile("kvgather", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("kvgather")


def triton_version() -> str:
    """The version of the imported triton; "none" if triton is not available."""
    if not device.triton_available():
        return "none"
    import triton

    return str(triton.__version__)


def pytest_configure() -> None:
    """Stop unless the imported triton is the version that `make test-triton` has put on the path."""
    expected = os.environ.get("KVGATHER_TRITON")
    if expected and expected != triton_version():
        raise pytest.UsageError(f"KVGATHER_TRITON is {expected}, and the imported triton is {triton_version()}")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, triton {triton_version()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not device.has_gpu():
        pytest.skip("needs a GPU, and this machine has none")
    if item.get_closest_marker("triton") and not device.triton_available():
        pytest.skip("needs Triton, which has no build for this machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
