"""Which Triton tiles and which constants of the CUDA kernels are the fastest on this GPU: about 420 s, one archive.

    python benchmarks/gpu/tune.py --out /tmp/tune --archive tune.tar.gz --extensions build/gpu

Processes side by side compile every candidate tile; then one process alone times them, and whole steps with the winners
(tune_tiles.py). Then each build of variants.py that build.py has made: its kernels are checked and timed, and one that
is faster than the usual build is tried in whole steps, in turn with it (tune_variant.py). OUT/tuned.json is what
BAM_KERNELS_TUNED may name; a copy lies where every later process on this kind of GPU finds it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from earlier import remove
from rows import Row, read
from steps import BASE, Run, Step, extension, importing, parser, script, table
from variants import TRIED

GAIN = 0.98  # of the usual build's time: less is noise
TURNS = 2  # times that a winner and the usual build are tried in whole steps


class Tuning:
    """The steps of a run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool, processes: int) -> None:
        self.out, self.extensions, self.toy, self.processes = out.absolute(), extensions, toy, processes
        self.rows = self.out / "rows.jsonl"
        self.tuned = self.out / "tuned.json"

    def triton(self) -> dict[str, str]:
        """The cache lies beside OUT: its thousands of files are not for the archive."""
        cache = self.out.with_name(f"{self.out.name}-triton")
        interpreted = {"TRITON_INTERPRET": "1"} if self.toy else {}
        return importing() | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | interpreted

    def given(self) -> list[str]:
        return ["--toy"] if self.toy else []

    def compiling(self) -> list[Step]:
        shares = [f"{part}/{self.processes}" for part in range(self.processes)]
        return [
            Step(f"compile-{part}", script("tune_tiles", "--compile", share, *self.given()), 150, self.triton())
            for part, share in enumerate(shares)
        ]

    def tiles(self) -> Step:
        return Step("tiles", script("tune_tiles", "--tuned", self.tuned, *self.given()), 150, self.triton())

    def variant(self, name: str, step: str, *given: str) -> Step:
        """A build's kernels or steps. A toy run has the CPU's kernels of one build for each."""
        found = importing() | extension(self.extensions, name)
        missing = None if self.toy or "BAM_KERNELS_EXTENSION" in found else "build.py has not made it"
        command = script("tune_variant", "--name", name, "--rows", self.rows, *given, *self.given())
        return Step(step, command, 45, found, missing)

    def variants(self) -> list[Step]:
        return [self.variant(name, variant_step(name)) for name in (BASE, *TRIED)]

    def in_turns(self, winners: list[str]) -> list[Step]:
        """Whole steps of the usual build and of each winner, one after another."""
        builds = (BASE, *winners) if winners else ()
        return [self.variant(name, steps_of_turn(turn, name), "--step") for turn in range(TURNS) for name in builds]

    def forget(self, run: Run) -> None:
        """Leave an earlier run's rows out that this one measures."""

        def again(row: Row) -> bool:
            kernels, steps = [variant_step(row.note)], [steps_of_turn(turn, row.note) for turn in range(TURNS)]
            return any(run.chosen(step) for step in (kernels if row.kind == "kernel" else steps))

        kept = [row for row in read(self.rows) if not again(row)]
        run.write("rows.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in kept))

    def run(self, run: Run) -> None:
        remove(run, {"tiles": ("tiles.log", "tuned.json")})
        self.forget(run)
        run.steps(self.compiling(), at_once=self.processes)
        run.steps([self.tiles()])
        run.steps(self.variants())
        run.steps(self.in_turns(winners(read(self.rows))))


def variant_step(name: str) -> str:
    """Name of the step that times a build's kernels."""
    return f"variant-{name}"


def steps_of_turn(turn: int, name: str) -> str:
    """Name of the step that takes whole steps of a build."""
    return f"steps-{turn}-{name}"


def us_of(rows: list[Row], name: str, kernel: str) -> float | None:
    """Microseconds with cold operands."""
    found = [row.value for row in rows if (row.note, row.name, row.how) == (name, kernel, "graph, cold")]
    return found[-1] if found else None


def winners(rows: list[Row]) -> list[str]:
    """Builds one of whose kernels is faster than the usual build's, and none of whose was wrong."""
    found = []
    for name in TRIED:
        pairs = [(us_of(rows, name, kernel), us_of(rows, BASE, kernel)) for kernel in ("sinkhorn_pass", "match")]
        if all(mine and base for mine, base in pairs) and any(mine < GAIN * base for mine, base in pairs):
            found.append(name)
    return found


def variants_table(rows: list[Row]) -> str:
    """Kernels with cold operands, and whole steps: the median of the turns."""
    names = [name for name in (BASE, *TRIED) if any(row.note == name for row in rows)]
    shapes = list(dict.fromkeys(row.shape for row in rows if row.kind == "step"))
    cells = []
    for name in names:
        kernels = [us_of(rows, name, kernel) for kernel in ("sinkhorn_pass", "match")]
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
    options.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 12), help="that compile (12)")
    given = options.parse_args()
    tuning = Tuning(given.out, given.extensions, given.toy, given.processes)
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
