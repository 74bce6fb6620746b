"""The variants of experiment 1; by head dim, in the order in which they are tried."""

from __future__ import annotations

from typing import NamedTuple


class Hopper(NamedTuple):
    """The Gluon kernel: 64 rows a consumer, N keys at a time.

    Attributes:
        consumers, producers: warpgroups; with 2 producers one loads K, one V.
        n, stages: keys of a converted tile, and tiles of K (and of V) in shared memory.
        overlap: P V runs during the next softmax of the same warpgroup; 0 leaves overlap to the other warpgroups.
        pingpong: consumers take turns to issue their products.
        poly: of 4 powers of two, how many are computed by a polynomial.
        depth: tiles whose loads are under way, with 2 producers.
        c_regs, p_regs: registers of consumers (but the first, which has the rest) and producers.
        carry: 1 carries P around the loop in FP32: fewer instructions, more registers.
        q_in_registers: 1 reads Q from registers in Q K, else from shared memory.
        maxnreg: registers of a thread on average; None is 65,536 / threads.
    """

    consumers: int
    producers: int
    n: int
    stages: int
    overlap: int = 1
    pingpong: int = 0
    poly: int = 0
    depth: int = 1
    c_regs: int = 0
    p_regs: int = 0
    maxnreg: int | None = None
    carry: int = 0
    q_in_registers: int = 0

    @property
    def name(self) -> str:
        parts = [f"hopper {64 * self.consumers}x{self.n} p{self.producers} s{self.stages}"]
        parts += ["overlap"] if self.overlap else []
        parts += ["pingpong"] if self.pingpong else []
        parts += [f"poly{self.poly}"] if self.poly else []
        parts += [f"depth{self.depth}"] if self.depth > 1 else []
        parts += ["carry"] if self.carry else []
        parts += ["qreg"] if self.q_in_registers else []
        return " ".join([*parts, f"r{self.c_regs}/{self.p_regs}"])

    def constants(self, dim: int, group: int, heads: int = 8, page: int = 16) -> dict[str, int]:
        return dict(
            D=dim, N=self.n, PAGE=page, HEADS=heads, GROUP=group, CONSUMERS=self.consumers, PRODUCERS=self.producers,
            STAGES=self.stages, PINGPONG=self.pingpong, OVERLAP=self.overlap, POLY=self.poly, CARRY=self.carry, Q_IN_REGISTERS=self.q_in_registers, DEPTH=self.depth,
            C_REGS=self.c_regs, P_REGS=self.p_regs,
        )  # fmt: skip

    def options(self) -> dict[str, int]:
        return {"num_warps": 4, **({"maxnreg": self.maxnreg} if self.maxnreg else {})}


P2 = dict(c_regs=208, p_regs=48)  # two consumers, two producers
P1 = dict(c_regs=200, p_regs=104)  # two consumers, one producer
P1L = dict(c_regs=216, p_regs=72)
C3 = dict(c_regs=152, p_regs=48)  # three consumers, one producer
HOPPER = {
    128: [
        Hopper(2, 2, 128, 2, **P2),
        Hopper(2, 1, 128, 2, **P1),
        Hopper(2, 2, 128, 2, pingpong=1, **P2),
        Hopper(2, 2, 128, 2, overlap=0, **P2),
        Hopper(2, 2, 128, 2, overlap=0, pingpong=1, **P2),
        Hopper(2, 2, 64, 4, carry=1, **P2),
        Hopper(2, 2, 64, 4, carry=1, q_in_registers=1, **P2),
        Hopper(2, 2, 64, 4, carry=1, q_in_registers=1, pingpong=1, **P2),
        Hopper(2, 2, 64, 4, carry=1, q_in_registers=1, overlap=0, **P2),
        Hopper(3, 1, 64, 3, carry=1, **C3),
        Hopper(3, 1, 64, 3, overlap=0, **C3),
        Hopper(1, 2, 128, 2, depth=2, p_regs=96, maxnreg=152),
        Hopper(1, 2, 64, 4, depth=2, carry=1, q_in_registers=1, p_regs=88, maxnreg=152),
        Hopper(1, 1, 64, 2, carry=1, p_regs=88, maxnreg=128),
    ],
    64: [
        Hopper(2, 1, 128, 2, carry=1, **P1L),
        Hopper(2, 1, 128, 2, carry=1, pingpong=1, **P1L),
        Hopper(2, 1, 128, 2, carry=1, poly=1, **P1L),
        Hopper(2, 1, 128, 2, carry=1, q_in_registers=1, **P1L),
        Hopper(2, 1, 128, 2, carry=1, overlap=0, **P1L),
        Hopper(2, 1, 128, 2, carry=1, overlap=0, pingpong=1, **P1L),
        Hopper(2, 2, 128, 3, depth=2, **P2),
        Hopper(2, 2, 128, 3, depth=2, pingpong=1, poly=1, **P2),
        Hopper(3, 1, 64, 4, carry=1, **C3),
        Hopper(3, 1, 64, 4, carry=1, poly=1, **C3),
        Hopper(3, 1, 64, 4, carry=1, q_in_registers=1, **C3),
        Hopper(3, 1, 64, 4, carry=1, q_in_registers=1, pingpong=1, **C3),
        Hopper(3, 1, 64, 4, carry=1, q_in_registers=1, overlap=0, **C3),
        Hopper(1, 1, 128, 2, p_regs=88, maxnreg=128),
    ],
}


def fits(v: Hopper, rows: int) -> bool:
    """Whether to time it: no consumer without rows, and no single consumer for many."""
    return rows > 64 * (v.consumers - 1) and (v.consumers > 1 or rows <= 128)


TILES = {  # rows, keys, warps, stages, splits of the present kernel
    128: [(256, 64, 8, 3, 1), (256, 64, 8, 2, 1), (128, 64, 4, 4, 1), (64, 128, 4, 4, 2)],
    64: [(256, 64, 8, 3, 1), (256, 128, 8, 2, 1), (256, 64, 8, 2, 1), (128, 128, 4, 4, 1)],
}
