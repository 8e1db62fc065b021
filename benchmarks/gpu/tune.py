"""Finds the fastest Triton tiles and constants of CUDA kernels for this GPU: about 420 s, one archive.

    python benchmarks/gpu/tune.py --out /tmp/tune --archive tune.tar.gz --extensions build/gpu

1. Several processes compile all candidate tiles (tune_tiles.py).
2. One process alone times the tiles, and whole steps with the winners (tune_tiles.py).
3. The kernels of each variant that build.py has built are checked and timed (tune_variant.py, variants.py).
4. A variant that is faster than the default build is timed in whole steps, alternating with the default build.

The environment variable BAM_KERNELS_TUNED may name OUT/tuned.json. A copy is saved where later processes on this kind
of GPU find it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from earlier_run import remove
from rows import Row, read
from steps import (
    BASE,
    TURNS,
    Run,
    Step,
    checkout_environment,
    extension_environment,
    in_turn,
    parser,
    script,
    table,
)
from variants import TRIED

COMPILE_SHARE = 0.45  # of the run's seconds; what is not compiled by then is compiled where it is timed
GAIN = 0.98  # a variant wins below this share of the default build's time: a smaller gain is noise


class Tuning:
    """Builds the steps of a tuning run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool, processes: int, seconds: float = 420.0) -> None:
        self.out, self.extensions, self.toy, self.processes = out.absolute(), extensions, toy, processes
        self.compile_s = COMPILE_SHARE * seconds
        self.rows = self.out / "rows.jsonl"
        self.tuned = self.out / "tuned.json"

    def triton_environment(self) -> dict[str, str]:
        """Environment of steps with Triton, whose cache lies next to OUT: its thousands of files are not archived."""
        cache = self.out.with_name(f"{self.out.name}-triton")
        interpreted = {"TRITON_INTERPRET": "1"} if self.toy else {}
        return checkout_environment() | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | interpreted

    def toy_option(self) -> list[str]:
        return ["--toy"] if self.toy else []

    def compile_steps(self) -> list[Step]:
        shares = [f"{part}/{self.processes}" for part in range(self.processes)]
        return [
            Step(
                f"compile-{part}",
                script("tune_tiles", "--compile", share, *self.toy_option()),
                self.compile_s,
                self.triton_environment(),
            )
            for part, share in enumerate(shares)
        ]

    def tile_step(self) -> Step:
        return Step(
            "tiles", script("tune_tiles", "--tuned", self.tuned, *self.toy_option()), 150, self.triton_environment()
        )

    def variant_step(self, name: str, step: str, *options: str) -> Step:
        """A step that times a variant's kernels or whole steps; a toy run times the installed CPU kernels."""
        environment = checkout_environment() | extension_environment(self.extensions, name)
        missing = None if self.toy or "BAM_KERNELS_EXTENSION" in environment else "build.py has not made it"
        command = script("tune_variant", "--name", name, "--rows", self.rows, *options, *self.toy_option())
        return Step(step, command, 45, environment, missing)

    def variant_steps(self) -> list[Step]:
        return [self.variant_step(name, variant_step_name(name)) for name in (BASE, *TRIED)]

    def whole_steps_in_turn(self, winners: list[str]) -> list[Step]:
        """Steps that time whole steps of the default build and of each winner, alternating."""
        builds = (BASE, *winners) if winners else ()
        return [self.variant_step(name, turn_step_name(turn, name), "--step") for turn, name in in_turn(builds)]

    def drop_old_rows(self, run: Run) -> None:
        """Remove the rows of an earlier run that this run measures again."""

        def again(row: Row) -> bool:
            kernels, steps = [variant_step_name(row.note)], [turn_step_name(turn, row.note) for turn in range(TURNS)]
            return any(run.chosen(step) for step in (kernels if row.kind == "kernel" else steps))

        kept = [row for row in read(self.rows) if not again(row)]
        run.write("rows.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in kept))

    def run(self, run: Run) -> None:
        remove(run, {"tiles": ("tiles.log", "tuned.json")})
        self.drop_old_rows(run)
        run.steps(self.compile_steps(), at_once=self.processes)
        run.steps([self.tile_step()])
        run.steps(self.variant_steps())
        run.steps(self.whole_steps_in_turn(winners(read(self.rows))))


def variant_step_name(name: str) -> str:
    """Name of the step that times a variant's kernels."""
    return f"variant-{name}"


def turn_step_name(turn: int, name: str) -> str:
    """Name of the step that times whole steps of a variant."""
    return f"steps-{turn}-{name}"


def cold_us(rows: list[Row], name: str, kernel: str) -> float | None:
    """Last measured us of a variant's kernel with cold operands; None without a row."""
    values = [row.value for row in rows if (row.note, row.name, row.how) == (name, kernel, "graph, cold")]
    return values[-1] if values else None


def winners(rows: list[Row]) -> list[str]:
    """Variants with a kernel that is faster than the default build's, and with no wrong kernel."""
    faster = []
    for name in TRIED:
        pairs = [(cold_us(rows, name, kernel), cold_us(rows, BASE, kernel)) for kernel in ("sinkhorn_pass", "match")]
        if all(mine and base for mine, base in pairs) and any(mine < GAIN * base for mine, base in pairs):
            faster.append(name)
    return faster


def variants_table(rows: list[Row]) -> str:
    """Table of each variant's times: kernels with cold operands, and the median of whole steps."""
    names = [name for name in (BASE, *TRIED) if any(row.note == name for row in rows)]
    shapes = list(dict.fromkeys(row.shape for row in rows if row.kind == "step"))
    cells = []
    for name in names:
        kernels = [cold_us(rows, name, kernel) for kernel in ("sinkhorn_pass", "match")]
        steps = [
            [row.value for row in rows if row.kind == "step" and (row.note, row.shape) == (name, s)] for s in shapes
        ]
        times = [*kernels, *(median(step) if step else None for step in steps)]
        cells.append([name, *(f"{us:.1f}" if us else "-" for us in times), f"  {TRIED.get(name, 'as it is')}"])
    return table(["build, us", "sinkhorn_pass", "match", *(f"step {shape}" for shape in shapes), "  constants"], cells)


def summary(run: Run, tuning: Tuning) -> str:
    parts = ["", "== Steps that did not pass", run.shortfalls()]
    log = run.out / "tiles.log"
    if log.exists():
        parts += ["", "== Tiles", log.read_text(errors="replace").rstrip()]
    rows = read(tuning.rows)
    if rows:
        parts += ["", "== Builds", variants_table(rows)]
    return "\n".join(parts) + "\n"


def main() -> int:
    options = parser(__doc__, seconds=420)
    options.add_argument(
        "--processes",
        type=int,
        default=min(os.cpu_count() or 1, 16),
        help="number of compiling processes (default: the cores, at most 16)",
    )
    given = options.parse_args()
    tuning = Tuning(given.out, given.extensions, given.toy, given.processes, given.seconds)
    with Run(given.out, given.archive, given.only, given.seconds) as run:
        try:
            tuning.run(run)
            run.check_only()
        finally:
            text = summary(run, tuning)
            run.write("summary.txt", text)
            print(text, flush=True)
    return int(any(step.failed for step in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
