"""Processes that try the kernels of a way, and what their end means.

Each way is tried in a fresh process of its own session, so that a crash or hang leaves this process and its CUDA
context untouched. The program is problems.py. It prints reports, lines of JSON after REPORT, between other output:

    {"stage": "starting" | "compiling" | "running", "at": TEXT}    what it does from now on
    {"identity": {...}}                                             the GPU and software that it sees
    {"status": "verified" | "failed" | "unknown", "reason": TEXT}   its result, before it ends with status 0
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from .identity import PACKAGE, Identity
from .store import Verdict

REPORT = "@bam "
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
LIMITS_S = {"starting": 180.0, "compiling": 600.0, "running": 60.0}
POLL_S = 0.05
KILLED_S = 5.0  # time in which a killed process must end
LINES, LINE_CHARACTERS = 40, 400  # of the output that a verdict keeps


def command(way: str, index: int) -> list[str]:
    """Command of the process that tries a way on device `index`."""
    return [sys.executable, "-P", "-m", "bam_kernels.verification.problems", way, "--device", str(index)]


def environment() -> dict[str, str]:
    """Environment of that process: imports what this process would, and is no rank of a group."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])
    return own | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}


def run(
    ways: Iterable[str], index: int, here: Identity, compiling: Callable[[], None] = lambda: None
) -> dict[str, Verdict]:
    """Try ways on device `index`, all at once, and return their verdicts.

    here: identity that the processes must find. compiling: called again and again while a process starts or compiles.
    """
    trials = {way: Trial(command(way, index), here) for way in ways}
    try:
        while any(trial.runs() for trial in trials.values()):
            if any(trial.stage != "running" for trial in trials.values()):
                compiling()
            time.sleep(POLL_S)
    finally:
        for trial in trials.values():
            trial.end()
    return {way: trial.verdict() for way, trial in trials.items()}


@dataclass
class Trial:
    """A process that tries one way."""

    command: list[str]
    here: Identity
    stage: str = "starting"
    at: str = ""
    result: Verdict | None = None
    over: bool = False
    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS_S, 0.0))

    def __post_init__(self) -> None:
        self._begin = self._since = time.monotonic()
        self._lines: deque[str] = deque(maxlen=LINES)
        self._other = ""
        self._process: Any = None
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._lines.append(str(error))
            return
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Take the process's output as it comes."""
        output = self._process.stdout
        while line := output.readline(1 << 16):
            text = line.decode(errors="replace").rstrip("\n")
            if not text.startswith(REPORT):
                self._lines.append("".join(c if c.isprintable() else "?" for c in text[:LINE_CHARACTERS]))
                continue
            try:
                self._take(json.loads(text.removeprefix(REPORT)))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self._lines.append("a report that cannot be read")

    def _take(self, report: dict[str, Any]) -> None:
        if "stage" in report and report["stage"] in LIMITS_S:
            self._count()
            self.stage, self.at = report["stage"], str(report.get("at", ""))
        if "identity" in report:
            other = [name for name, value in self.here.items() if report["identity"].get(name) != value]
            self._other = ", ".join(f"{name} {report['identity'].get(name)}, not {self.here[name]}" for name in other)
        if "status" in report and report["status"] in ("verified", "failed", "unknown"):
            self.result = Verdict(report["status"], str(report.get("reason", "")))

    def _count(self) -> None:
        now = time.monotonic()
        self.spent_s[self.stage] += now - self._since
        self._since = now

    def runs(self) -> bool:
        """Whether the process still runs and is within its limits."""
        if self._process is None or self.over or self._process.poll() is not None:
            return False
        self._count()
        self.over = self.spent_s[self.stage] > LIMITS_S[self.stage]
        return not self.over

    def end(self) -> None:
        """End the process with all that it started; one that does not end within KILLED_S is left behind."""
        if self._process is None:
            return
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(KILLED_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self._reader.join(KILLED_S)
        self._process.stdin.close()

    def verdict(self) -> Verdict:
        """What the end of the process means."""
        status, reason = self._meaning()
        output = "\n".join(self._lines) if status == "failed" else ""
        seconds = round(time.monotonic() - self._begin, 1)
        return Verdict(status, reason, seconds, time.strftime("%Y-%m-%d"), output)

    def _meaning(self) -> tuple[str, str]:
        last = f": {self._lines[-1]}" if self._lines else ""
        if self._process is None:
            return "unknown", f"no process could be started{last}"
        doing = f"in {self.at}" if self.at else f"while {self.stage}"
        if self.over and self.stage == "running":
            return "failed", f"did not end within {LIMITS_S['running']:.0f} s {doing}"
        if self.over:
            return "unknown", f"{self.stage} took longer than {LIMITS_S[self.stage]:.0f} s{last}"
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            if -code in CRASHES and self.stage != "starting":
                return "failed", f"crashed with {name} {doing}"
            return "unknown", f"was ended by {name} {doing}"
        if code != 0 or self.result is None:
            return "unknown", f"ended with status {code} and no result {doing}{last}"
        if self._other:
            return "unknown", f"the new process sees {self._other}"
        return self.result.status, self.result.reason
