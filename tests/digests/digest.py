"""Digests of every case's results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.digests import record
from tests.digests.cases import CASES

EVERYWHERE = "every machine"
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensors: Sequence[Tensor | None]) -> str:
    """16 hexadecimal digits of the dtypes, shapes and bits of tensors; NaN equals NaN whatever its bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            sha.update(b"None")
            continue
        here = tensor.detach().cpu().contiguous()
        bits = here.view(_WHOLE[here.element_size()]).long()
        if here.is_floating_point():
            bits = bits.masked_fill(here.float().isnan(), 1 << 40)
        sha.update(f"{here.dtype}{list(here.shape)}".encode() + bits.numpy().tobytes())
    return sha.hexdigest()[:16]


def digests_of(job: tuple[str, str, bool]) -> dict[str, str]:
    """Of a case's name, a device, and whether portable results are all that is wanted."""
    name, device, portable = job
    torch.set_num_threads(1)
    try:
        results = CASES[name].results(device, portable)
        return {f"{name} {what}": digest(made) for what, everywhere, made in results if everywhere or not portable}
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error


def machine() -> str:
    """What digests that are not portable depend on."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return f"{device}, torch {torch.__version__}, triton {triton.__version__}"


def main(description: str) -> int:
    """Write or compare; the exit status. What takes a GPU is left out where there is none."""
    parser = record.parser(description)
    parser.add_argument("--portable", action="store_true", help="only bits that are the same on every machine")
    options = parser.parse_args()
    portable = options.portable or bool(options.compare and EVERYWHERE in record.read(options.compare))
    where = EVERYWHERE if portable else machine()
    if status := record.missing(options, where):
        return status
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name, case in CASES.items() if options.only in name and (device == "cuda" or not case.large)]
    jobs = [(name, device, portable) for name in names]
    return record.finish(options, where, record.in_processes(digests_of, jobs, options.workers))
