"""Without Triton, NumPy or the interpreter, the torch backend works, and each error names its cause.

Reported as triton-lang/triton#2899, vllm-project/vllm#14888.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvgather.device import has_gpu

pytestmark = pytest.mark.skipif(has_gpu(), reason="about machines without a GPU")
PROGRAM = """
import importlib.util, sys
hidden = {hidden!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == hidden else find(name, package)
{before}
import torch, kvgather as kg
cache = kg.PagedKVCache(8, 16, 2, 16, k_scale=0.02, v_scale=0.02, device="cpu")
q, k, v = torch.ones(20, 4, 16), torch.ones(20, 2, 16), torch.ones(20, 2, 16)
table, lengths = torch.tensor([[5, 2]]), torch.tensor([0, 20])
batch = kg.PrefixBatch.build(table, lengths, lengths, page_size=16, num_blocks=8)
out = kg.prefix_attention(q, k, v, cache, batch)
assert (out - 1).abs().max() < 0.05 and cache.gather(batch.plan)[0].shape == (20, 2, 16)
for call in (
    lambda: cache.gather(batch.plan, backend="triton"),
    lambda: kg.prefix_attention(q, None, None, cache, batch, path="direct"),
):
    try:
        call()
    except ValueError as error:
        print(error)
    else:
        print("ran")
"""


def messages(hidden: str = "", before: str = "") -> list[str]:
    """The errors of `backend="triton"` and of `path="direct"` in a new process.

    Args:
        hidden: a package that cannot be imported.
        before: code that runs before the import of kvgather.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(hidden=hidden, before=before)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_without_triton_the_torch_backend_works() -> None:
    backend, path = messages("triton")
    for message in (backend, path):
        assert "triton" in message and "not installed" in message


@pytest.mark.triton
def test_without_numpy_the_error_names_numpy() -> None:
    """The interpreter needs NumPy, which torch and triton do not install."""
    for message in messages("numpy"):
        assert "numpy" in message.lower(), message


@pytest.mark.triton
def test_triton_imported_first_gives_an_error_with_the_fix() -> None:
    for message in messages(before="import triton"):
        assert "import kvgather before triton" in message


@pytest.mark.triton
def test_the_error_of_a_disabled_interpreter_names_the_variable() -> None:
    for message in messages(before="import os; os.environ['TRITON_INTERPRET'] = '0'"):
        assert "TRITON_INTERPRET" in message and "imported before" not in message, message


def test_the_error_about_a_path_lists_paths() -> None:
    """The accepted values in the error of `path="direct"` are values of `path`, not of `backend`."""
    _, message = messages("triton")
    assert 'path="direct"' in message and '"torch"' not in message, message
