"""Measure this machine's GPU and choose the Triton kernels' tiles for some shapes: `python -m bam_kernels.tune`.

    python -m bam_kernels.tune --shapes 2048x8192x256 512x512x128

A shape is MxNxD: M x N scores of D features, from two views of M/2 images. For every tile, the default and its
neighbours are timed with a cold cache. A tile that gives another result is dropped; a tile that is not 2% faster than
the default is not kept. The result is one file for each kind of GPU: it replaces the file of an earlier run, and every
later process on this kind of GPU reads it. Delete it to return to the defaults.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tuned
from .backends import cuda, triton
from .backends.interface import HALF_UNIT, LOG2_E, Potential, RowKernels
from .backends.triton import tiles
from .layout import Layout
from .precision import multiply
from .tuned import Key, Tuning
from .whole_files import check_file

GAIN = 0.98  # largest share of the default's time for a tile that is kept: a smaller gain is noise
AGREEMENT = 1e-3  # largest relative difference between tiles, which add in different orders
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Job:
    """One launch whose tile can be chosen; `run` launches it and returns its result, equal for all tiles."""

    key: Key
    default: tuple[int, ...]
    candidates: list[tuple[int, ...]]
    run: Callable[[], Tensor]


def jobs(M: int, N: int, D: int, device: torch.device) -> Iterator[Job]:
    """Jobs for one shape: row kernels on int16 scores and, up to 512 features, flash kernels on fp16 rows."""
    layout = Layout(B=M // 2, V=2, L=2, T=2, D=D, W=max(N // M, 1))
    generator = torch.Generator(device).manual_seed(0)
    s = torch.randint(-32000, 32000, (M, N), generator=generator, device=device, dtype=torch.int16)
    step, ones = 1 / 32000, Potential.one(M, device)
    col = Potential.one(N, device)
    kernels, scale = triton.kernels(), LOG2_E / 0.1 * step
    shift, sums = torch.empty(2, N, dtype=torch.float32, device=device)

    def row() -> Tensor:
        at = Potential(ones.exponent.clone(), ones.mantissa.clone())
        kernels.sinkhorn_pass(s, scale, at, col, sums, False)
        return sums

    def column() -> Tensor:
        kernels.column_lse(s, scale, ones, shift, sums, False)
        return shift + sums.log2()

    def image() -> Tensor:
        views, P = s.view(2, -1, N), torch.empty(2, M // 2, N, dtype=torch.float32, device=device)
        guess = ones.exponent.view(2, -1)
        kernels.match(views, views, layout, col, guess, epsilon=0.1, temperature=0.1, step=step, targets=P)
        return P

    if N <= tiles.LONGEST_ROW:
        default = tiles.row_tile(M, N)
        yield Job(("row", M, N), default, _row_candidates(M, default), row)
    default = tiles.column_tile(M, N)
    yield Job(("column", M, N), default, _column_candidates(M, N, default), column)
    on_chip = tiles.image_tile(2, N)
    if on_chip is not None:
        yield Job(("image", 2, N), on_chip, _with_warps(on_chip, (2, 4, 8, 16)), image)
    if D <= 512:
        yield from _flash_jobs(layout, generator, device)


def _flash_jobs(layout: Layout, generator: torch.Generator, device: torch.device) -> Iterator[Job]:
    def unit(rows: int) -> Tensor:
        x = torch.randn(rows, layout.D, generator=generator, dtype=torch.float32, device=device)
        return (torch.nn.functional.normalize(x, dim=1) * HALF_UNIT).half()

    z, M, N = unit(layout.M), layout.M, layout.N
    bias = torch.zeros(N, dtype=torch.float32, device=device)
    kernels = triton.flash()(unit(N), bias, layout, masked=True, unit=HALF_UNIT)
    col = Potential.one(N, device)
    # -15 < -log2(e)/0.1: the largest score has exponent log2(e)/0.1, and P and A must stay within 1, as in training.
    row = Potential.one(M, device)
    row.exponent.fill_(-15.0)

    def rows() -> Tensor:
        row_out = Potential.empty(M, device)
        kernels.row_step(z, kernels.score_scale(0.1), col, row_out)
        return row_out.natural_log()

    def columns() -> Tensor:
        sums = torch.empty(N, dtype=torch.float32, device=device)
        kernels.column_sums(z, kernels.score_scale(0.1), row, col, sums)
        return sums

    def match() -> Tensor:
        dz = kernels.match(z, z, row, row, col, epsilon=0.1, temperature=0.1, needs_grad=True)[1]
        assert dz is not None
        return dz

    for m, n, wide, run in ((M, N, False, rows), (N, M, False, columns), (layout.B, N, True, match)):
        default = tiles.flash_tile(m, n, layout.D, wide=wide, sixteen_bit=True)
        yield Job(("flash", m, n, layout.D, int(wide), 1), default, _flash_candidates(m, n, wide, default), run)


def _with_warps(tile: Any, warps: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tile._replace(num_warps=n) for n in warps if n != tile.num_warps]


def _row_candidates(m: int, default: tiles.Tile) -> list[tuple[int, ...]]:
    """Tiles around the default: rows at once, programs (half to two per multiprocessor of a large GPU), warps."""
    candidates: list[tuple[int, ...]] = []
    for block_m in {max(default.block_m // 2, 1), default.block_m, default.block_m * 2}:
        for programs in (66, 132, 264):
            rows = tiles.round_up(-(-m // programs), block_m)
            tile = default._replace(block_m=block_m, rows=rows, chunks=-(-m // rows))
            candidates += [tile, *_with_warps(tile, (4, 8, 16))]
    return [tile for tile in dict.fromkeys(candidates) if tile != default]


def _column_candidates(m: int, n: int, default: tiles.Tile) -> list[tuple[int, ...]]:
    """Tiles around the default: columns and rows at once, warps; at most 64 chunks of rows."""
    candidates: list[tuple[int, ...]] = []
    for block_n in (128, 256, 512, 1024):
        for block_m in (8, 16):
            rows = tiles.round_up(max(-(-m // 64), block_m), block_m)
            tile = tiles.Tile(block_m, min(block_n, tiles.power_of_two(n)), rows, -(-m // rows), 4)
            candidates += [tile, *_with_warps(tile, (2, 8))]
    return [tile for tile in dict.fromkeys(candidates) if tile != default]


def _flash_candidates(m: int, n: int, wide: bool, default: tiles.FlashTile) -> list[tuple[int, ...]]:
    candidates: list[tuple[int, ...]] = []
    for block_m in (32, 64, 128):
        for block_n in (32, 64) if wide else (32, 64, 128):
            for num_warps, num_stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                candidates.append(
                    default._replace(
                        block_m=min(block_m, tiles.power_of_two(max(m, 16))),
                        block_n=min(block_n, tiles.power_of_two(max(n, 16))),
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )
                )
    return [tile for tile in dict.fromkeys(candidates) if tile != default]


def best(job: Job, timer: Timer) -> tuple[tuple[int, ...], float, float]:
    """Time a job's candidates; returns the fastest tile, its milliseconds and the milliseconds of the default."""
    expected = job.run().clone()
    default_ms = timer(job.run)
    tile, fastest = job.default, GAIN * default_ms
    for candidate in job.candidates:
        with tuned.use_tiles({job.key: candidate}):
            try:
                result = job.run()
            except Exception as error:  # the tile needs more registers or shared memory than the GPU has
                print(f"    {candidate}: {type(error).__name__}", file=sys.stderr)
                continue
            if not bool(((result - expected).abs() <= AGREEMENT * expected.abs().max()).all()):
                print(f"    {candidate}: another result, dropped", file=sys.stderr)
                continue
            ms = timer(job.run)
        if ms < fastest:
            tile, fastest = candidate, ms
    return tuple(tile), (fastest if tile != job.default else default_ms), default_ms


def measured_rates(device: torch.device, timer: Timer, size: int = 8192) -> dict[str, float]:
    """Measure rates per second.

    Flops of fp16 products and of a flash kernel, bytes of a copy, and exponentials of row kernels on int16 scores, of
    each backend that can run.
    """
    a = torch.randn(size, size, dtype=torch.float32, device=device).half()
    product = torch.empty(size, size, dtype=torch.float32, device=device)
    copy = torch.empty_like(product)
    flash = next(job for job in jobs(size // 4, size, 256, device) if job.key[0] == "flash")
    rates = {
        "product_flops": 2 * size**3 / timer(lambda: multiply(a, a, product)) * 1e3,
        "flash_flops": 2 * (size // 4) * size * 256 / timer(flash.run) * 1e3,
        "memory_bytes": 2 * copy.nbytes / timer(lambda: product.copy_(copy)) * 1e3,
        "exponentials": _exponentials(triton.kernels(), size // 4, size, device, timer),
    }
    if cuda.unavailable(device) is None:
        rates["cuda_exponentials"] = _exponentials(cuda.kernels(), size // 4, size, device, timer)
    return rates


def _exponentials(kernels: RowKernels, m: int, n: int, device: torch.device, timer: Timer) -> float:
    """Exponentials per second in the passes of three Sinkhorn iterations, whose last rows the match computes."""
    s = torch.randint(-32000, 32000, (m, n), device=device, dtype=torch.int16)
    scale, row, col = LOG2_E / 0.1 / 32000, Potential.one(m, device), Potential.one(n, device)
    shift, sums = torch.empty(2, n, dtype=torch.float32, device=device)

    def passes() -> None:
        kernels.column_lse(s, scale, row, shift, sums, False)
        for _ in range(2):
            kernels.sinkhorn_pass(s, scale, row, col, sums, False)

    return 3 * m * n / timer(passes) * 1e3


def tune(shapes: list[tuple[int, int, int]], device: torch.device, timer: Timer, size: int = 8192) -> Tuning:
    """Choose tiles for all shapes and measure rates; prints the default's time and the best time of every job."""
    chosen: dict[Key, tuple[int, ...]] = {}
    with tuned.use_tiles({}):
        for shape in shapes:
            for job in jobs(*shape, device):
                tile, ms, default_ms = best(job, timer)
                kept = "default" if tile == tuple(job.default) else str(tile)
                print(f"{' '.join(map(str, job.key)):<28} {default_ms:>9.4f} ms -> {ms:>9.4f} ms  {kept}", flush=True)
                if kept != "default":
                    chosen[job.key] = tile
    with tuned.use_tiles(chosen):
        measured = measured_rates(device, timer, size)
    for name, rate in measured.items():
        print(f"{name:<28} {rate:>12.3g} a second")
    return Tuning(measured, chosen)


def _shape(text: str) -> tuple[int, int, int]:
    M, N, D = (int(part) for part in text.split("x"))
    if M < 4 or M % 2 or N % M or D < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be MxNxD with M even, at least 4, and N a multiple of M")
    return M, N, D


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bam_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, required=True, help="MxNxD: scores and features")
    options = parser.parse_args(args)
    device, file = torch.device("cuda"), tuned.path()
    reason = triton.unavailable(device) or (None if torch.cuda.is_available() else "torch sees no GPU")
    reason = reason or (None if file else f"this user has no home folder for the result; {tuned.FILE} names a file")
    if reason or file is None:
        parser.error(f"nothing can be timed here: {reason}")

    from triton.testing import do_bench

    try:
        check_file(file)
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{file} cannot be written: {error.strerror}")
    tuning = tune(options.shapes, device, lambda run: do_bench(run, return_mode="median"))
    try:
        tuned.save(tuning, file)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {file}: not written ({error.strerror}); what was there stays whole\n")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
