"""Measures kernels, steps and competitors on this GPU: about 480 s, one archive. Run `contact.py` first.

    python benchmarks/gpu/measure.py --out /tmp/measure --archive measure.tar.gz --extensions build/gpu \\
        --before contact.tar.gz --authors CHECKOUT

First, with nothing timed, failures of an earlier contact are repeated, races are looked for and competitors compiled.
Then one process has the GPU to itself for all rows (compare.py). Nsight Compute and torch's profiler run last.
flash-sinkhorn is compared if it can be imported; a folder that contains it can be put on PYTHONPATH. For a checkout
copied without its history, BAM_KERNELS_COMMIT names the commit.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from comparisons import comparisons
from contact import Contact
from earlier_run import EarlierRun, remove
from steps import BASE, REPOSITORY, Run, Step, parser, script

AFTER_ROWS_S = 80.0  # reserved for the profilers, which run after the rows
ROWS_S = 290.0
KERNELS = "sinkhorn_pass|match|column_lse|merge_lse|add_chunks|normalize|unit_rows|project|quantize"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats")
LAUNCHES = 40  # launches that the profiler counts; a step has about 20 kernels of its own
# Files by the step that writes them. New rows are appended and the summary reads all, so old files must go first.
WRITTEN = {"rows": ("rows.json", "rows.jsonl", "now.json", "not_measured.json")}
WRITTEN |= {f"ncu-{backend}": (f"ncu-{backend}.csv",) for backend in ("cuda", "triton")}


class Measure:
    """Builds the steps of a measuring run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool, authors: Path | None) -> None:
        self.out, self.toy, self.authors = out.absolute(), toy, authors
        self.contact = Contact(out, extensions, toy)
        self.environment = self.contact.environment()

    def repeated_steps(self, before: EarlierRun) -> list[Step]:
        """Steps that repeat each failed test and probe of the earlier run in the form in which it failed."""
        made, failed = [], before.steps()
        found_by_checker = failed.get("memcheck-rows") == "failed with 9"  # each test may have passed even so
        if found_by_checker:
            made.append(self.contact.sanitizer_rows_step("memcheck", "again-memcheck-rows", 150))
        for name, tests in before.tests().items():
            if name == "memcheck-rows":
                if not found_by_checker:
                    listed = self.only_tests(name, tests)
                    made.append(self.contact.sanitizer_rows_step("memcheck", f"again-{name}", 150, *listed))
                continue
            files = sorted({REPOSITORY / test.split("::")[0] for test in tests})
            files = [file for file in files if file.exists()]
            variant = "sm_80" if name.endswith("sm80") else BASE
            reason = None if files else "none of its files is there"
            step = self.contact.pytest(f"again-{name}", files, 90, 0, *self.only_tests(name, tests), variant=variant)
            made.append(replace(step, needs=step.needs or reason))
        contact = self.contact
        known = [*contact.probes("cuda"), *contact.probes("triton"), *contact.probes_for_older(), *contact.ranks()]
        known.append(contact.sanitizer_step("memcheck", 100))
        return made + [replace(step, name=f"again-{step.name}") for step in known if step.name in failed]

    def only_tests(self, name: str, tests: list[str]) -> list[str]:
        """Options of pytest that run only these tests."""
        file = self.out / f"again-{name}.txt"
        file.write_text("\n".join(tests) + "\n")
        return ["-p", "pytest_only", "--only-tests", str(file)]

    def sanitizers(self) -> list[Step]:
        """Steps that look for races and wrong barriers.

        A report about a bulk copy is only a hint, because the tools may not see where the copy ends.
        """
        tools = ("racecheck", "synccheck")
        steps = [self.contact.sanitizer_step(tool, 60) for tool in tools]
        return steps + [self.contact.sanitizer_rows_step(tool, f"{tool}-rows", 60) for tool in tools]

    def compile_steps(self) -> list[Step]:
        """Steps that compile the code which the rows need into the caches on disk, one process per problem."""
        environment = self.environment | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        names = [comparison.name for comparison in comparisons(self.toy) if comparison.compiled]
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
        """Profiles of two sizes: the host's gaps between kernels show in the larger one and dominate the smaller."""
        if self.toy:
            return [self.trace("trace-toy", "--backends", "cpu", "--shape", "32x64x16", "--views", "4")]
        small = self.trace("trace-512x512x256", "--shape", "512x512x256", "--views", "2")
        return [self.trace("trace-2048x8192x256"), small]

    def trace(self, name: str, *given: str) -> Step:
        return Step(name, script("step_trace", "--out", self.out, *given), 25, self.environment)

    def summary(self, run: Run) -> str:
        """Text of the summary, with whatever has been measured, even if the tables cannot be completed."""
        failed = f"== Steps that did not pass\n{run.shortfalls()}\n\n"
        command, environment = script("measure_tables", self.out), os.environ | self.environment
        try:
            ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=40)
        except subprocess.TimeoutExpired as late:
            return f"{failed}{late}"
        return failed + ended.stdout + ended.stderr

    def run(self, run: Run, before: EarlierRun) -> None:
        remove(run, WRITTEN)
        run.steps([self.contact.facts()])
        beside = [*self.repeated_steps(before), *self.compile_steps(), *self.sanitizers()]
        run.steps(beside, at_once=16 if not self.toy else 2)
        left = run.end - time.monotonic() - AFTER_ROWS_S * (not self.toy)
        run.steps([self.rows(max(min(left, ROWS_S), 30.0))])
        run.steps([*self.counters(), *self.traces()])


def main() -> int:
    made = parser(__doc__, seconds=480)
    made.add_argument("--before", type=Path, help="archive or folder of a contact run whose failures are repeated")
    made.add_argument("--authors", type=Path, help="checkout of the authors' published code (DanielShalam/BAM)")
    options = made.parse_args()
    with Run(options.out, options.archive, options.only, options.seconds) as run:
        measure = Measure(options.out, options.extensions, options.toy, options.authors)
        try:
            measure.run(run, EarlierRun(options.before))
            run.check_only()
        finally:
            run.write_archive()  # whatever ended the run may not wait for the summary
            text = measure.summary(run)
            run.write("summary.txt", text)
            print(text, flush=True)
    return int(any(step.failed for step in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
