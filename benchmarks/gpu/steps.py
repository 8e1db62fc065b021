"""Runs commands with time limits, one by one or several at once, for scripts on a GPU that is available for minutes.

The output of a step goes to OUT/NAME.log as it is printed, and its outcome to OUT/steps.json as soon as it ends. The
archive holds all small files of OUT and is renewed every few seconds, so that a killed run leaves it too.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[2]
GPU_SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
PYTHON = sys.executable
ARCHIVE_EVERY_S = 5.0
LARGEST_ARCHIVED = 4 << 20  # bytes; larger files are left out and listed
KILLED_S = 5.0  # time in which a killed process must end
BASE = "sm_90a"  # variant of the extension that most steps use
TURNS = 2  # times that each of several builds is timed, one after the other


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds. `needs` says why it cannot run here; None if it can."""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step: "passed", "failed ..." or, if it cannot run here, "not run: ..."; and its log's last line."""

    name: str
    status: str
    seconds: float = 0.0
    last_line: str = ""

    @property
    def failed(self) -> bool:
        return self.status.startswith("failed")


class Run:
    """A run of steps that ends after `seconds`: `with Run(...) as run: run.steps([...], at_once=6)`."""

    def __init__(self, out: Path, archive: Path | None, only: Iterable[str] = (), seconds: float = 1e9) -> None:
        self.out, self.archive, self.only = out.absolute(), archive, tuple(only)
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self.known: list[str] = []
        self.id = uuid.uuid4().hex[:8]  # tells steps of this run from those that an earlier one left in OUT
        self._archived = 0.0
        self.out.mkdir(parents=True, exist_ok=True)
        if archive is not None:
            archive.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Run":
        self.handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that __exit__ writes the archive
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.write_archive()
        signal.signal(signal.SIGTERM, self.handler)

    def chosen(self, name: str) -> bool:
        """Whether the patterns of `only` select a step of this name."""
        return not self.only or any(fnmatch(name, pattern) for pattern in self.only)

    def steps(self, steps: Iterable[Step], at_once: int = 1) -> list[Outcome]:
        """Run the chosen steps, `at_once` at a time, each until its limit or the end of the run."""
        all_steps: list[Step] = list(steps)
        self.known += [step.name for step in all_steps]
        waiting, ended = [step for step in all_steps if self.chosen(step.name)], []
        running: list[StepProcess] = []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    step = waiting.pop(0)
                    left = self.end - time.monotonic()
                    if step.needs is not None:
                        ended.append(self._note(Outcome(step.name, f"not run: {step.needs}")))
                    elif left < 1:
                        ended.append(self._note(Outcome(step.name, "failed: no time was left for it")))
                    else:
                        running.append(StepProcess(step, self.out, min(step.limit_s, left)))
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    ended.append(self._note(process.outcome()))
                if time.monotonic() > self._archived + ARCHIVE_EVERY_S:
                    self.write_archive()
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
        return ended

    def write(self, name: str, text: str) -> None:
        """Write a file into OUT, and so into the archive."""
        (self.out / name).write_text(text)

    def _note(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        now = time.monotonic() - self.begin
        failed = f": {outcome.last_line}" if outcome.failed else ""
        line = f"[{now:5.0f} s] {outcome.name:<34} {outcome.status} in {outcome.seconds:.1f} s{failed}"
        print(line[:400], flush=True)
        file = self.out / "steps.json"
        ended = json.loads(file.read_text()) if file.exists() else {}
        fields = asdict(outcome)
        ended[fields.pop("name")] = fields | {"run": self.id}
        file.write_text(json.dumps(ended, indent=1) + "\n")
        return outcome

    def write_archive(self) -> None:
        """Archive OUT's files that are not too large. The archive is replaced as a whole, so it is always complete."""
        self._archived = time.monotonic()
        if self.archive is None:
            return
        new = self.archive.with_name(self.archive.name + ".new")
        left_out = []
        with tarfile.open(new, "w:gz", compresslevel=3) as tar:

            def add(name: str, content: bytes) -> None:
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))

            for path in sorted(self.out.rglob("*")):
                name = str(path.relative_to(self.out))
                try:  # steps may write, rename and remove files at the same time
                    size = path.stat().st_size if path.is_file() else None
                    if size is not None and size <= LARGEST_ARCHIVED:
                        add(name, path.read_bytes())
                    elif size is not None:
                        left_out.append(f"{name}: {size} bytes")
                except OSError as error:
                    left_out.append(f"{name}: {error.strerror}")
            if left_out:
                add("left_out.txt", ("\n".join(left_out) + "\n").encode())
        new.replace(self.archive)

    def shortfalls(self) -> str:
        """Table of the steps that did not pass."""
        others = [step for step in self.outcomes if step.status != "passed"]
        return table(["step", "status", "last line"], [[s.name, s.status, s.last_line[:150]] for s in others])

    def check_only(self) -> None:
        """Raise ValueError if a pattern of `only` matches no step."""
        for pattern in self.only:
            if not any(fnmatch(name, pattern) for name in self.known):
                raise ValueError(f"--only {pattern}: no such step; there are {', '.join(self.known)}")


class StepProcess:
    """The running process of a step, with its log and its limit."""

    def __init__(self, step: Step, out: Path, limit_s: float) -> None:
        self.step, self.limit_s, self.begin = step, limit_s, time.monotonic()
        self.log = out / f"{step.name}.log"
        self.over = False
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                step.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=out,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
                start_new_session=True,
            )

    def ended(self) -> bool:
        self.over = self.process.poll() is None and time.monotonic() > self.begin + self.limit_s
        if self.over or self.process.returncode is not None:
            self.kill()  # child processes left behind would disturb later steps
            return True
        return False

    def kill(self) -> None:
        """Kill the command and its child processes; one that does not end within KILLED_S is left behind."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(KILLED_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def outcome(self) -> Outcome:
        code = self.process.returncode
        status = "passed" if code == 0 else f"failed with {code}"
        if self.over:
            status = f"failed: longer than {self.limit_s:.0f} s" + (", and cannot be ended" if code is None else "")
        return Outcome(self.step.name, status, round(time.monotonic() - self.begin, 1), last_line(self.log))


def last_line(log: Path) -> str:
    """Last line of the log with any text other than a rule of equal signs."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\n")]
    return lines[-1] if lines else ""


def in_turn(builds: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(turn, build) of each timing of builds that are compared, alternating: a clock that drifts favours none."""
    names = tuple(builds)
    return ((turn, name) for turn in range(TURNS) for name in names)


def script(name: str, *arguments: str | Path) -> list[str]:
    """Command that runs a script of this folder."""
    return [PYTHON, str(GPU_SCRIPTS / f"{name}.py"), *map(str, arguments)]


def sanitizer_command(tool: str) -> list[str]:
    """Prefix that runs a command under a tool of CUDA's compute-sanitizer, which exits with 9 if it finds an error."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # synccheck must be told how many barriers a block has in shared memory.
    return [*command, "--num-cuda-barriers", "64"] if tool == "synccheck" else command


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """Parser of the options that contact.py, measure.py and tune.py share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--archive", type=Path, help="file NAME.tar.gz for an archive of the logs and results")
    parser.add_argument("--extensions", type=Path, help="folder that build.py wrote (default: the installed extension)")
    parser.add_argument("--toy", action="store_true", help="run toy sizes on a CPU, to see that each step runs")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEP", help="run only these steps; * matches anything"
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"seconds for all steps (default: {seconds:.0f})"
    )
    return parser


def extension_environment(folder: Path | None, variant: str) -> dict[str, str]:
    """Environment variables that load a variant of the extension from build.py's folder; empty if it is not there."""
    if folder is None:
        return {}
    files = sorted((folder / variant).glob("_C*.so"))
    return {"BAM_KERNELS_EXTENSION": str(files[0].resolve())} if files else {}


def checkout_environment() -> dict[str, str]:
    """Environment variables that import bam_kernels from this checkout, installed or not."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{REPOSITORY}:{path}" if path else str(REPOSITORY)}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Text of a table: the first and last columns flush left, the others flush right."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    justified: list[Callable[..., str]] = [str.ljust, *[str.rjust] * (len(head) - 2), str.ljust]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(justified, row, widths, strict=True)).rstrip()
        for row in cells
    )
