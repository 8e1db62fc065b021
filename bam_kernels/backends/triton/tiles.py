"""Block sizes and grids of the Triton kernels, from shapes alone or from a tuning run on this kind of GPU.

They are equal from run to run, and so is the order of sums.
"""

from typing import NamedTuple

from ...tuned import tile_of

LONGEST_ROW = 8192  # most columns of a row on chip
LARGEST_TILE = 16384  # most rows * columns on chip: potentials, sums and exponentials in registers of 512 threads
LARGEST_IMAGE = 24576  # most (target rows + 1) * columns of an image on chip: what 512 threads hold in registers
IMAGES_AT_ONCE = 128  # images per launch of a long match with top-k, whose workspace is a row of means per image

# Sums are split into chunks up to this many programs per launch, which bounds the partial sums of dz and dk.
PROGRAMS = 256


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def clamp(n: int, least: int, most: int) -> int:
    return max(least, min(n, most))


def warps(elements: int, per_thread: int = 32) -> int:
    return clamp(power_of_two(elements // (32 * per_thread)), 1, 16)


class Tile(NamedTuple):
    """Rows and columns of a tile (block_m, block_n), rows of a chunk, number of chunks, warps of a program."""

    block_m: int
    block_n: int
    rows: int
    chunks: int
    num_warps: int


def row_tile(m: int, n: int) -> Tile:
    """Tile of whole rows on chip, one program per chunk: about one program per multiprocessor of a large GPU.

    Several rows share the barriers of one reduction; a thread computes 32 exponentials of a tile.
    """
    found = tile_of("row", m, n)
    if found:
        return Tile(*found)
    block_n = max(power_of_two(n), 32)
    rows = max(-(-m // 128), clamp(2048 // block_n, 1, 8))
    block_m = clamp(LARGEST_TILE // block_n, 1, min(power_of_two(rows), 32))
    rows = round_up(rows, block_m)
    return Tile(block_m, block_n, rows, -(-m // rows), warps(block_m * block_n))


def column_tile(m: int, n: int) -> Tile:
    """Tile of column sums: a thread owns its columns, so that rows need no barrier; at most 64 chunks of rows."""
    found = tile_of("column", m, n)
    if found:
        return Tile(*found)
    block_n = clamp(power_of_two(n), 32, 1024)
    rows = round_up(max(-(-m // 64), 8), 8)
    return Tile(8, block_n, rows, -(-m // rows), warps(block_n, per_thread=8))


def image_tile(L: int, n: int) -> Tile | None:
    """Tile of the target rows of one image and one source row on chip; None if they do not fit."""
    found = tile_of("image", L, n)
    if found:
        return Tile(*found)
    block_l, block_n = power_of_two(L), max(power_of_two(n), 32)
    if (block_l + 1) * block_n > LARGEST_IMAGE:
        return None
    return Tile(block_l, block_n, 1, 1, warps(block_n, per_thread=8))


def long_image_tile(L: int, n: int) -> Tile:
    """Tile of a block of columns of an image's target rows, for rows too long for the chip."""
    block_l = power_of_two(L)
    block_n = clamp(8192 // block_l, 32, min(power_of_two(n), 4096))
    return Tile(block_l, block_n, 1, 1, 8)


def block_of(n: int, most: int = 4096) -> int:
    """Number of columns that a kernel reads at once in its loop over a row."""
    return clamp(power_of_two(n), 32, most)


class FlashTile(NamedTuple):
    """Tile of a flash kernel.

    block_m: rows that a program owns. block_n: rows of one step of its loop. block_d, block_out: features multiplied at
    once, features of a gradient.
    """

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    num_warps: int
    num_stages: int = 2


def flash_tile(m: int, n: int, D: int, *, wide: bool = False, sixteen_bit: bool = True) -> FlashTile:
    """Tile for m rows that programs own, up to 64 each, and n rows that they read, up to 64 at a time, of D features.

    16 rows are the least that a product takes. wide: a program also holds sums of up to 256 features for its rows, and
    reads 32 rows at a time, so that all fit the registers of 128 threads on sm_90.
    """
    found = tile_of("flash", m, n, D, wide, sixteen_bit)
    if found:
        return FlashTile(*found)
    block_d = clamp(power_of_two(D), 16, 128 if sixteen_bit and D <= 128 else 64)
    block_out = clamp(power_of_two(D), 16, 256)
    block_m, block_n = clamp(power_of_two(m), 16, 64), clamp(power_of_two(n), 16, 32 if wide else 64)
    return FlashTile(block_m, block_n, block_d, block_out, 4)


def split(tiles: int, n: int, block_n: int, most: int = 64) -> tuple[int, int]:
    """Split n rows into chunks of whole blocks, for about PROGRAMS programs; returns (chunks, rows of a chunk)."""
    blocks = -(-n // block_n)
    chunks = clamp(PROGRAMS // max(tiles, 1), 1, min(most, blocks))
    rows = round_up(-(-n // chunks), block_n)
    return -(-n // rows), rows
