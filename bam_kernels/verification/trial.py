"""Processes that try the kernels of a way, and what their end means.

Each way is tried in a fresh process of its own session, so that a crash or hang leaves this process and its CUDA
context untouched. The program is problems.py. It prints reports, lines of JSON after REPORT, between other output:

    {"identity": {...}}                               the GPU and software that it sees; without it, no result counts
    {"stage": "compiling" | "running", "at": TEXT}    what it does from now on, at first "starting"; and the problem
    {"status": "verified" | "failed" | "unknown", "reason": TEXT}   its result, before it ends with status 0
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from typing import Any

from .identity import PACKAGE, Identity
from .store import Verdict

REPORT = "@bam "
CANNOT_RUN = "cannot run here: "  # begins the reason of a way that needs no verdict on this machine
MODE = "BAM_KERNELS_VERIFY"
CRASHES = {"SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"}
KILLED_S = 3.0  # time in which killed processes must end
# Processes that wait for a verdict do so for 60 s after the compilation: all of "running", and the end, must fit in.
LIMITS_S = {"starting": 180.0, "compiling": 600.0, "running": 55.0}
POLL_S = 0.05
SILENT_SHARE = 1 / 3  # of the limit of "running": a process that has printed since then is slow, and does not hang
STEP_S = 1.0  # the most that counts between two looks: more passes only while this process itself is stopped
LINES, LINE_CHARACTERS = 40, 400  # of the output that a verdict keeps
LINE_BYTES = 1 << 16  # of a line that has not ended; the rest is left out
# Variables that are not passed on: ranks of a group, and switches that make right kernels slow, wrong or an error.
NOT_PASSED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "TRITON_INTERPRET"}
NOT_PASSED |= {"NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"}


def command(way: str, index: int) -> list[str]:
    """Command of the process that tries a way on device `index`. Raises: OSError if this is no Python interpreter."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program knows no Python interpreter to start")
    return [sys.executable, "-P", "-m", "bam_kernels.verification.problems", way, "--device", str(index)]


def environment() -> dict[str, str]:
    """Environment of that process: it imports what this process would, is no rank of a group, and tries nothing."""
    own = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    found = PathFinder.find_spec(PACKAGE.name, folders)
    if found is None or os.path.realpath(found.origin or "") != str(PACKAGE / "__init__.py"):
        folders.insert(0, str(PACKAGE.parent))  # only then: other packages in it may have names of Python's own modules
    return own | {
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_MPS_PIPE_DIRECTORY": os.devnull,  # with MPS, a crash would end all programs on the GPU
        MODE: "off",
    }


def run(
    ways: Iterable[str], index: int, here: Identity, watch: Callable[[Mapping[str, "Trial"]], None] = lambda _: None
) -> dict[str, Verdict]:
    """Try ways on device `index`, all at once, and return their verdicts.

    here: identity that the processes must find. watch: called again and again with the trials, until all have ended.
    """
    trials: dict[str, Trial] = {}
    try:
        for way in ways:
            trials[way] = Trial(way, index, here)
        while left := [trial for trial in trials.values() if trial.goes_on()]:
            watch(trials)
            wait_for_output(left)
    finally:
        for trial in trials.values():
            trial.kill()
        until = time.monotonic() + KILLED_S
        for trial in trials.values():
            trial.close(until)
    return {way: trial.verdict() for way, trial in trials.items()}


class Trial:
    """A process that tries one way."""

    def __init__(self, way: str, index: int, here: Identity) -> None:
        self.stage, self.at = "starting", ""
        self._here = here
        self._found: dict[str, Any] = {}
        self._result: tuple[str, str] | None = None
        self._spent_s = dict.fromkeys(LIMITS_S, 0.0)
        self._heard_s = 0.0  # spent on running when the process last printed something
        self._since = time.monotonic()
        self._over = self._ended = False
        self._lines: deque[str] = deque(maxlen=LINES)
        self._rest = b""  # the beginning of a line
        self.output: int | None = None  # what the process prints, until it closes that
        self._process: Any = None
        try:
            self._process = subprocess.Popen(
                command(way, index),
                bufsize=0,
                stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._lines.append(plain(str(error)))
            return
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)

    @property
    def compiles(self) -> bool:
        """Whether it is at work on what has no limit of its own."""
        return not self._ended and self.stage != "running"

    def doing(self) -> str:
        """What the process does at this moment, for people."""
        return "ended" if self._process is None or self._ended else f"{self.stage} {self.at}".rstrip()

    def goes_on(self) -> bool:
        """Take what the process has printed; whether it still runs and is within its limits."""
        if self._process is None or self._ended or self._over:
            return False
        self._read()
        self._count()
        try:  # leaves the process a zombie, so that its number stays that of its group
            state = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            self._ended = state is not None
        except ChildProcessError:  # this process ignores the ends of its children
            self._ended = True
        self._over = not self._ended and self._spent_s[self.stage] > LIMITS_S[self.stage]
        return not (self._ended or self._over)

    def _read(self) -> None:
        if self.output is None:
            return
        try:
            data = os.read(self.output, 1 << 20)  # no pipe holds more
        except BlockingIOError:
            return
        if data:
            self._heard_s = self._spent_s["running"]
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:LINE_BYTES]
        for line in lines:
            self._take_line(line)
        if not data:
            self.output = None

    def _take_line(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        if text.startswith(REPORT):
            try:
                self._take_report(json.loads(text.removeprefix(REPORT)))
                return
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                text = "a report that cannot be read"
        if text.strip():
            self._lines.append(plain(text))

    def _take_report(self, report: dict[str, Any]) -> None:
        if "stage" in report and report["stage"] in LIMITS_S:
            self._count()
            self.stage, self.at = report["stage"], plain(str(report.get("at", "")))
        if "identity" in report:
            self._found = dict(report["identity"])
        if "status" in report and report["status"] in ("verified", "failed", "unknown"):
            self._result = report["status"], plain(str(report.get("reason", "")))

    def _count(self) -> None:
        now = time.monotonic()
        self._spent_s[self.stage] += min(now - self._since, STEP_S)
        self._since = now

    def kill(self) -> None:
        """Kill the process, if it still runs, and all others of its session's group, also if it has ended."""
        if self._process is not None and self._process.returncode is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self, until: float) -> None:
        """Take the end of a killed process; one that has not ended at the monotonic time `until` is left behind."""
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        self._read()
        self._take_line(self._rest)
        self._process.stdin.close()
        self._process.stdout.close()

    def verdict(self) -> Verdict:
        """What the end of the process means."""
        status, reason = self._meaning()
        if status != "unknown" and self._found != self._here:
            status, reason = "unknown", self._difference()
        seconds, date = round(sum(self._spent_s.values()), 1), time.strftime("%Y-%m-%d %H:%M:%S")
        return Verdict(status, reason, seconds, date, "\n".join(self._lines))

    def _meaning(self) -> tuple[str, str]:
        last = f": {self._lines[-1]}" if self._lines else ""
        if self._process is None:
            return "unknown", f"no process could be started{last}"
        doing = f'in problem "{self.at}"' if self.at else f"while {self.stage}"
        if self._over and self.stage == "running":
            if self._spent_s["running"] - self._heard_s < SILENT_SHARE * LIMITS_S["running"]:
                return "unknown", f"was too slow: still at work after {LIMITS_S['running']:.0f} s, {doing}"
            return "failed", f"did not end within {LIMITS_S['running']:.0f} s, {doing}"
        if self._over:
            return "unknown", f"{self.stage} took longer than {LIMITS_S[self.stage]:.0f} s{last}"
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            if name in CRASHES and self.stage != "starting":
                return "failed", f"crashed with {name} {doing}"
            return "unknown", f"was ended by {name} {doing}"
        if code != 0 or self._result is None:
            return "unknown", f"ended with status {code} and no result {doing}{last}"
        return self._result

    def _difference(self) -> str:
        if not self._found:
            return "the new process did not say which GPU it sees"
        names = sorted(name for name in self._here | self._found if self._found.get(name) != self._here.get(name))
        other = (f"{name} {self._found.get(name)}, not {self._here.get(name)}" for name in names)
        return plain(f"the new process sees {'; '.join(other)}")


def wait_for_output(trials: list[Trial]) -> None:
    """Wait until one of the processes prints something or ends, at most POLL_S."""
    poll = select.poll()
    for trial in trials:
        if trial.output is not None:
            poll.register(trial.output, select.POLLIN)
    poll.poll(POLL_S * 1000)


def plain(text: str) -> str:
    """The first LINE_CHARACTERS of a text, without characters that would act on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:LINE_CHARACTERS])
