"""What compiled kernels take: registers, spills, stack and shared memory, for GPUs that are not here.

NVIDIA's numbers are those of ptxas, as Triton's compiler runs it; AMD's are in the assembly.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.digests import record

CUDA, HIP = "cuda:90", "hip:gfx942"
_PTXAS = {
    "registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores", "spill_loads": r"(\d+) bytes spill loads",
}  # fmt: skip
_AMD = {
    "vgprs": r"\.vgpr_count:\s+(\d+)", "agprs": r"\.agpr_count:\s+(\d+)", "sgprs": r"\.sgpr_count:\s+(\d+)",
    "vgpr_spills": r"\.vgpr_spill_count:\s+(\d+)", "sgpr_spills": r"\.sgpr_spill_count:\s+(\d+)",
    "scratch": r"\.private_segment_fixed_size:\s+(\d+)",
}  # fmt: skip


def jobs() -> dict[str, Callable[[], Any]]:
    """What to compile, by name: gathers, direct attention and the kernels of a batch; 60 kernels, a minute's work."""
    from kvgather.lab._assembly_child import compile_one as gather
    from tests.attention._direct_assembly_child import Job
    from tests.attention._direct_assembly_child import compile_one as direct
    from tests.attention.test_direct_aot import JOBS
    from tests.batch._assembly_child import compile_all
    from tests.gather.variants import VARIANTS

    # On AMD every fifth: all layouts, both head dims and both kinds of the engines are among them.
    gathers = [(variant, target) for target, some in ((CUDA, VARIANTS), (HIP, VARIANTS[::5])) for variant in some]
    directs = [job for job in JOBS if job.target in (CUDA, HIP)]
    for heads, dim in (((64, 8), 64), ((32, 8), 128)):  # the tiles that the launcher chooses for models
        for layout in ("NHD", "SHUFFLE"):
            directs += [Job(CUDA, layout, heads=heads, dims=(dim, dim), new=new) for new in (1, 16, 128)]
    found: dict[str, Callable[[], Any]] = {f"{t} gather {v.name}": partial(gather, v, t) for v, t in gathers}
    found |= {f"{job.target} direct {job}": partial(direct, job) for job in directs}
    assert len(found) == len(gathers) + len(directs), "two jobs have one name"
    return found | {f"{CUDA} batch": partial(compile_all, CUDA)}


def numbers_of(target: str, text: str, shared: int) -> dict[str, int]:
    """A kernel's numbers, from what `ptxas -v` said of it or from AMD's assembly, and its bytes of shared memory."""
    found = {}
    for name, pattern in (_PTXAS if target == CUDA else _AMD).items():
        match = re.findall(pattern, text)
        if len(match) != 1:
            raise ValueError(f"{name} is given {len(match)} times; accepted: once, in\n{text[-2000:]}")
        found[name] = int(match[0])
    return found | {"shared": shared}


def compile_one(name: str) -> dict[str, dict[str, int]]:
    """The numbers of all kernels that a job compiles, by the job's name and the kernel's."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    target, run, found = name.split()[0], JITFunction.run, dict[str, dict[str, int]]()

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        self.device_caches.clear()  # of a kernel that an earlier job compiled there would be no log
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = run(self, *arguments, **options)
        text = log.getvalue() if target == CUDA else compiled.asm["amdgcn"]
        nth = sum(other.startswith(f"{name} {self.__name__}") for other in found)
        key = f"{name} {self.__name__}" + f" {nth + 1}" * (nth > 0)
        found[key] = numbers_of(target, text, compiled.metadata.shared)
        return compiled

    with tempfile.TemporaryDirectory() as cache:  # likewise
        JITFunction.run, knobs.nvidia.dump_ptxas_log, knobs.cache.dir = watched, True, cache
        try:
            answer = jobs()[name]()
        finally:
            JITFunction.run = run
    if "error" in answer or not found:
        raise RuntimeError(f"{name}: {answer.get('error', 'nothing was compiled')}")
    return found


def main(description: str) -> int:
    """Write or compare; the exit status."""
    os.environ["TRITON_INTERPRET"] = "0"
    options = record.parser(description).parse_args()
    import triton

    where = f"triton {triton.__version__}"
    if status := record.missing(options, where):
        return status
    names = [name for name in jobs() if options.only in name]
    return record.finish(options, where, record.in_processes(compile_one, names, options.workers))
