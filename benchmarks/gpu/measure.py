"""What kernels and steps take on this GPU, beside the competitors: about 480 s, one archive. `contact.py` comes first.

    python benchmarks/gpu/measure.py --out /tmp/measure --archive measure.tar.gz --extensions build/gpu \\
        --before contact.tar.gz --authors CHECKOUT

What failed in an earlier contact runs again, while races are looked for and the competitors are compiled: nothing is
timed then. Then one process has the GPU to itself for all rows (compare.py); then Nsight Compute and torch's profiler.
flash-sinkhorn is compared where it can be imported: a folder with it goes on PYTHONPATH. A copy of the checkout without
its history is named by BAM_KERNELS_COMMIT.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

from contact import CHECKED_TESTS, TESTS, Contact
from places import places
from steps import REPOSITORY, Run, Step, parser, script

AFTER_ROWS_S = 80.0  # for the profilers
ROWS_S = 290.0
KERNELS = "sinkhorn_pass|match|column_lse|merge_lse|add_chunks|normalize|unit_rows|project|quantize"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats")
LAUNCHES = 40  # of a step's own kernels about 20


class Before:
    """What failed in an earlier run: its archive, or the folder that it wrote."""

    def __init__(self, source: Path | None) -> None:
        self.files: dict[str, str] = {}
        if source is None:
            return
        if source.is_dir():
            self.files = {file.name: file.read_text() for file in source.glob("*.json*")}
            return
        with tarfile.open(source) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member) if ".json" in Path(member.name).suffix else None
                if file is not None:
                    self.files[member.name] = file.read().decode()

    def steps(self) -> set[str]:
        """Names of the steps that failed."""
        ended = json.loads(self.files.get("steps.json", "{}"))
        return {name for name, step in ended.items() if step["status"].startswith("failed")}

    def tests(self) -> dict[str, list[str]]:
        """Ids of the tests that failed, by the step that ran them."""
        found: dict[str, list[str]] = {}
        for name, text in self.files.items():
            if name.endswith(".tests.jsonl"):
                failed = [row["test"] for row in map(json.loads, text.splitlines()) if row["outcome"] == "failed"]
                if failed:
                    found[name.removesuffix(".tests.jsonl")] = list(dict.fromkeys(failed))
        return found


class Measure:
    """The steps of a run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool, authors: Path | None) -> None:
        self.out, self.toy, self.authors = out.absolute(), toy, authors
        self.contact = Contact(out, extensions, toy)
        self.environment = self.contact.environment()

    def again(self, before: Before) -> list[Step]:
        """Each failed test and probe of the earlier run, in the form in which it failed."""
        made = []
        for name, tests in before.tests().items():
            listed = self.out / f"again-{name}.txt"
            listed.write_text("\n".join(tests) + "\n")
            files = sorted({REPOSITORY / test.split("::")[0] for test in tests})
            files = [file for file in files if file.exists()]
            variant = "sm_80" if name.endswith("sm80") else "sm_90a"
            only = ["-p", "pytest_only", "--only-tests", str(listed)]
            reason = None if files else "none of its files is there"
            step = self.contact.pytest(f"again-{name}", files, 90, 0, *only, variant=variant)
            made.append(replace(step, needs=reason))
        contact = self.contact
        known = [*contact.probes("cuda"), *contact.probes("triton"), *contact.probes_for_older(), *contact.ranks()]
        known += [step for step in contact.memory_checks() if step.name == "memcheck"]
        failed = before.steps()
        return made + [replace(step, name=f"again-{step.name}") for step in known if step.name in failed]

    def sanitizers(self) -> list[Step]:
        """Races and wrong barriers. Reports on bulk copies are leads only: the tool may not see where they end."""
        files = sorted(TESTS.glob("test_cuda_[km]*s.py"))
        missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not here"
        environment = self.contact.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        made = []
        for tool in ("racecheck", "synccheck"):
            under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            # Barriers in shared memory that the tool cannot count by itself: those of a block, and more.
            under += ["--num-cuda-barriers", "64"] if tool == "synccheck" else []
            rows = self.contact.pytest(f"{tool}-rows", files, 60, 0, "-k", CHECKED_TESTS)
            reason = self.contact.no_gpu or missing
            made.append(Step(tool, [*under, *script("tiny", "cuda")], 60, environment, reason))
            made.append(Step(rows.name, [*under, *rows.command], 60, environment | rows.environment, reason))
        return made

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

    def summary(self) -> str:
        """Whatever has been measured; also where predictions cannot be read."""
        command, environment = script("measured", self.out), os.environ | self.environment
        try:
            ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=40)
        except subprocess.TimeoutExpired as late:
            return f"{late}"
        return ended.stdout + ended.stderr

    def run(self, run: Run, before: Before) -> None:
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
            text = measure.summary()
            run.write("summary.txt", text)
            print(text, flush=True)
    return int(any(step.failed for step in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
