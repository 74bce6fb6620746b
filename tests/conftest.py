"""What every test gets: fixed seeds, and a reason where the machine cannot run it."""

import os

import hypothesis
import pytest
import torch

from kvgather import device

# The same examples on every run; a GPU-less machine under load is slow, which is no failure.
hypothesis.settings.register_profile("kvgather", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("kvgather")


def triton_version() -> str:
    """The imported triton's version, "none" where there is no build of it."""
    if not device.triton_available():
        return "none"
    import triton

    return str(triton.__version__)


def pytest_configure() -> None:
    """Stop unless the imported triton is the one that `make test-triton` set the path up for."""
    wanted = os.environ.get("KVGATHER_TRITON")
    if wanted and wanted != triton_version():
        raise pytest.UsageError(f"KVGATHER_TRITON is {wanted}, and the imported triton is {triton_version()}")


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
