"""Commands with time limits, run in turn or side by side, for scripts that use a GPU one has for minutes.

What a step prints goes to OUT/NAME.log as it comes, how each ended to OUT/steps.json at once. The archive holds all of
OUT's small files and is renewed every few seconds, so that a run that is killed leaves it too.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[2]
GPU_SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
PYTHON = sys.executable
ARCHIVE_EVERY_S = 5.0
LARGEST_ARCHIVED = 4 << 20  # bytes of a file; larger ones are left out and named
KILLED_S = 5.0  # that a killed process may take to end
BASE = "sm_90a"  # the variant of the extension that most steps use


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds; `needs` says why it cannot run here, None: it can."""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed ..." or "not run: ..." where it cannot run here, and its log's last line."""

    name: str
    status: str
    seconds: float = 0.0
    last_line: str = ""

    @property
    def failed(self) -> bool:
        return self.status.startswith("failed")


class Run:
    """Runs steps until `seconds` are over: `with Run(...) as run: run.steps([...], at_once=6)`."""

    def __init__(self, out: Path, archive: Path | None, only: Iterable[str] = (), seconds: float = 1e9) -> None:
        self.out, self.archive, self.only = out.absolute(), archive, tuple(only)
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self.known: list[str] = []
        self._archived = 0.0
        self.out.mkdir(parents=True, exist_ok=True)
        if archive is not None:
            archive.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what runs, and writes the archive
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.write_archive()

    def chosen(self, name: str) -> bool:
        """Whether `only` lets a step of this name run."""
        return not self.only or any(fnmatch(name, pattern) for pattern in self.only)

    def steps(self, steps: Iterable[Step], at_once: int = 1) -> list[Outcome]:
        """Run the chosen ones, `at_once` at a time, each until its limit or the run's end."""
        given: list[Step] = list(steps)
        self.known += [step.name for step in given]
        waiting, ended = [step for step in given if self.chosen(step.name)], []
        running: list[Running] = []
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
                        running.append(Running(step, self.out, min(step.limit_s, left)))
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
        """A file of the archive."""
        (self.out / name).write_text(text)

    def _note(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        now = time.monotonic() - self.begin
        failed = f": {outcome.last_line}" if outcome.failed else ""
        line = f"[{now:5.0f} s] {outcome.name:<34} {outcome.status} in {outcome.seconds:.1f} s{failed}"
        print(line[:400], flush=True)
        file = self.out / "steps.json"
        ended = json.loads(file.read_text()) if file.exists() else {}
        ended[outcome.name] = {"status": outcome.status, "seconds": outcome.seconds, "last_line": outcome.last_line}
        file.write_text(json.dumps(ended, indent=1) + "\n")
        return outcome

    def write_archive(self) -> None:
        """All of OUT's files that are not too large, in one file that is whole at any moment."""
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
                try:  # steps write, rename and remove files meanwhile
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
        """A table of the steps that did not pass."""
        others = [step for step in self.outcomes if step.status != "passed"]
        return table(["step", "status", "last line"], [[s.name, s.status, s.last_line[:150]] for s in others])

    def check_only(self) -> None:
        """Raises: ValueError if a pattern of `only` named no step."""
        for pattern in self.only:
            if not any(fnmatch(name, pattern) for name in self.known):
                raise ValueError(f"--only {pattern}: no such step; there are {', '.join(self.known)}")


class Running:
    """A step's process group, its log and its limit."""

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
            self.kill()  # what a command has left running would disturb the steps after it
            return True
        return False

    def kill(self) -> None:
        """End the command and all that it started; one that the system cannot end is left behind."""
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
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\n")]
    return lines[-1] if lines else ""


def script(name: str, *arguments: str | Path) -> list[str]:
    """A script of this folder as a command."""
    return [PYTHON, str(GPU_SCRIPTS / f"{name}.py"), *map(str, arguments)]


def checker(tool: str) -> list[str]:
    """A command under a tool of CUDA's compute-sanitizer: exit status 9 where it has found something."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # Barriers of a block in shared memory, which the tool does not count by itself.
    return [*command, "--num-cuda-barriers", "64"] if tool == "synccheck" else command


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """The options that contact, measure and tune share."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    made.add_argument("--archive", type=Path, help="one .tar.gz of all of them; its name ends in .tar.gz")
    made.add_argument("--extensions", type=Path, help="folder that build.py wrote; none: the installed extension")
    made.add_argument("--toy", action="store_true", help="toy sizes, on a CPU: whether each step runs")
    made.add_argument("--only", nargs="+", default=[], metavar="STEP", help="only these steps; * stands for anything")
    made.add_argument("--seconds", type=float, default=seconds, help=f"time for all of it ({seconds:.0f})")
    return made


def extension(folder: Path | None, variant: str) -> dict[str, str]:
    """The environment of a step that uses a variant of the extension that build.py made."""
    if folder is None:
        return {}
    found = sorted((folder / variant).glob("_C*.so"))
    return {"BAM_KERNELS_EXTENSION": str(found[0].resolve())} if found else {}


def importing() -> dict[str, str]:
    """The environment in which the checkout is imported, installed or not."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{REPOSITORY}:{path}" if path else str(REPOSITORY)}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    justified: list[Callable[..., str]] = [str.ljust, *[str.rjust] * (len(head) - 2), str.ljust]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(justified, row, widths, strict=True)).rstrip()
        for row in cells
    )
