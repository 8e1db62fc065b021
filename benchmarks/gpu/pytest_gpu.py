"""Pytest plugin that writes outcomes one by one and replaces workers whose CUDA context is lost.

Usage: `pytest -p pytest_gpu --outcomes FILE`, with this folder on PYTHONPATH. Each outcome is appended to FILE at once,
because a GPU run may be cut off. A worker of pytest-xdist ends after the test that lost its CUDA context; pytest-xdist
then starts a new worker for the remaining tests.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file to which each test's outcome is appended")


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Worker() if worker else Outcomes(config.getoption("--outcomes")))


class Outcomes:
    """Writes the outcomes, in the main process of pytest and not in its workers."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.failed: set[str] = set()
        if file is not None:
            file.unlink(missing_ok=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a failed outcome for a test file that cannot be imported."""
        if report.failed:
            self.write(report.nodeid, "failed", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.file is None or not (report.when == "call" or report.outcome != "passed"):
            return
        if report.failed:
            if report.nodeid in self.failed:  # pytest-xdist reports the worker's end as one more failure
                return
            self.failed.add(report.nodeid)
        self.write(report.nodeid, report.outcome, report.duration, report.longreprtext)

    def write(self, test: str, outcome: str, seconds: float, text: str) -> None:
        """Append one outcome, with the reason if the test failed or was skipped."""
        if self.file is None:
            return
        row = {"test": test, "outcome": outcome, "seconds": round(seconds, 2)}
        if outcome != "passed":
            errors = [line for line in text.splitlines() if line.startswith("E ")]
            row |= {"error": (errors or text.splitlines() or [""])[0 if errors else -1][:300], "text": text[-6000:]}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Worker:
    """Ends this worker process when its CUDA context is lost."""

    def __init__(self) -> None:
        self.failed = False

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        outcome = yield
        self.failed |= outcome.get_result().failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.failed and context_is_lost():
            os._exit(13)
        self.failed = False


def context_is_lost() -> bool:
    """Whether an error of an earlier kernel makes every later CUDA call of this process fail."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
