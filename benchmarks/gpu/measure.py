"""Measures kernels, steps and competitors on this GPU: about 480 s, one archive. Run `contact.py` first.

    python benchmarks/gpu/measure.py --out /tmp/measure --archive measure.tar.gz --extensions build/gpu \\
        --before contact.tar.gz --authors CHECKOUT

First, with nothing timed, failures of an earlier contact are repeated, races are looked for and competitors compiled.
With --against, kernels and steps of an earlier commit and of this one are timed in turn (before_after.py). Then one
process has the GPU to itself for all rows (compare.py). Nsight Compute and torch's profiler run last.
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

from before_after import Against, BeforeAfter, files
from comparisons import comparisons, slow_kinds
from contact import Contact
from earlier_run import EarlierRun, remove
from steps import BASE, REPOSITORY, Run, Step, parser, script

COUNTERS_S, TRACE_S = 24.0, 11.0  # reserved for each step of a profiler; they run after the rows
ROWS_S = 290.0
KERNELS = "sinkhorn|match|column_lse|merge_lse|add_chunks|normalize|unit_rows|project|quantize|mean_row|product_step"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats")
LAUNCHES = 40  # launches that the profiler counts; a step has about 20 kernels of its own
# Files by the step that writes them. New rows are appended and the summary reads all, so old files must go first.
WRITTEN = {"rows": ("rows.json", "rows.jsonl", "now.json", "not_measured.json")}
WRITTEN |= {f"ncu-{backend}": (f"ncu-{backend}.csv",) for backend in ("cuda", "triton")}


class Measure:
    """Builds the steps of a measuring run."""

    def __init__(
        self, out: Path, extensions: Path | None, toy: bool, authors: Path | None, against: Against | None = None
    ) -> None:
        self.out, self.toy, self.authors = out.absolute(), toy, authors
        self.contact = Contact(out, extensions, toy)
        self.environment = self.contact.environment()
        self.before_after = BeforeAfter(out, against, self.environment, toy) if against is not None else None

    def repeated_steps(self, before: EarlierRun) -> list[Step]:
        """Steps that repeat each failed test and probe of the earlier run in the form in which it failed."""
        steps, failed = [], before.steps()
        found_by_checker = failed.get("memcheck-rows") == "failed with 9"  # each test may have passed even so
        if found_by_checker:
            steps.append(self.contact.sanitizer_rows_step("memcheck", "again-memcheck-rows", 150))
        for name, tests in before.tests().items():
            if name == "memcheck-rows":
                if not found_by_checker:
                    listed = self.only_tests(name, tests)
                    steps.append(self.contact.sanitizer_rows_step("memcheck", f"again-{name}", 150, *listed))
                continue
            files = sorted({REPOSITORY / test.split("::")[0] for test in tests})
            files = [file for file in files if file.exists()]
            variant = "sm_80" if name.endswith("sm80") else BASE
            reason = None if files else "none of its files is there"
            step = self.contact.pytest(f"again-{name}", files, 90, 0, *self.only_tests(name, tests), variant=variant)
            steps.append(replace(step, needs=step.needs or reason))
        contact = self.contact
        known = [*contact.probes("cuda"), *contact.probes("triton"), *contact.probes_for_older(), *contact.ranks()]
        known.append(contact.sanitizer_step("memcheck", 100))
        return steps + [replace(step, name=f"again-{step.name}") for step in known if step.name in failed]

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
        steps = []
        for comparison in comparisons(self.toy):
            kinds = slow_kinds(comparison)
            alone = [kind for kind in kinds if kind.startswith("flash-sinkhorn")]  # 44 tiles each
            shares = [[kind for kind in kinds if kind not in alone], *([kind] for kind in alone)]
            for share in shares if comparison.compiled else ():
                name = "-".join(["compile", comparison.name, *(share if share[0] in alone else ())])
                steps.append(Step(name, self.compare("--compile", comparison.name, *share), 85, environment))
        return steps + (self.before_after.compile_steps() if self.before_after is not None else [])

    def compare(self, *more: str) -> list[str]:
        toy = ["--toy"] if self.toy else []
        authors = ["--authors", str(self.authors.absolute())] if self.authors is not None else []
        return script("compare", "--out", self.out, *toy, *authors, *more)

    def rows(self, seconds: float) -> Step:
        return Step("rows", self.compare("--seconds", f"{seconds:.0f}"), seconds + 15, self.environment)

    def counters(self) -> list[Step]:
        reason = self.contact.no_gpu or (None if shutil.which("ncu") else "ncu is not here")
        steps = []
        for backend in ("cuda", "triton"):
            command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "-k", f"regex:{KERNELS}"]
            command += [word for section in SECTIONS for word in ("--section", section)]
            command += ["--launch-count", str(LAUNCHES), "--page", "raw", "--csv", "--print-units", "base"]
            command += ["--log-file", f"ncu-{backend}.csv"]
            steps.append(
                Step(
                    f"ncu-{backend}",
                    [*command, *script("one_step", "--backends", backend)],
                    35,
                    self.environment,
                    reason,
                )
            )
        return steps

    def traces(self) -> list[Step]:
        """Profiles of three sizes: the host's gaps between kernels show in the large ones and dominate the smallest."""
        if self.toy:
            return [self.trace("trace-toy", "--backends", "cpu", "--shape", "32x64x16", "--views", "4")]
        shapes = {"2048x8192x4096": "8", "512x512x256": "2", "2048x8192x256": "8"}
        return [self.trace(f"trace-{shape}", "--shape", shape, "--views", views) for shape, views in shapes.items()]

    def trace(self, name: str, *options: str) -> Step:
        return Step(name, script("step_trace", "--out", self.out, *options), 25, self.environment)

    def summary(self, run: Run) -> str:
        """Text of the summary, with whatever has been measured, even if the tables cannot be completed."""
        failed = f"== Steps that did not pass\n{run.shortfalls()}\n\n"
        command, environment = script("measure_tables", self.out), os.environ | self.environment
        try:
            ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=40)
        except subprocess.TimeoutExpired as late:
            return f"{failed}{late}"
        return failed + ended.stdout + ended.stderr

    def written_in_turn(self) -> dict[str, tuple[str, ...]]:
        return {file.stem: (file.name,) for file in files(self.out)} if self.before_after is not None else {}

    def run(self, run: Run, before: EarlierRun) -> None:
        remove(run, WRITTEN | self.written_in_turn())
        run.known.append("again-")  # so that `--only 'again-*'` is no error where nothing had failed
        run.steps([self.contact.facts()])
        checks = [*self.repeated_steps(before), *self.compile_steps(), *self.sanitizers()]
        run.steps(checks, at_once=16 if not self.toy else 2)
        if self.before_after is not None:
            run.steps(self.before_after.steps())
            self.before_after.write()
        counters, traces = self.counters(), self.traces()
        chosen = [[step for step in steps if run.chosen(step.name)] for steps in (counters, traces)]
        reserved = COUNTERS_S * len(chosen[0]) + TRACE_S * len(chosen[1])
        left = run.end - time.monotonic() - reserved * (not self.toy)
        run.steps([self.rows(max(min(left, ROWS_S), 30.0))])
        run.steps([*counters, *traces])


def main() -> int:
    arguments = parser(__doc__, seconds=480)
    arguments.add_argument("--before", type=Path, help="archive or folder of a contact run whose failures are repeated")
    arguments.add_argument("--authors", type=Path, help="checkout of the authors' published code (DanielShalam/BAM)")
    arguments.add_argument("--against", type=Path, help="folder of an earlier commit, timed in turn with this one")
    arguments.add_argument("--against-extension", type=Path, help="the earlier commit's extension, a file _C*.so")
    options = arguments.parse_args()
    against = Against(options.against, options.against_extension) if options.against is not None else None
    if against is not None and (fault := against.fault()):
        sys.exit(f"--against: {fault}")
    with Run(options.out, options.archive, options.only, options.seconds) as run:
        measure = Measure(options.out, options.extensions, options.toy, options.authors, against)
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
