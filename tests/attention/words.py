"""The 32-bit values of the checker in `descriptors`, each known up to the address of a buffer; a `wgmma` of them."""

from __future__ import annotations

from dataclasses import dataclass

BASE = 0x400
"""Where a program's shared memory begins, in bytes; the machine code says so itself."""
BITS32 = 2**32 - 1
ADDRESS_BITS = (14, 15)
"""How many bits of an address in units of 16 bytes Triton extracts: 14 in 3.6 and 3.7, 15 in 3.9. 14 are enough."""
ADDRESS = 2 ** max(ADDRESS_BITS) - 1


@dataclass(frozen=True)
class Word:
    """A 32-bit value: `offset`, plus what `root` names (nothing: the value is known).

    Attributes:
        small: the root is at most `ADDRESS`: the address of a buffer, known at run time only, as a descriptor has it.
        defined: false once the value comes, on some path, from a register that was never written.
    """

    offset: int = 0
    root: str = ""
    small: bool = False
    defined: bool = True

    @property
    def number(self) -> int | None:
        return self.offset if self.defined and not self.root else None

    def plus(self, addend: int) -> tuple[Word, int | None]:
        """The sum and its carry; an unknown carry is None."""
        total = self.offset + addend
        if self.root and not (self.small and total % 2**32 + ADDRESS <= BITS32 and self.offset + ADDRESS <= BITS32):
            return Word((self.offset + addend) & BITS32, self.root, False, self.defined), None
        return Word(total & BITS32, self.root, self.small, self.defined), total >> 32

    def masked(self, bits: int, root: str) -> Word:
        if self.number is not None or not self.defined:
            return Word(self.offset & (2**bits - 1), self.root, False, self.defined)
        return Word(0, root, bits <= max(ADDRESS_BITS))


UNDEFINED = Word(root="never written", defined=False)
State = dict[str, Word]


@dataclass(frozen=True)
class Multiply:
    """One instruction of the tensor cores: its shape such as "64x32x16", and its descriptors, A's (if any) and B's.

    A descriptor is (run-time address, low 32 bits without it, high 32 bits); None where a value is not known.
    """

    shape: str
    transposed: bool
    descriptors: tuple[tuple[bool, int, int] | None, ...]

    def __str__(self) -> str:
        words = ", ".join(
            "unknown" if one is None else f"{'address + ' if one[0] else ''}{one[1] | one[2] << 32:#018x}"
            for one in self.descriptors
        )
        return f"{self.shape}{' transposed' if self.transposed else ''}: {words}"
