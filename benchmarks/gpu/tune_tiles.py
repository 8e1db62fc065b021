"""Compiles candidate tiles of the Triton kernels, or times them and keeps the best.

    python benchmarks/gpu/tune_tiles.py --compile 0/12          # a twelfth of the candidates, into Triton's cache
    python benchmarks/gpu/tune_tiles.py --tuned tuned.json      # times candidates alone on the GPU, writes the best

A tile that wins alone may lose in a step, where other kernels have used the cache. So whole steps are timed
without and with the winners of a group, and the group is kept or dropped as a whole. A group is the tiles for one
number of columns, or the tiles of the flash kernels. The file is written again after each group, so that a run that is
ended keeps what it has found.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from one_step import steps_of
from times import Clock

from bam_kernels import tune, tuned
from bam_kernels.tuned import Key, Tuning

# 512 rows of 8192 scores: the slab that stays in an H100's cache between the product and `finish_scores`.
SHAPES, TOY_SHAPES = ((2048, 8192, 256), (512, 8192, 4096), (512, 512, 256)), ((16, 32, 16),)
COLD_CALLS = 5
TOY_CANDIDATES = 2


@dataclass(frozen=True)
class Steps:
    """Whole steps, as (shape, views), that decide whether the tiles whose keys `takes` accepts are kept."""

    name: str
    takes: Callable[[Key], bool]
    shapes: tuple[tuple[str, int], ...]
    engine: str
    teacher: bool = True


def row_tiles(N: int, *shapes: tuple[str, int]) -> Steps:
    return Steps(f"rows of {N}", lambda key: key[0] != "flash" and key[2] == N, shapes, "slab")


def flash_tiles(N: int, *shapes: tuple[str, int]) -> Steps:
    """Steps for the flash tiles of N columns; without a teacher, as in bam_kernels.tune.jobs."""
    return Steps(f"flash, {N}", lambda key: key[0] == "flash" and N in key[1:3], shapes, "flash", teacher=False)


STEPS = (
    row_tiles(8192, ("2048x8192x256", 8), ("2048x8192x4096", 8)),
    row_tiles(512, ("512x512x256", 2)),
    flash_tiles(8192, ("2048x8192x256", 2)),
    flash_tiles(512, ("512x512x256", 2)),
)
TOY_STEPS = (row_tiles(32, ("16x32x16", 2)), flash_tiles(32, ("16x32x16", 2)))


def jobs_of(steps: Steps, device: torch.device, toy: bool) -> Iterator[tune.Job]:
    """Yield each launch whose tile these steps decide, without repetition."""
    seen: set[Key] = set()
    for shape in TOY_SHAPES if toy else SHAPES:
        for job in tune.jobs(*shape, device):
            if steps.takes(job.key) and job.key not in seen:
                seen.add(job.key)
                candidates = job.candidates[:TOY_CANDIDATES] if toy else job.candidates
                yield tune.Job(job.key, job.default, candidates, job.run)


def groups(toy: bool) -> tuple[Steps, ...]:
    return TOY_STEPS if toy else STEPS


def compile_share(part: int, parts: int, device: torch.device, toy: bool) -> int:
    """Compile every `parts`-th candidate by running it once; returns how many did not run."""
    failed = number = 0
    for job in (job for steps in groups(toy) for job in jobs_of(steps, device, toy)):
        for tile in (job.default, *job.candidates):
            number += 1
            if number % parts != part:
                continue
            try:
                with tuned.use_tiles({job.key: tuple(tile)}):
                    job.run()
            except Exception as error:  # too many registers or too much shared memory: left out when timed
                failed += 1
                print(f"{job.key} {tuple(tile)}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    print(f"{number} candidates, {failed} of this share did not run")
    return failed


class ColdTimer:
    """Times a call in ms with its operands out of the cache.

    The replayed graph writes more than the cache holds before each call; the time of a graph that only writes is
    subtracted.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock = clock
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.written = torch.empty(max(3 * cache, 1), dtype=torch.int8, device=device)
        self.write_us = self._us(lambda: None)

    def __call__(self, run: Callable[[], Any]) -> float:
        return max(self._us(run) - self.write_us, 1e-3) / 1e3

    def _us(self, run: Callable[[], Any]) -> float:
        def both() -> Any:
            self.written.zero_()
            return run()

        return self.clock.graph_us([both] * COLD_CALLS)


def chosen_tiles(steps: Steps, timer: tune.Timer, device: torch.device, toy: bool) -> dict[Key, tuple[int, ...]]:
    """The tiles of these steps that, timed alone, are faster than the defaults."""
    chosen = {}
    with tuned.use_tiles({}):
        for job in jobs_of(steps, device, toy):
            tile, ms, default_ms = tune.best(job, timer)
            kept = "default" if tile == tuple(job.default) else str(tile)
            name = " ".join(map(str, job.key))
            print(f"{name:<28} {1e3 * default_ms:>9.2f} us -> {1e3 * ms:>9.2f} us  {kept}", flush=True)
            if tile != tuple(job.default):
                chosen[job.key] = tile
    return chosen


def tiles_kept_by_steps(
    chosen: dict[Key, tuple[int, ...]], steps: Steps, clock: Clock, device: torch.device
) -> dict[Key, tuple[int, ...]]:
    """The chosen tiles, or none if the steps are slower with them.

    The steps are timed twice without and twice with the tiles, alternating.
    """
    if not chosen:
        return {}
    runs = [
        steps_of(shape, views, "triton", device, teacher=steps.teacher, engine=steps.engine)
        for shape, views in steps.shapes
    ]
    totals = []
    for tiles in ({}, chosen, {}, chosen):
        with tuned.use_tiles(tiles):
            totals.append([clock.graph_us(run) for run in runs])
    without, with_them = (sum(map(sum, totals[first::2])) for first in (0, 1))
    kept = with_them <= without
    shown = "; ".join(" ".join(f"{us:.1f}" for us in times) for times in zip(*totals, strict=True))
    print(f"{steps.name}: {len(chosen)} tiles, us without, with, without, with: {shown}: {'kept' if kept else 'left'}")
    return chosen if kept else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="PART/PARTS", help="compile a share of the candidates and time nothing")
    parser.add_argument("--tuned", type=Path, help="file for the best tiles and the measured rates")
    parser.add_argument("--toy", action="store_true", help="run toy sizes on the CPU; needs TRITON_INTERPRET=1")
    options = parser.parse_args()
    device = torch.device("cpu" if options.toy else "cuda")
    if options.compile:
        part, parts = map(int, options.compile.split("/"))
        compile_share(part, parts, device, options.toy)
        return 0
    if options.tuned is None:
        parser.error("either --compile or --tuned is needed")
    timer = ColdTimer(Clock(device, 0.001 if options.toy else 0.02), device)
    clock = Clock(device, 0.001 if options.toy else 0.1)
    rates = tune.measured_rates(device, timer, 64 if options.toy else 8192)
    for name, rate in rates.items():
        print(f"{name:<28} {rate:>12.3g} a second")
    machine_file = tuned.path()  # path of this GPU's tuning file; None without a GPU
    saved = (options.tuned, *([machine_file] if machine_file is not None else []))
    kept: dict[Key, tuple[int, ...]] = {}
    won = 0
    for steps in groups(options.toy):
        chosen = chosen_tiles(steps, timer, device, options.toy)
        won += len(chosen)
        kept |= tiles_kept_by_steps(chosen, steps, clock, device)
        for file in saved:
            tuned.save(Tuning(rates, kept), file)
    print(f"{len(kept)} tiles of {won} that won alone: {', '.join(map(str, saved))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
