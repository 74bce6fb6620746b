"""`kvgather bench prefix --peers`, with fake peers."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather import cli
from kvgather.attention.reference import reference_attention
from kvgather.bench import peer, peer_fa3, peer_flashinfer, peer_kernels, peer_targets, peers, report
from kvgather.bench.peer import NotUsable, Peer
from kvgather.bench.report import Row
from kvgather.cases.prefix import PrefixCase, build_prefix
from tests.bench.fake_peers import FWD, NAMESPACE, SCHEDULE, FlashInfer, Interface, Vllm, fwd, schedule

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DECODE, PREFILL = peers.cases(CPU)
RAGGED = replace(PREFILL, new=(3, 1, 16), cached=(61, 0, 33), label="ragged")  # a last page of 16 tokens, 1 and 1
PACKAGES = ("vllm", "flash_attn_interface", "flashinfer")
NAMES = ("FlashAttention-3, BF16 pool", "FlashAttention-3, FP8 pool and Q", "FlashInfer")
KERNELS = ("direct kernel", "Hopper kernel")


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these packages the only peers that are installed."""
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def install(**packages: type[ModuleType]) -> None:
        for name, kind in packages.items():
            monkeypatch.setitem(sys.modules, name, kind(name))
            if name == "vllm":
                monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", kind(name))
        monkeypatch.setattr(
            importlib.util, "find_spec",
            lambda name: (importlib.machinery.ModuleSpec(name, None) if name in packages else None)
            if name in PACKAGES else find_spec(name),
        )  # fmt: skip
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0.20.2" if name in packages else version(name)
        )  # fmt: skip

    monkeypatch.delenv(peer_fa3.FILE, raising=False)
    install()
    return install


@pytest.fixture
def extension(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], Path]]:  # fmt: skip
    """A file whose load registers operators with this schema of `fwd`."""
    library = torch.library.Library(NAMESPACE, "DEF")

    def load(path: str) -> None:
        assert Path(path).read_bytes() == b"an extension"
        for declared, function in ((state.fwd, fwd), (SCHEDULE, schedule)):
            library.define(" ".join(declared.split()))
            library.impl(declared[: declared.index("(")], function, "CPU")

    state = SimpleNamespace(fwd=FWD)

    def extension(fwd: str) -> Path:
        state.fwd = fwd
        path = tmp_path / "_vllm_fa3_C.abi3.so"
        path.write_bytes(b"an extension")
        monkeypatch.setenv(peer_fa3.FILE, str(path))
        return path

    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(peer_fa3, "EXTENSION", NAMESPACE)
    yield extension
    library._destroy()


def rows_of(case: PrefixCase, only: dict[str, Peer | str] | None = None) -> dict[str, Row]:
    rows = peers.measure(case, CPU, seconds=0.001, peers=only)
    for row in rows:
        assert (row.benchmark, row.case) == ("peers", case.name)
        assert row.samples == 0 if row.reason else 0 < row.p20_us <= row.p50_us <= row.p80_us
    return {row.implementation: row for row in rows}


def test_without_peers_each_row_says_why(install: Install) -> None:
    rows = rows_of(DECODE)
    assert list(rows) == ["auto, attention alone", *NAMES, *KERNELS]
    ours = rows["auto, attention alone"]
    assert 1e-5 < ours.error < 5e-3 and ours.reason == ours.peer_version == "" and ours.bytes == DECODE.read_bytes
    for name in NAMES[:2]:
        assert rows[name].reason == "vllm and flash_attn_interface are not installed, and KVGATHER_FA3 is not set"
    assert rows["FlashInfer"].reason == "flashinfer is not installed"
    for name in KERNELS:
        assert rows[name].reason == "compared on a GPU of compute capability 9.0 with Triton 3.6"


@pytest.mark.triton
@pytest.mark.parametrize("case", [DECODE, PREFILL, RAGGED], ids=lambda case: case.name)
def test_our_kernels_by_themselves(case: PrefixCase, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_kernels, "available", lambda _: True)
    rows = rows_of(case, dict(peer_kernels.find(CPU)))
    assert rows["direct kernel"].reason == "" and 1e-5 < rows["direct kernel"].error < 5e-3
    assert rows["Hopper kernel"].reason == "the kernel does not run on this case"


@pytest.mark.parametrize("case", [DECODE, PREFILL, RAGGED], ids=lambda case: case.name)
@pytest.mark.parametrize("source", ["vllm", "flash_attn_interface", "file"])
def test_flash_attention_3_from_each_source(
    case: PrefixCase, source: str, install: Install, extension: Callable[[str], Path]
) -> None:
    if source == "file":
        extension(FWD)
    else:
        install(**{source: Vllm if source == "vllm" else Interface})
    rows = rows_of(case)
    for name, most, times in ((NAMES[0], 6e-3, 2), (NAMES[1], 5e-2, 1)):
        assert (
            rows[name].reason == "" and 1e-4 < rows[name].error < most and rows[name].bytes == times * case.read_bytes
        )
    assert rows[NAMES[1]].error > 2 * rows[NAMES[0]].error  # q in FP8
    digest = hashlib.sha256(b"an extension").hexdigest()[:12]
    version = {"vllm": "vllm 0.20.2", "flash_attn_interface": "flash_attn_interface of unknown version"}
    assert rows[NAMES[0]].peer_version == version.get(source, f"_vllm_fa3_C.abi3.so sha256:{digest}")


@pytest.mark.parametrize("case", [DECODE, PREFILL, RAGGED], ids=lambda case: case.name)
def test_flashinfer(case: PrefixCase, install: Install) -> None:
    install(flashinfer=FlashInfer)
    row = rows_of(case)["FlashInfer"]
    assert row.reason == "" and 1e-4 < row.error < 5e-3
    assert (row.peer_version, row.bytes) == ("flashinfer 0.6.8", case.read_bytes)


def test_the_list_of_pages() -> None:
    built = build_prefix(RAGGED, CPU, 0)
    offsets, block_ids, last = peer_flashinfer.page_list(built)
    table = built.batch.block_table
    assert offsets.tolist() == [0, 4, 5, 9] and last.tolist() == [16, 1, 1]
    assert block_ids.tolist() == [*table[0, :4].tolist(), int(table[1, 0]), *table[2, :4].tolist()]


def test_q_in_fp8_has_one_scale_for_each_kv_head() -> None:
    built = build_prefix(PREFILL, CPU, 0)
    built.q[:, :2] *= 1000  # the query heads of the first KV head
    paged = peer.fp8_pool(built)
    assert paged.scales is not None
    q_scale, k_scale, v_scale = paged.scales
    assert (q_scale[0] == q_scale[1]).all() and q_scale[0, 0] > 500 * q_scale[0, 1]
    decoded = paged.q.float() * q_scale[0].repeat_interleave(2)[:, None]
    assert (decoded - built.q.float()).norm() < 0.04 * built.q.float().norm()
    assert (k_scale == built.cache.k_scale).all() and (v_scale == built.cache.v_scale).all()
    assert paged.k_pool.data_ptr() == built.cache.key_cache.data_ptr(), "the pool is not copied"


def test_other_schemas_of_the_extension(extension: Callable[[str], Path]) -> None:
    """An optional argument more is None; a number that is not known, or a missing argument, is refused."""
    extension(FWD.replace("float softmax_scale", "Tensor? o_scale, float softmax_scale"))
    assert rows_of(DECODE)[NAMES[0]].reason == ""


@pytest.mark.parametrize(
    ("fwd", "reason"),
    [
        (FWD.replace("int sm_margin", "int sm_margin, int flavour"), "fake_fa3 has an unknown argument flavour: int"),
        (FWD.replace("page_table", "block_table"), "fake_fa3 lacks the argument page_table; it has q, k, v, k_new"),
    ],
)
def test_a_schema_that_is_not_known(extension: Callable[[str], Path], fwd: str, reason: str) -> None:
    extension(fwd)
    assert rows_of(DECODE)[NAMES[0]].reason.startswith(reason)


def test_a_file_that_is_none(extension: Callable[[str], Path], install: Install) -> None:
    install(vllm=Vllm)
    extension(FWD).unlink()
    found = peers.find_peers(CPU)
    assert all(str(found[name]).endswith("_vllm_fa3_C.abi3.so, which is not a file") for name in NAMES[:2])


def test_a_package_that_cannot_be_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(vllm=Vllm, flashinfer=FlashInfer)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
    found = peers.find_peers(CPU)
    assert str(found[NAMES[0]]).startswith("ModuleNotFoundError: ") and isinstance(found["FlashInfer"], Peer)


def test_flash_attention_3_is_for_hopper(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(vllm=Vllm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(NotUsable, match=r"needs a GPU of compute capability 9\.0"):
        peer_fa3.find(CUDA)


def test_a_wrong_peer_is_refused_and_the_others_are_timed(install: Install) -> None:
    def scaled(factor: float) -> Peer:
        def prepare(built: Any) -> Callable[[], Tensor]:
            right = peers.ours(built)
            return lambda: right() * factor

        return Peer(f"{factor}", prepare)

    def between(built: Any) -> Callable[[], Tensor]:
        """NaN in a sequence whose rows are not compared."""
        out = peers.ours(built)()
        out[3] = torch.nan
        return lambda: out

    def failing(built: Any) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    rows = rows_of(
        replace(DECODE, new=(2, 2, 2), cached=(64,) * 3),
        {
            "wrong": scaled(1.06), "near": scaled(1.04), "failing": Peer("1", failing), "absent": "not here",
            "NaN": Peer("1", between), "transposed": Peer("1", lambda built: lambda: peers.ours(built)().mT),
        },
    )  # fmt: skip
    assert rows["wrong"].reason == "its error is 0.06; accepted: 0.05" and rows["wrong"].peer_version == "1.06"
    assert rows["near"].reason == "" and rows["near"].error == pytest.approx(0.04, abs=2e-3)
    assert rows["failing"].reason == "RuntimeError: no kernel image is available"
    assert rows["absent"].reason == "not here"
    assert rows["NaN"].reason == rows["transposed"].reason == "its error is inf; accepted: 0.05"


def test_our_own_rows_have_to_be_right(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.prefix_attention
    monkeypatch.setattr(peers, "prefix_attention", lambda *arguments: right(*arguments) * 1.02)
    with pytest.raises(ArithmeticError, match=r"auto, attention alone is not the reference on peers-.*: error 0.02"):
        peers.measure(DECODE, CPU, seconds=0.001)


def test_the_reference_is_that_of_the_first_and_the_last_sequence() -> None:
    built = build_prefix(RAGGED, CPU, 0)
    built.cache.write(built.k_new, built.v_new, built.batch.slots)
    k, v = built.cache.gather(built.batch.plan, out_dtype=torch.float32)
    out, _ = reference_attention(built.q, k, v, built.batch.cu_seqlens_q, built.batch.cu_seqlens_k)
    expected = peers.expected_of(built)
    assert expected.rows.tolist() == [0, 1, 2, *range(4, 20)]
    torch.testing.assert_close(expected.out, out[expected.rows], rtol=1e-12, atol=1e-12)
    assert expected.error(out) < 1e-12 and expected.error(out[:19]) == float("inf")


def test_rows_keep_errors_versions_and_reasons(install: Install, tmp_path: Path) -> None:
    install(flashinfer=FlashInfer)
    rows = peers.measure(PREFILL, CPU, seconds=0.001)
    path = tmp_path / "peers.csv"
    report.write(rows, path)
    assert report.read(path) == rows
    assert path.read_text().splitlines()[0].endswith(",commit,date,error,peer_version,reason")
    text = report.table(rows)
    assert text.splitlines()[2].split()[-1] == "error" and f"{rows[0].error:.1e}" in text
    left_out = [each for each in rows if each.implementation in (*NAMES[:2], *KERNELS)]
    assert text.splitlines()[-4:] == [f"{each.implementation}: not timed: {each.reason}" for each in left_out]
    assert text.endswith(f"{KERNELS[1]}: not timed: {rows[-1].reason}")


def row(case: str, name: str, microseconds: float, error: float = 3e-3, reason: str = "") -> Row:
    return Row(
        "peers", case, name, microseconds, microseconds, microseconds, 9, 1, 0, 0, 0, 0, "NVIDIA H100 80GB HBM3",
        "580", "2.11.0", "3.6.0", "abc", "2026-11-27", error=error, reason=reason,
    )  # fmt: skip


def test_targets() -> None:
    sixteen, decode, limit = "16seqs-8192+16", "16seqs-8192+1", "peers-64q8x64-NHD-per-tensor-1seqs-131072+1"
    case_64, case_128 = f"peers-64q8x64-NHD-per-tensor-{sixteen}", f"peers-32q8x128-NHD-per-tensor-{decode}"
    rows = [
        row(case_64, "auto, attention alone", 126), row(case_64, NAMES[0], 126), row(case_64, NAMES[1], 115),
        row(case_64, "FlashInfer", 0, reason="it fails"),
        row(case_128, "auto, attention alone", 115), row(case_128, NAMES[0], 135), row(case_128, NAMES[1], 103),
        row(case_128, "FlashInfer", 121), row(limit, "auto, attention alone", 100), row(limit, "read limit", 69),
    ]  # fmt: skip
    header, first, second, third, *rest = (" ".join(line.split()) for line in peers.summary(rows).splitlines())
    assert header == f"µs (ours over the peer's) ours {NAMES[0]} {NAMES[1]} FlashInfer to reach"
    assert first == f"{case_64} 126.0 126.0 (1.00) 115.0 (1.10) – ≤ 1.00 × {NAMES[0]} 1.00: reached"
    assert second == f"{case_128} 115.0 135.0 (0.85) 103.0 (1.12) 121.0 (0.95) ≤ 1.00 × {NAMES[1]} 1.12: NOT reached"
    assert third == f"{limit} 100.0 – – – ≥ 0.70 of the read limit 0.69: NOT reached"
    assert rest == [
        "Largest error of ours: 3.0e-03 (≤ 5.0e-03): reached", f"FlashInfer: not timed on {case_64}: it fails"
    ]  # fmt: skip
    worse = [replace(rows[0], error=6e-3), rows[3]]
    text = peers.summary(worse)
    assert f"≤ 1.00 × {NAMES[0]}" in text and "not measured" in text and "6.0e-03 (≤ 5.0e-03): NOT reached" in text
    assert text.endswith("FlashInfer: not timed: it fails")
    assert peers.summary([]) == ""


def test_each_target_has_its_case() -> None:
    names = {case.name for case in peers.cases(CUDA)}
    assert len(names) == len(peers.cases(CUDA)) == 17
    assert {*peer_targets.TARGETS, *peer_targets.LEAST_OF_LIMIT} <= names


def test_the_command(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    install(vllm=Vllm)
    monkeypatch.chdir(tmp_path)
    command = ["bench", "prefix", "--peers", "--device", "cpu", "--seconds", "0.001", "--csv"]
    assert cli.main(command) == cli.OK
    rows = report.read(tmp_path / "benchmarks" / "results" / "peers_cpu.csv")
    assert [each.implementation for each in rows] == ["auto, attention alone", *NAMES, *KERNELS] * 2
    printed = capsys.readouterr()
    assert (
        "FlashInfer: not timed: flashinfer is not installed" in printed.out and "Largest error of ours" in printed.out
    )
    assert cli.main(["bench", "gather", "--peers"]) == cli.USAGE
    assert capsys.readouterr().err == "kvgather: --peers with gather; accepted: kvgather bench prefix --peers\n"


@pytest.mark.gpu
def test_a_gpu_compares_replays() -> None:
    case = replace(peers.cases(CUDA)[0], cached=(1024,) * 16)
    found: dict[str, Peer | str] = {
        "right": Peer("1", peers.ours), "wrong": Peer("1", lambda built: lambda: peers.ours(built)() * 1.1)
    }  # fmt: skip
    rows = {each.implementation: each for each in peers.measure(case, CUDA, seconds=0.01, peers=found)}
    assert rows["right"].p50_us > 0 and rows["right"].error == rows["auto, attention alone"].error
    assert rows["wrong"].reason.startswith("its error is 0.1;") and rows["read limit"].p50_us > 0
