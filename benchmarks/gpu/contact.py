"""Runs and times every kernel on this GPU and checks that it is right: about 250 s, one archive.

    python benchmarks/gpu/contact.py --out /tmp/contact --archive contact.tar.gz --extensions build/gpu

Its steps print the facts of the machine and run each kernel in each form in its own process. They run the tests for
GPUs (some under CUDA's memory checker), several ranks, and the driver's first steps on every backend. Then, with
nothing else on the GPU, kernels and steps are timed. A step that fails or hangs does not stop the others. The
archive holds what is needed to mend a failure without the GPU: logs, tracebacks and operands.
"""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import probe
from earlier_run import remove
from rows import Row, read
from steps import (
    BASE,
    PYTHON,
    REPOSITORY,
    Outcome,
    Run,
    Step,
    checkout_environment,
    extension_environment,
    last_line,
    parser,
    sanitizer_command,
    script,
    table,
)

TESTS = REPOSITORY / "tests"
# Steps that try the kernels of a way; each writes NAME.json. This process imports no library, which might crash it.
VERIFY = {way: f"verify-{way}" for way in ("cuda", "triton", "flash")}
VERIFY_S = 300.0  # Triton compiles some 190 kernels for a way, beside all other steps
# Tests of kernels on given operands, for rows over blocks, clusters and long rows, small enough for a memory checker.
CHECKED_TESTS = "(cluster or long) and (pass or blocks or 132)"
CHECKED_FILES = [TESTS / "kernels" / "test_cuda_kernels.py", TESTS / "kernels" / "test_cuda_match.py"]


class Contact:
    """Builds the steps of a contact run."""

    def __init__(self, out: Path, extensions: Path | None, toy: bool) -> None:
        self.out, self.extensions, self.toy = out.absolute(), extensions, toy
        self.no_gpu = "a toy run has no GPU" if toy else None
        self.backends = ["cpu"] if toy else ["cuda", "triton"]

    def environment(self, variant: str = BASE, **more: str) -> dict[str, str]:
        return checkout_environment() | extension_environment(self.extensions, variant) | more

    def missing_variant(self, variant: str) -> str | None:
        """Why a step that needs a variant of the extension cannot run; None if it can."""
        here = bool(extension_environment(self.extensions, variant))
        return self.no_gpu or (None if here else f"build.py has not made {variant} in {self.extensions}")

    def facts(self) -> Step:
        return Step("facts", script("facts"), 40, self.environment(), self.no_gpu)

    def build(self) -> Step:
        """Build the extensions here, because the given one does not load.

        They go to a folder next to OUT, whose files would be archived.
        """
        self.extensions = self.out.with_name(f"{self.out.name}-extensions")
        return Step("build", script("build", "--out", self.extensions), 150, checkout_environment())

    def probes(self, backend: str) -> list[Step]:
        toy = ["--toy"] if self.toy else []
        limit = 15.0 if self.toy else 25.0 if backend == "cuda" else 60.0  # Triton compiles first
        environment = self.environment(OMP_NUM_THREADS="2")
        return [
            Step(f"probe-{name}", script("probe", name, "--out", self.out, *toy), limit, environment)
            for name, case in probe.CASES.items()
            if case.backend == backend and (not self.toy or case.check not in ("step", "flash_step"))
        ]

    def bounded_probes(self, probed: list[Outcome]) -> list[Step]:
        """CUDA probes that hung, repeated with the build of bounded waits, which reports where a kernel waits."""
        environment, reason = self.environment("bounded"), self.missing_variant("bounded")
        hung = {outcome.name for outcome in probed if "longer than" in outcome.status}
        return [
            Step(f"{step.name}-bounded", step.command, 25, environment, reason)
            for step in self.probes("cuda")
            if step.name in hung
        ]

    def probes_for_older(self) -> list[Step]:
        """CUDA probes with the build for sm_80, which this GPU's driver compiles; it has no clusters."""
        environment, reason = self.environment("sm_80"), self.missing_variant("sm_80")
        return [
            Step(f"{step.name}-sm80", step.command, 60, environment, reason)
            for step in self.probes("cuda")
            if probe.CASES[step.name.removeprefix("probe-")].form in ("block", "long") or step.name == "probe-cuda-step"
        ]

    def pytest(
        self, name: str, files: list[Path], limit_s: float, workers: int, *more: str, variant: str = BASE
    ) -> Step:
        outcomes = self.out / f"{name}.tests.jsonl"
        command = [PYTHON, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "pytest_gpu"]
        command += ["--continue-on-collection-errors", "-o", "addopts="]  # workers and tests as named here
        command += ["-o", "faulthandler_timeout=90"]  # says where a test is that takes longer
        command += ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), "--outcomes", str(outcomes)]
        if importlib.util.find_spec("xdist") and workers:
            command += ["-n", str(workers)]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "120", "--timeout-method", "thread"]
        environment = self.environment(variant, OMP_NUM_THREADS="2")
        environment["PYTHONPATH"] += f":{REPOSITORY / 'benchmarks' / 'gpu'}"
        if self.toy:
            environment["TRITON_INTERPRET"] = "1"
        reason = None if variant == BASE else self.missing_variant(variant)
        return Step(name, [*command, *map(str, files), *more], limit_s, environment, reason)

    def tests(self) -> list[Step]:
        cuda = [path for path in sorted((TESTS / "kernels").glob("test_cuda*.py")) if path.stem != "test_cuda_compile"]
        triton = sorted((TESTS / "interpreted").glob("test_*.py"))
        if self.toy:
            return [
                self.pytest("tests-cuda", [TESTS / "kernels" / "test_cuda_kernels.py"], 60, 0, "-k", "loss_and_stats"),
                self.pytest("tests-triton", [TESTS / "interpreted" / "test_triton_match.py"], 60, 0, "-k", "nan"),
            ]
        return [
            self.pytest("tests-triton", triton, 170, 8),
            self.pytest(
                "tests-gpu",
                [
                    TESTS / "kernels" / "test_gpu.py",
                    TESTS / "kernels" / "test_gpu_graphs.py",
                    TESTS / "loss" / "test_gradient_cache.py",
                ],
                300,
                3,
                "-m",
                "gpu",
            ),
            self.pytest("tests-cuda", cuda, 150, 4),
            self.pytest("tests-sm80", cuda, 150, 3, variant="sm_80"),
        ]

    def memory_checks(self) -> list[Step]:
        return [self.sanitizer_step("memcheck", 100), self.sanitizer_rows_step("memcheck", "memcheck-rows", 150)]

    def sanitizer_step(self, tool: str, limit_s: float) -> Step:
        """A step that runs small problems under a tool of compute-sanitizer."""
        return self.under_sanitizer(tool, Step(tool, script("small_steps", "cuda"), limit_s, self.environment()))

    def sanitizer_rows_step(self, tool: str, name: str, limit_s: float, *which: str) -> Step:
        """A step that runs tests of rows over blocks and clusters under a tool: tests that `which` selects, or all."""
        return self.under_sanitizer(
            tool, self.pytest(name, CHECKED_FILES, limit_s, 0, *(which or ("-k", CHECKED_TESTS)))
        )

    def under_sanitizer(self, tool: str, step: Step) -> Step:
        """The step run under a tool of compute-sanitizer.

        Without torch's caching each tensor is its own allocation, so that a write between two tensors is detected.
        """
        missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not here"
        environment = step.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        needs = self.no_gpu or missing
        return replace(step, command=[*sanitizer_command(tool), *step.command], environment=environment, needs=needs)

    def ranks(self) -> list[Step]:
        verify = [PYTHON, "-m", "bam_kernels.verify_ranks"]
        if self.toy:
            command = [*verify, "--world", "2", "--images", "4", "--features", "8", "--cases", "teacher"]
            return [Step("ranks-gloo", command, 60, self.environment())]
        steps = []
        for backend in self.backends:
            nccl = [*verify, "--world", "1", "--device", "cuda", "--group-backend", "nccl", "--backend", backend]
            gloo = [*verify, "--world", "2", "--device", "cuda", "--group-backend", "gloo", "--backend", backend]
            steps += [Step(f"ranks-nccl-{backend}", nccl, 100, self.environment())]
            steps += [Step(f"ranks-gloo-{backend}", gloo, 120, self.environment())]
        return steps

    def verify(self) -> list[Step]:
        """Steps that try the kernels as `backend="auto"` does: one for each way, so that each keeps its own verdict.

        With a cache folder of its own a step waits for no other, and neither uses nor leaves verdicts on this machine.
        """
        steps = []
        for way, name in VERIFY.items():
            command = [PYTHON, "-m", "bam_kernels.verify", "--ways", way, "--json", f"{self.out / name}.json"]
            environment = self.environment(XDG_CACHE_HOME=str(self.out / "cache" / way))
            steps.append(Step(name, command, VERIFY_S, environment, self.no_gpu))
        return steps

    def driver(self) -> list[Step]:
        """First steps of the digits recipe on each backend, on the reference, and as the truth in float64."""
        missing = [name for name in ("tyro", "docstring_parser") if importlib.util.find_spec(name) is None]
        reason = f"the driver needs {', '.join(missing)}" if missing else None
        options = ["--optim.epochs=2", "--run.log-every=1", "--model.norm=layer"]
        steps = []
        for name in ("float64", "float32", *self.backends):
            backend = name if name in self.backends else "reference"
            command = [PYTHON, str(REPOSITORY / "driver" / "pretrain.py"), *options, f"--run.name={name}"]
            command += [f"--loss.backend={backend}", f"--run.dtype={'float64' if name == 'float64' else 'float32'}"]
            steps.append(Step(f"driver-{name}", command, 120, self.environment(OMP_NUM_THREADS="2"), reason))
        return steps

    def curves(self) -> Step:
        reason = None if (self.out / "runs").exists() else "the driver did not run"
        return Step(
            "driver-curves", script("curves", "float64", "float32", *self.backends), 30, self.environment(), reason
        )

    def times(self) -> list[Step]:
        toy = ["--toy"] if self.toy else []
        steps = [Step("times", script("times", "--rows", self.out / "rows.jsonl", *toy), 120, self.environment())]
        shapes = {"32x64x16": 4} if self.toy else {"2048x8192x4096": 8, "2048x8192x256": 8, "512x512x256": 2}
        for shape, views in shapes.items():
            options = ["--shape", shape, "--views", str(views), "--backends", *self.backends, "--out", self.out]
            steps.append(Step(f"trace-{shape}", script("step_trace", *options), 30, self.environment()))
        return steps

    def predictions(self) -> Step:
        """A step that compares the measured times with their predictions."""
        command = [PYTHON, str(REPOSITORY / "benchmarks" / "predictions.py")]
        return Step("predictions", [*command, "--results", str(self.out / "rows.jsonl")], 30, self.environment())

    def run(self, run: Run) -> None:
        remove(run, {name: (f"{name}.json",) for name in VERIFY.values()})
        facts = run.steps([self.facts()])
        probes = self.probes("triton") + self.probes("cuda")
        if any(step.status == "failed with 1" for step in facts):  # 2 would mean that there is no GPU
            run.steps([self.build(), *self.probes("triton")], at_once=6)
            probes = self.probes("cuda")
        probed = run.steps([*probes, *self.probes_for_older()], at_once=8 if not self.toy else 2)
        run.steps(self.bounded_probes(probed), at_once=6)
        checks = [*self.verify(), *self.tests(), *self.memory_checks(), *self.ranks(), *self.driver()]
        checks += [Step("doctor", [PYTHON, "-m", "bam_kernels"], 90, self.environment())]
        run.steps(checks, at_once=7 if not self.toy else 2)
        run.steps([self.curves()])
        run.steps(self.times())
        run.steps([self.predictions()])


def failed_tests(out: Path) -> list[list[str]]:
    """Step, test id and error of each failed test, from the outcomes that pytest_gpu.py wrote."""
    failures = []
    for file in sorted(out.glob("*.tests.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if row["outcome"] == "failed":
                failures.append([file.name.removesuffix(".tests.jsonl"), row["test"], row["error"][:160]])
    return failures


def counts(out: Path) -> list[list[str]]:
    rows = []
    for file in sorted(out.glob("*.tests.jsonl")):
        outcomes = [json.loads(line)["outcome"] for line in file.read_text().splitlines()]
        kinds = ("passed", "failed", "skipped")
        rows.append([file.name.removesuffix(".tests.jsonl"), *(str(outcomes.count(kind)) for kind in kinds)])
    return rows


def times_table(rows: list[Row]) -> str:
    head = ["what", "backend", "shape", "teacher", "how", "value", "unit", "peak MB", "error"]
    cells = []
    for row in rows:
        peak = f"{row.peak_mb:.1f}" if row.peak_mb is not None else ""
        error = f"{row.error:.1e}" if row.error is not None else ""
        teacher = "yes" if row.teacher else ""
        cells.append([row.name, row.backend, row.shape, teacher, row.how, f"{row.value:.1f}", row.unit, peak, error])
    return table(head, cells)


def summary(run: Run) -> str:
    """Text of the summary. Failures come last, because often only the end of the output is kept."""
    parts = []
    rows = read(run.out / "rows.jsonl")
    if rows:
        parts += ["", "== Times", times_table(rows)]
    predictions = run.out / "predictions.log"
    if predictions.exists():
        parts += ["", f"== Predictions: {last_line(predictions)}; predictions.log has them"]
    tests = counts(run.out)
    if tests:
        parts += ["", "== Tests", table(["tests", "passed", "failed", "skipped", ""], [[*row, ""] for row in tests])]
    failed = failed_tests(run.out)
    if failed:
        shown = failed[:60]
        parts += ["", f"== Tests that failed ({len(failed)}; all in the archive)", table(["", "test", "error"], shown)]
    return "\n".join([*parts, "", "== Steps that did not pass", run.shortfalls()]) + "\n"


def main() -> int:
    options = parser(__doc__, seconds=480).parse_args()
    if options.extensions is not None and not extension_environment(options.extensions, BASE):
        sys.exit(f"--extensions {options.extensions}: there is no {BASE} in it, which build.py makes")
    with Run(options.out, options.archive, options.only, options.seconds) as run:
        try:
            Contact(options.out, options.extensions, options.toy).run(run)
            run.check_only()
        finally:
            text = summary(run)
            run.write("summary.txt", text)
            print(text, flush=True)
    return int(any(step.failed for step in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
