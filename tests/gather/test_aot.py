"""The kernel compiles for GPUs that are not here, and its assembly reads and writes 16 bytes a thread."""

from __future__ import annotations

import re
from importlib.metadata import version
from itertools import product
from typing import Any

import pytest
import torch

from kvgather.device import fp8_in_hardware
from kvgather.formats.fp8 import FLOATS, FORMATS, POOL_DTYPES
from kvgather.kernels.signatures import offset_lanes
from kvgather.lab.assembly import TARGETS, Assembly, AssemblyError, Variant, compile_all, compile_for, width, widths
from tests.gather.variants import FLOAT_POOLS, FOR_ATTENTION, MAIN, REFUSED, VARIANTS

pytestmark = pytest.mark.triton

INSTALLED = tuple(int(part) for part in re.findall(r"\d+", version("triton"))[:2])
Compiled = dict[tuple[Variant, str], Assembly]


def targets_of(backend: str) -> list[str]:
    return [target for target in TARGETS if target.startswith(backend)]


@pytest.fixture(scope="class")
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """Every variant for every target of the class's backend, compiled in one child process."""
    jobs = list(product(VARIANTS, targets_of(request.cls.backend)))
    return dict(zip(jobs, compile_all(jobs, timeout=600), strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `variant` is of all of them, one of `engines` is of those whose every load and store is looked at."""
    for name, variants in (("variant", VARIANTS), ("engines", (*MAIN, *FLOAT_POOLS, *FOR_ATTENTION))):
        if metafunc.cls is not None and name in metafunc.fixturenames:
            jobs = list(product(variants, targets_of(metafunc.cls.backend)))
            names = [f"{variant.name}-{target.replace(':', '')}" for variant, target in jobs]
            metafunc.parametrize((name, "target"), jobs, ids=names)


def refusal(target: str) -> str | None:
    """In what words the installed Triton refuses a target; None if it compiles for it."""
    version_needed, words = REFUSED.get(target, ((0, 0), ""))
    return words if INSTALLED < version_needed else None


def assembly_of(compiled: Compiled, variant: Variant, target: str) -> Assembly:
    assembly = compiled[variant, target]
    if refusal(target):
        pytest.skip(f"triton {version('triton')}: {assembly.error}")
    assert not assembly.error
    return assembly


def moved(assembly: Assembly, what: str, *, bytes_each: int | None = None) -> int:
    """Bytes that a program moves through its loads, or stores, of one width."""
    lanes = assembly.lanes * assembly.constants["num_warps"]
    return sum(
        count * width(name) * lanes
        for name, count in widths(assembly.text).items()
        if re.match(r"ld\.|\w+_load" if what == "load" else r"st\.|\w+_store", name)
        and bytes_each in (None, width(name))
    )


def tile_elements(assembly: Assembly) -> int:
    """Elements of K and of V that a program moves."""
    c = assembly.constants
    return int(c["K_SLOTS"]) * (c["K_UNITS"] * c["K_UNIT"] + c["V_UNITS"] * c["V_UNIT"])


def both(*names: str) -> set[str]:
    """A constant of K's pool and of V's, for each name."""
    return {f"{side}_{name}" for side in "KV" for name in names}


class Compiles:
    """What holds on one backend; a class for each, so that two processes can share the compilations."""

    backend: str

    def test_every_variant_compiles(self, compiled: Compiled, variant: Variant, target: str) -> None:
        if words := refusal(target):
            assert not compiled[variant, target].text
            assert re.search(words, compiled[variant, target].error)
            return
        assembly = assembly_of(compiled, variant, target)
        assert moved(assembly, "load") and moved(assembly, "store")
        hardware = variant.case.dtype not in FORMATS or variant.case.dtype in fp8_in_hardware(*target.split(":"))
        assert assembly.constants["HARDWARE"] is hardware
        assert assembly.constants["K_WIDE"] is assembly.constants["V_WIDE"] is variant.heads_outermost

    def test_pools_and_rows_move_16_bytes_a_thread(self, compiled: Compiled, engines: Variant, target: str) -> None:
        """No store is narrower, and loads of 16 bytes bring the whole tile; a record's words and scales are 4 bytes."""
        assembly = assembly_of(compiled, engines, target)
        case, found = engines.case, widths(assembly.text)
        assert {width(name) for name in found} <= {4, 16}, found
        assert moved(assembly, "load", bytes_each=16) >= tile_elements(assembly) * case.dtype.itemsize, found
        assert moved(assembly, "store") == moved(assembly, "store", bytes_each=16), found
        assert moved(assembly, "store") >= tile_elements(assembly) * case.out_dtype.itemsize, found

    def test_the_list_holds_every_value_that_a_launch_can_have(self, compiled: Compiled) -> None:
        """Of each constant with few values, all of them; of the sizes, powers of two and others."""
        from kvgather.gather.tile import choose_tile

        seen: dict[str, set[Any]] = {}
        for assembly in compiled.values():
            for name, value in assembly.constants.items():
                seen.setdefault(name, set()).add(value)
        assert seen["K_KIND"] == seen["V_KIND"] == {"none", "per-tensor", "per-head", "per-token-head"}
        decodes = {(a.constants["CODE"], a.constants["HARDWARE"]) for a in compiled.values() if a.text}
        fp8 = set(product(("e4m3fn", "e4m3fnuz", "e5m2"), (True, False)))
        nowhere = {("e4m3fnuz", True)} if self.backend == "cuda" else set()  # AMD's own format
        assert decodes == {("", True)} | fp8 - nowhere
        flags = {"HARDWARE", "V_ZERO_BAD", "PLANNED", "STARTS", *both("RAW", "ACROSS", "WIDE")}
        for name in flags:
            assert seen[name] == {True, False}, name
        assert seen["LANES"] == {offset_lanes(1), offset_lanes(1000)}
        assert seen["BY_HAND"] == {False}  # the interpreter's alone
        assert seen["K_ZERO_BAD"] == {False}  # K's rows of a bad block are NaN
        assert seen["K_ALIGN"] | seen["V_ALIGN"] | seen["K_OUT_ALIGN"] == {1, 2, 4, 8}
        assert seen["V_SLOTS_PER_GROUP"] == seen["K_DIMS_PER_GROUP"] == {1, 4, 8, 16}
        assert seen["K_SLOTS_PER_GROUP"] == seen["V_DIMS_PER_GROUP"] == {1}
        assert seen["K_UNIT"] | seen["V_UNIT"] == {2**n for n in range(8)}
        dims = (1, 2, 8, 20, 24, 64, 80, 128, 192, 256)
        tiles = [choose_tile(p, h, k, v, s) for p in (1, 2, 3, 7, 24) for h in (1, 2, 3, 8, 16) for k in dims
                 for v in dims for s in (1, 2, 4)]  # fmt: skip
        assert seen["K_SLOTS"] == {tile.slots for tile in tiles}
        assert seen["num_warps"] == {tile.num_warps for tile in tiles}
        assert 1 in seen["K_TILES"] and max(seen["K_TILES"]) > 1
        sizes = both("PAGE_SIZE", "NUM_HEADS", "DIM")
        for name in sizes:
            assert {value & (value - 1) == 0 for value in seen[name]} == {True, False}, name
        alike = ("PAGE_SIZE", "NUM_HEADS", "WIDE", "SLOTS", "TILES", "NAN_CODE", "OUT_ALIGN")
        for assembly in compiled.values():
            assert all(assembly.constants.get(f"K_{name}") == assembly.constants.get(f"V_{name}") for name in alike)
        told = {"CODE", "BY_HAND", "LANES", "K_ZERO_BAD", "num_warps"}
        told |= both("KIND", "SLOTS_PER_GROUP", "DIMS_PER_GROUP", "SLOTS", "TILES", "UNIT", "ALIGN", "OUT_ALIGN")
        follow = both("NAN_CODE", "UNITS")  # from the format, or the sizes and the tile
        assert set(seen) == flags | sizes | told | follow, (
            "a new constant needs its values in the list, and a line above"
        )


class TestCuda(Compiles):
    backend = "cuda"

    @pytest.mark.parametrize("target", targets_of("cuda"))
    def test_ampere_decodes_in_software(self, compiled: Compiled, target: str) -> None:
        """PTX names the conversion; before compute capability 8.9 there is none."""
        texts = [
            assembly_of(compiled, *job).text for job in compiled if job[1] == target and job[0].case.k_kind != "none"
            and job[0].case.dtype == torch.float8_e4m3fn
        ]  # fmt: skip
        assert len(texts) >= 4
        for text in texts:
            assert ("e4m3x2" in text) is (target != "cuda:80")


class TestHip(Compiles):
    backend = "hip"


def test_the_list_is_short_and_names_each_variant_once() -> None:
    assert len(VARIANTS) <= 40 and len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert {variant.case.dtype for variant in VARIANTS} == set(POOL_DTYPES)
    assert {variant.case.out_dtype for variant in VARIANTS} > set(FLOATS)


@pytest.mark.parametrize(
    ("assembly", "found"),
    [
        ("\t@%p1 ld.global.v4.b32 { %r1, %r2 }, [ %rd1 ];\n\tld.param.b64 %rd2, [a];", {"ld.global.v4.b32": 16}),
        ("ld.global.L1::evict_first.v2.b64 {}\nst.global.b8 [x]", {"ld.global.L1::evict_first.v2.b64": 16,
                                                                     "st.global.b8": 1}),
        ("ld.volatile.global.u16 a\nld.global.v8.b32 b", {"ld.volatile.global.u16": 2, "ld.global.v8.b32": 32}),
        ("\tglobal_load_dwordx4 v[0:3]\n\ts_load_dwordx2 s[0:1]", {"global_load_dwordx4": 16}),
        ("\tbuffer_load_ubyte v0\n\tglobal_load_short_d16_hi v1", {"buffer_load_ubyte": 1,
                                                                     "global_load_short_d16_hi": 2}),
        ("\tglobal_load_b128 v0\n\tglobal_load_d16_u8 v1\n\tbuffer_store_b64 v2\n\tds_load_b32 v3",
         {"global_load_b128": 16, "global_load_d16_u8": 1, "buffer_store_b64": 8}),
        ("ret;", {}),
    ],
)  # fmt: skip
def test_widths_of_instructions(assembly: str, found: dict[str, int]) -> None:
    assert {name: width(name) for name in widths(assembly)} == found
    assert widths(assembly + "\n" + assembly) == dict.fromkeys(found, 2)


def test_errors_say_what_is_accepted() -> None:
    variant = MAIN[0]
    with pytest.raises(AssemblyError, match=r"target is 'cuda:70'; accepted: cuda:80"):
        compile_for(variant.case, "cuda:70")
    with pytest.raises(AssemblyError, match=r"instruction is 'ret'; accepted"):
        width("ret")
    with pytest.raises(AssemblyError, match=r"1 compilations took longer than 0.01 s"):
        compile_all([(variant, "cuda:90")], timeout=0.01)
