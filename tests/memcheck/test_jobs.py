"""The list of what memcheck watches: every kernel and every variant is in it, and each job notices wrong values."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.lab.assembly import Variant, compile_all
from tests.gather.variants import VARIANTS
from tests.memcheck import jobs
from tests.memcheck.direct_jobs import DIRECT, MASKED, PADS, Direct, fits, operand_bytes
from tests.memcheck.jobs import JOBS, heads_outermost, smaller
from tests.where import interpreted

pytestmark = pytest.mark.triton

PACKAGE = Path(jobs.__file__).parents[2] / "kvgather"
FIRST = tuple({job.name.split()[0]: job for job in reversed(JOBS)}.values())
PATHS = tuple(job for job in JOBS if job.name.startswith("prefix") and "workspace" in job.name)[:4]
SPLIT = next(job for job in JOBS if job.name.startswith("direct") and "x2 " in job.name)
SAMPLE = tuple(dict.fromkeys((*FIRST, *PATHS, SPLIT, *JOBS[::73])))


def test_names_are_different() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    assert {f"gather {variant.name}" for variant in VARIANTS} <= {job.name for job in JOBS}


@pytest.mark.parametrize("job", SAMPLE, ids=lambda job: job.name)
@interpreted
def test_a_job_runs_and_its_values_are_right(job: jobs.Job) -> None:
    if not job.gigabytes:
        job.run("cpu")


@interpreted
def test_heads_outside_blocks_in_a_pool_that_fits() -> None:
    variant = next(variant for variant in VARIANTS if variant.heads_outermost)
    heads_outermost(replace(variant, case=replace(variant.case, num_blocks=50)), "cpu")


@interpreted
def test_every_kernel_of_the_package_is_launched() -> None:
    from kvgather.lab.trace import trace

    tools = {"lab", "bench", "workbook"}
    sources = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in tools]
    kernels = {
        name for path in sources for name in re.findall(r"^def (\w+_kernel)\(\n", path.read_text(), re.MULTILINE)
    }
    with trace(strict=True) as t:
        for job in (*FIRST, SPLIT):
            if not job.gigabytes:
                job.run("cpu")
    launched = {launch.kernel for launch in t.launches}
    assert {"gather_kernel", "scatter_kernel", "direct_kernel", "combine_kernel", "add_state_kernel"} <= kernels
    # Gluon has no interpreter: on a CPU the hopper jobs launch the twin.
    assert "hopper_kernel" in kernels and launched == kernels - {"hopper_kernel"}, "a new kernel needs a job"
    assert not t.violations, t.report()


def test_smaller_pools_compile_the_same_kernels() -> None:
    """All of it, down to the last instruction, for the GPU that memcheck is run on."""
    pairs = [(variant, smaller(variant)) for variant in VARIANTS]
    compiled = compile_all([(variant, "cuda:90") for pair in pairs for variant in pair], timeout=600)
    for variant, small in zip(compiled[::2], compiled[1::2], strict=True):
        assert variant.text and variant.text == small.text, variant.variant.name
        assert variant.constants == small.constants
    bytes_each = [pool_bytes(small) for _, small in pairs if not small.heads_outermost]
    assert max(bytes_each) < 2**28


def pool_bytes(variant: Variant) -> int:
    case = variant.case
    return case.num_blocks * case.num_heads * case.page_size * case.k_dim * case.dtype.itemsize


def test_every_tile_that_can_be_chosen_is_watched() -> None:
    """In every layout, for every pool dtype and padded head dim; whether keys are split comes in turns."""
    from kvgather.attention.direct import choose_tile

    watched = {(*job.tile[:4], job.tile[5], job.dims, job.layout, job.dtype) for job in DIRECT}
    drawn = random.Random(0)
    for pad in PADS:
        for _ in range(300):
            batch = [int(2 ** drawn.uniform(0, top)) for top in (13, 17, 12)]
            processors = drawn.choice((80, 108, 132, 144))
            for layout, dtype in product(LAYOUTS, POOL_DTYPES):
                tile = choose_tile(*batch, pad, pad, processors, operand_bytes(dtype, torch.bfloat16), layout)
                cut = (tile.m, tile.n, tile.num_warps, tile.num_stages, tile.registers)
                assert (*cut, (pad, pad), layout, dtype) in watched
    for pads in product(PADS, PADS):
        dims = pads if pads[0] != pads[1] else (MASKED[pads[0]], MASKED[pads[1]])
        assert any(job.dims == dims for job in DIRECT), pads


def test_direct_jobs_have_every_kind_of_launch() -> None:
    for name, values in (("window", {None, 5, 40}), ("sinks", {True, False}), ("state", {True, False})):
        assert {getattr(job, name) for job in DIRECT} == values
    assert {job.tile[4] for job in DIRECT} == {1, 2}
    assert {job.page_size for job in DIRECT} == {1, 3, 16, 64}
    assert len({job.kinds for job in DIRECT}) == 25
    assert {job.dims[0] for job in DIRECT if job.q_dtype == torch.float32} == set(PADS)
    assert all(fits(job) for job in DIRECT)


@interpreted
def test_a_job_notices_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.attention import test_direct  # noqa: F401

    job = Direct((16, 64, 2, 2, 1, 128), (16, 16))
    job.run("cpu")
    ours = jobs.build

    def changed(*arguments: object) -> object:
        built = ours(*arguments)
        monkeypatch.setattr(jobs, "on_cpu", lambda _: [rows + 1 for rows in built.cache.gather(built.plan)])
        return built

    monkeypatch.setattr(jobs, "build", changed)
    with pytest.raises(AssertionError, match="differ"):
        JOBS[0].run("cpu")
    monkeypatch.setattr(
        "tests.memcheck.direct_jobs.reference_attention",
        lambda q, k, v, *a, **b: (torch.ones(5, 8, 16), torch.ones(5, 8)),
    )
    with pytest.raises(AssertionError):
        job.run("cpu")
