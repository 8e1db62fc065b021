"""What kernels and steps take on this GPU, beside the competitors: about 480 s, one archive. `contact.py` comes first.

    python benchmarks/gpu/measure.py --out /tmp/measure --archive measure.tar.gz --extensions build/gpu \\
        --before contact.tar.gz --authors CHECKOUT

What failed in an earlier contact runs again, while races are looked for and the competitors are compiled: nothing is
timed then. Then one process has the GPU to itself for all rows (compare.py); then Nsight Compute and torch's profiler.
flash-sinkhorn is compared where it can be imported: a folder with it goes on PYTHONPATH. A copy of the checkout without
its history is named by BAM_KERNELS_COMMIT.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from contact import Contact
from earlier import Before, remove
from places import places
from steps import BASE, REPOSITORY, Run, Step, parser, script

AFTER_ROWS_S = 80.0  # for the profilers
ROWS_S = 290.0
KERNELS = "sinkhorn_pass|match|column_lse|merge_lse|add_chunks|normalize|unit_rows|project|quantize"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats")
LAUNCHES = 40  # of a step's own kernels about 20
# Files by the step that writes them: rows are added to those that are there, and the summary reads all of them.
WRITTEN = {"rows": ("rows.json", "rows.jsonl", "now.json", "not_measured.json")}
WRITTEN |= {f"ncu-{backend}": (f"ncu-{backend}.csv",) for backend in ("cuda", "triton")}


class Measure:
    """The steps of a run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool, authors: Path | None) -> None:
        self.out, self.toy, self.authors = out.absolute(), toy, authors
        self.contact = Contact(out, extensions, toy)
        self.environment = self.contact.environment()

    def again(self, before: Before) -> list[Step]:
        """Each failed test and probe of the earlier run, in the form in which it failed."""
        made, failed = [], before.steps()
        found_by_checker = failed.get("memcheck-rows") == "failed with 9"  # then every test may have passed
        if found_by_checker:
            made.append(self.contact.checked_rows("memcheck", "again-memcheck-rows", 150))
        for name, tests in before.tests().items():
            if name == "memcheck-rows":
                if not found_by_checker:
                    listed = self.listed(name, tests)
                    made.append(self.contact.checked_rows("memcheck", f"again-{name}", 150, *listed))
                continue
            files = sorted({REPOSITORY / test.split("::")[0] for test in tests})
            files = [file for file in files if file.exists()]
            variant = "sm_80" if name.endswith("sm80") else BASE
            reason = None if files else "none of its files is there"
            step = self.contact.pytest(f"again-{name}", files, 90, 0, *self.listed(name, tests), variant=variant)
            made.append(replace(step, needs=step.needs or reason))
        contact = self.contact
        known = [*contact.probes("cuda"), *contact.probes("triton"), *contact.probes_for_older(), *contact.ranks()]
        known.append(contact.checked("memcheck", 100))
        return made + [replace(step, name=f"again-{step.name}") for step in known if step.name in failed]

    def listed(self, name: str, tests: list[str]) -> list[str]:
        """The options by which pytest runs these tests alone."""
        file = self.out / f"again-{name}.txt"
        file.write_text("\n".join(tests) + "\n")
        return ["-p", "pytest_only", "--only-tests", str(file)]

    def sanitizers(self) -> list[Step]:
        """Races and wrong barriers. Reports on bulk copies are leads only: the tool may not see where they end."""
        tools = ("racecheck", "synccheck")
        steps = [self.contact.checked(tool, 60) for tool in tools]
        return steps + [self.contact.checked_rows(tool, f"{tool}-rows", 60) for tool in tools]

    def compiled(self) -> list[Step]:
        """The code of compilers that the rows will need, in their caches on disk; a process for each problem."""
        environment = self.environment | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        names = [place.name for place in places(self.toy) if place.compiled]
        return [Step(f"compile-{name}", self.compare("--compile", name), 85, environment) for name in names]

    def compare(self, *more: str) -> list[str]:
        toy = ["--toy"] if self.toy else []
        authors = ["--authors", str(self.authors.absolute())] if self.authors is not None else []
        return script("compare", "--out", self.out, *toy, *authors, *more)

    def rows(self, seconds: float) -> Step:
        return Step("rows", self.compare("--seconds", f"{seconds:.0f}"), seconds + 15, self.environment)

    def counters(self) -> list[Step]:
        reason = self.contact.no_gpu or (None if shutil.which("ncu") else "ncu is not here")
        made = []
        for backend in ("cuda", "triton"):
            command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "-k", f"regex:{KERNELS}"]
            command += [word for section in SECTIONS for word in ("--section", section)]
            command += ["--launch-count", str(LAUNCHES), "--page", "raw", "--csv", "--print-units", "base"]
            command += ["--log-file", f"ncu-{backend}.csv"]
            made.append(
                Step(
                    f"ncu-{backend}",
                    [*command, *script("one_step", "--backends", backend)],
                    35,
                    self.environment,
                    reason,
                )
            )
        return made

    def traces(self) -> list[Step]:
        """Both sizes show the host: the larger one between the kernels, the smaller one instead of them."""
        if self.toy:
            return [self.trace("trace-toy", "--backends", "cpu", "--shape", "32x64x16", "--views", "4")]
        small = self.trace("trace-512x512x256", "--shape", "512x512x256", "--views", "2")
        return [self.trace("trace-2048x8192x256"), small]

    def trace(self, name: str, *given: str) -> Step:
        return Step(name, script("step_trace", "--out", self.out, *given), 25, self.environment)

    def summary(self, run: Run) -> str:
        """Whatever has been measured; also where predictions cannot be read."""
        failed = f"== Steps that did not pass\n{run.shortfalls()}\n\n"
        command, environment = script("measured", self.out), os.environ | self.environment
        try:
            ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=40)
        except subprocess.TimeoutExpired as late:
            return f"{failed}{late}"
        return failed + ended.stdout + ended.stderr

    def run(self, run: Run, before: Before) -> None:
        remove(run, WRITTEN)
        run.steps([self.contact.facts()])
        beside = [*self.again(before), *self.compiled(), *self.sanitizers()]
        run.steps(beside, at_once=16 if not self.toy else 2)
        left = run.end - time.monotonic() - AFTER_ROWS_S * (not self.toy)
        run.steps([self.rows(max(min(left, ROWS_S), 30.0))])
        run.steps([*self.counters(), *self.traces()])


def main() -> int:
    made = parser(__doc__, seconds=480)
    made.add_argument("--before", type=Path, help="archive or folder of a contact; what failed there runs again")
    made.add_argument("--authors", type=Path, help="a checkout of the authors' published code (DanielShalam/BAM)")
    options = made.parse_args()
    with Run(options.out, options.archive, options.only, options.seconds) as run:
        measure = Measure(options.out, options.extensions, options.toy, options.authors)
        try:
            measure.run(run, Before(options.before))
            run.check_only()
        finally:
            run.write_archive()  # the summary may take longer than what has ended the run leaves it
            text = measure.summary(run)
            run.write("summary.txt", text)
            print(text, flush=True)
    return int(any(step.failed for step in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
