"""Launch shapes of the CUDA kernels, from problem shapes and the attributes of the device.

csrc/cuda/cuda.h explains the shapes. A thread owns OWNED columns of a row; a row is in one block, or spread over a
cluster of blocks.
"""

from typing import NamedTuple

from ..extension import _C
from .device import Device

# Names of constants that the extension lacks because it was built from older sources; `cuda.unavailable` refuses it.
MISSING: list[str] = []


def _constant(name: str) -> int:
    """Constant `name` of csrc/cuda/cuda.h; 0 if there is no extension or it lacks the constant."""
    constants = getattr(_C, "cuda_constants", {})
    if _C is not None and name not in constants:
        MISSING.append(name)
    return constants.get(name, 0)


OWNED = _constant("owned")
MOST_THREADS = _constant("threads")
REGISTER_THREADS = _constant("register_threads")  # threads of whole-row kernels in a multiprocessor's registers
ON_CHIP_THREADS = _constant("on_chip_threads")
STAGES = _constant("stages")
FEW_STAGES = _constant("few_stages")
GROUP_BYTES = _constant("group_bytes")
GROUPS = _constant("groups")
POTENTIAL_BYTES = _constant("potential_bytes")
SCRATCH_BYTES = _constant("scratch_bytes")
WARP = 32
COLUMN_BLOCK = 1024  # columns of a block in kernels whose threads walk down rows
COLUMN_ROWS = 4  # rows that such a kernel reads at once
SUM_BLOCK = 256  # columns of a block whose warps have different rows: sums over columns, and quantisation
SUM_WARPS = 8  # warps of such a block, each of which reads COLUMN_ROWS rows at once
SUMS_AT_ONCE = 3  # such blocks with sums that a multiprocessor's registers hold
QUANTIZE_AT_ONCE = 4  # such blocks without sums
MOST_CHUNKS = 128
WARP_COLUMNS = (512, 1024)  # widths of the rows that a warp of the one-launch Sinkhorn holds
WARP_ROWS = 4  # rows that such a warp reads at once, at most
# Most scores per block of the one-launch Sinkhorn. An iteration takes 1 us for what blocks exchange and 1 us for every
# 16384 scores of a block; separate launches take 5 us, and more only for a million scores and above.
CLUSTER_SCORES = 1 << 15
IMAGES_AT_ONCE = 256  # images per launch of a long match with top-k, whose workspace is a row of means per image


class Team(NamedTuple):
    """Blocks that hold one row: `cluster` blocks of `threads` threads."""

    threads: int
    cluster: int


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_team(n: int, column_bytes: int, device: Device) -> Team | None:
    """The smallest team whose shared memory holds n columns of `column_bytes` bytes; None if there is none."""
    cluster = 1
    while cluster <= device.cluster:
        threads = round_up(-(-n // (OWNED * cluster)), WARP)
        if threads <= MOST_THREADS and SCRATCH_BYTES + threads * OWNED * column_bytes <= device.shared_bytes:
            return Team(threads, cluster)
        cluster *= 2
    return None


class Pass(NamedTuple):
    """Launch shape of a Sinkhorn pass: `group` rows share a reduction, and `at_once` teams run at once."""

    team: Team
    group: int
    at_once: int


def pass_shape(n: int, score_bytes: int, device: Device) -> Pass | None:
    """Choose the pass with the fewest blocks per row, then most teams at once, then largest group; None: none fits."""
    passes = []
    for group_bytes in (GROUP_BYTES, GROUP_BYTES // 2):
        column_bytes = POTENTIAL_BYTES + GROUPS * group_bytes
        team = row_team(n, column_bytes, device)
        if team is None:
            continue
        block_bytes = SCRATCH_BYTES + team.threads * OWNED * column_bytes
        blocks = device.blocks(team.threads, block_bytes, REGISTER_THREADS)
        at_once = blocks
        if team.cluster > 1:  # Device.clusters_of counts clusters with one block per multiprocessor
            blocks_each = blocks // device.multiprocessors
            at_once = min(blocks // team.cluster, device.clusters_of(team.cluster) * blocks_each)
        passes.append(Pass(team, group_bytes // score_bytes, at_once))
    return min(passes, key=lambda shape: (shape.team.cluster, -shape.at_once), default=None)


class MatchShape(NamedTuple):
    """Launch shape of a match: a team, and how many of an image's rows are on chip or on their way at once."""

    team: Team
    stages: int


LONG = MatchShape(Team(0, 1), 0)  # stands for rows of any length, read again for every sum


def match_shape(L: int, n: int, score_bytes: int, device: Device) -> MatchShape | None:
    """Choose the smallest team that holds an image's L target rows and the scores that are being loaded; None: none.

    A single block takes STAGES rows of int16 scores at once, where as many blocks fit the device as with fewer rows.
    """

    def column_bytes(stages: int) -> int:
        return 4 * L + stages * score_bytes

    team = row_team(n, column_bytes(FEW_STAGES), device)
    if team is None or team.cluster > 1 or score_bytes != 2:
        return team and MatchShape(team, FEW_STAGES)
    few, most = (
        device.blocks(team.threads, SCRATCH_BYTES + team.threads * OWNED * column_bytes(stages), REGISTER_THREADS)
        for stages in (FEW_STAGES, STAGES)
    )
    return MatchShape(team, STAGES if most == few else FEW_STAGES)


def pass_rows(m: int, shape: Pass, device: Device) -> int:
    """Rows per chunk of a Sinkhorn pass, so that the device runs all chunks at once."""
    chunks = max(1, min(shape.at_once, 2 * device.multiprocessors))
    return round_up(max(-(-m // chunks), 1), shape.group)


def column_rows(m: int, n: int, device: Device) -> int:
    """Rows per chunk in kernels whose threads own columns, for four blocks per multiprocessor."""
    chunks = max(1, min(4 * device.multiprocessors // -(-n // COLUMN_BLOCK), MOST_CHUNKS))
    return round_up(max(-(-m // chunks), 1), COLUMN_ROWS)


def sum_rows(m: int, n: int, at_once: int, device: Device) -> int:
    """Rows per chunk in kernels whose warps share columns: `at_once` blocks per multiprocessor, each warp with rows."""
    chunks = max(1, min(at_once * device.multiprocessors // -(-n // SUM_BLOCK), MOST_CHUNKS))
    return max(round_up(-(-m // chunks), COLUMN_ROWS), SUM_WARPS * COLUMN_ROWS)


class OnChip(NamedTuple):
    """Launch shape of the one-launch Sinkhorn: one cluster of `cluster` blocks with `rows` rows each."""

    rows: int
    cluster: int


def on_chip(m: int, n: int, device: Device) -> OnChip | None:
    """Choose the largest cluster if it holds all scores, as floats, and is faster than separate launches; else None."""
    width = next((width for width in WARP_COLUMNS if n <= width), None)
    if device.cluster == 1 or width is None:
        return None
    rows = round_up(-(-m // device.cluster), WARP_ROWS)
    # sizeof(Places) and the rows of csrc/cuda/sinkhorn_on_chip.cu.
    shared_bytes = 4 * ((ON_CHIP_THREADS // WARP + 5) * width + rows * (width + 2)) + 16
    if rows * width > CLUSTER_SCORES or shared_bytes > device.shared_bytes:
        return None
    return OnChip(rows, device.cluster)
