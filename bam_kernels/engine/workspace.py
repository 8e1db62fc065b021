"""The workspace of a recorded step: one block of memory, in which tensors that are not needed at once share places."""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes; torch's own allocations on a GPU are aligned to 512
NO_BASE = -1  # in place of a base: a tensor has no elements, or a block has no place yet


@dataclass(eq=False)
class Block:
    """Memory of one tensor that a step allocates or takes.

    begin, end   addresses of its first element and behind its last one, while it was recorded
    allocated    it came without contents, so that it may lie in the workspace
    first, last  first and last moment of use; launches, operators and messages count as moments
    base         number of the tensor that holds it in a run, `offset` bytes after that tensor's first element
    """

    begin: int
    end: int
    allocated: bool = False
    first: int = -1
    last: int = -1
    base: int = NO_BASE
    offset: int = 0

    def use(self, moment: int) -> None:
        self.first = moment if self.first < 0 else self.first
        self.last = moment


def place(blocks: Sequence[Block], base: int) -> int:
    """Place blocks in one workspace, so that none overlaps another that is in use at the same time; returns its bytes.

    Large blocks first, each at the lowest offset that is free.
    """
    placed: list[Block] = []
    total = 0
    for block in sorted(blocks, key=lambda b: b.begin - b.end):
        size = block.end - block.begin
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < block.first or block.last < other.first:
                continue
            if offset + size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.end - other.begin))
        block.base, block.offset = base, offset
        placed.append(block)
        total = max(total, _aligned(offset + size))
    return total


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
