"""Shapes of launches from those of problems and from what the device holds: csrc/cuda/cuda.h says what they mean.

A thread owns OWNED columns of a row; a row is in one block, or over a cluster of blocks.
"""

from typing import NamedTuple

from ..extension import _C
from .device import Device

# Constants that the extension does not have, as one built from older sources: `cuda.unavailable` refuses it.
MISSING: list[str] = []


def _constant(name: str) -> int:
    """A constant of csrc/cuda/cuda.h; 0 where there is no extension, or none that has it."""
    constants = getattr(_C, "cuda_constants", {})
    if _C is not None and name not in constants:
        MISSING.append(name)
    return constants.get(name, 0)


OWNED = _constant("owned")
MOST_THREADS = _constant("threads")
REGISTER_THREADS = _constant("register_threads")  # threads of whole-row kernels that fit a multiprocessor's registers
ON_CHIP_THREADS = _constant("on_chip_threads")
STAGES = _constant("stages")
GROUP_BYTES = _constant("group_bytes")
GROUPS = _constant("groups")
POTENTIAL_BYTES = _constant("potential_bytes")
SCRATCH_BYTES = _constant("scratch_bytes")
WARP = 32
COLUMN_BLOCK = 1024  # columns of a block of the kernels whose threads walk down rows
COLUMN_ROWS = 4  # rows that those read at once
MOST_CHUNKS = 128
CLUSTER_ROWS = 8  # most rows of a block where one cluster does a small problem: with more the whole grid is faster
IMAGES_AT_ONCE = 256  # of a long match with top-k, whose workspace is a row of means per image


class Team(NamedTuple):
    """`cluster` blocks of `threads` threads hold a row."""

    threads: int
    cluster: int


LONG = Team(0, 1)  # rows of any length, read again for every sum


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_team(n: int, column_bytes: int, device: Device) -> Team | None:
    """The smallest team whose shared memory holds n columns of `column_bytes` each; None where none does."""
    cluster = 1
    while cluster <= device.cluster:
        threads = round_up(-(-n // (OWNED * cluster)), WARP)
        if threads <= MOST_THREADS and SCRATCH_BYTES + threads * OWNED * column_bytes <= device.shared_bytes:
            return Team(threads, cluster)
        cluster *= 2
    return None


class Pass(NamedTuple):
    """Of a Sinkhorn pass: `group` rows share a reduction; `at_once` teams run at once."""

    team: Team
    group: int
    at_once: int


def pass_shape(n: int, score_bytes: int, device: Device) -> Pass | None:
    """The fewest blocks that hold a row, then most of them at once, then most rows in a group; None: no team fits."""
    found = []
    for group_bytes in (GROUP_BYTES, GROUP_BYTES // 2):
        column_bytes = POTENTIAL_BYTES + GROUPS * group_bytes
        team = row_team(n, column_bytes, device)
        if team is None:
            continue
        block_bytes = SCRATCH_BYTES + team.threads * OWNED * column_bytes
        blocks = device.blocks(team.threads, block_bytes, REGISTER_THREADS)
        at_once = blocks
        if team.cluster > 1:  # Device.clusters_of counts those whose blocks have a multiprocessor to themselves
            blocks_each = blocks // device.multiprocessors
            at_once = min(blocks // team.cluster, device.clusters_of(team.cluster) * blocks_each)
        found.append(Pass(team, group_bytes // score_bytes, at_once))
    return min(found, key=lambda shape: (shape.team.cluster, -shape.at_once), default=None)


def match_team(L: int, n: int, score_bytes: int, device: Device) -> Team | None:
    """An image's L rows of targets and the scores on their way."""
    return row_team(n, 4 * L + STAGES * score_bytes, device)


def pass_rows(m: int, shape: Pass, device: Device) -> int:
    """Rows of a chunk: as many chunks as the device runs at once."""
    chunks = max(1, min(shape.at_once, 2 * device.multiprocessors))
    return round_up(max(-(-m // chunks), 1), shape.group)


def column_rows(m: int, n: int, device: Device) -> int:
    """Rows of a chunk of the kernels whose threads own columns: four blocks a multiprocessor."""
    chunks = max(1, min(4 * device.multiprocessors // -(-n // COLUMN_BLOCK), MOST_CHUNKS))
    return round_up(max(-(-m // chunks), 1), COLUMN_ROWS)


class OnChip(NamedTuple):
    """Rows of a block; the threads that hold a row, and the cluster that all blocks are or 1; blocks of the grid."""

    rows: int
    team: Team
    blocks: int


def on_chip(m: int, n: int, score_bytes: int, device: Device) -> OnChip | None:
    """All scores in shared memory: of one cluster where its blocks have few rows, else of a grid; None: neither."""
    threads = round_up(-(-n // OWNED), WARP)
    if threads > ON_CHIP_THREADS:
        return None
    group = GROUP_BYTES // score_bytes
    left = device.shared_bytes - SCRATCH_BYTES - threads * (8 + OWNED * POTENTIAL_BYTES)
    most_rows = left // (threads * OWNED * score_bytes) // group * group
    rows = round_up(-(-m // device.cluster), group)
    if device.cluster > 1 and rows <= min(most_rows, CLUSTER_ROWS):
        return OnChip(rows, Team(threads, device.cluster), device.cluster)
    rows = round_up(-(-m // device.multiprocessors), group)
    if device.cooperative and rows <= most_rows:
        return OnChip(rows, Team(threads, 1), -(-m // rows))
    return None
