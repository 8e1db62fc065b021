"""A GPU that is not there, and small programs in place of those that try kernels on it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bam_kernels.backends import cuda, triton
from bam_kernels.verification import identity, trial, trust

# Precedes each program, which has: way, here (the identity), report, begin. Its standard library alone starts quickly.
PRELUDE = f"""
import json, os, signal, subprocess, sys, threading, time
way, here = sys.argv[1], json.loads(sys.argv[2])

def report(**fields):
    os.write(1, b"\\n{trial.REPORT}" + json.dumps(fields).encode() + b"\\n")

def begin(stage="running", at="teacher"):
    report(identity=here)
    report(stage=stage, at=at)
"""
PASSES = "begin(); report(status='verified')"
WRONG_LINES = """\
one launch
  B=65, W=1, float16
    gradient              largest error 3.1 of its bound
      [0, 7, 12]: 0.00213242229, not 0.00214552237"""
WRONG_REASON = "one launch: 65 of 12480 numbers of the gradient are wrong (B=65, W=1, float16)"
WRONG = f"""
begin(at='one launch'); print({WRONG_LINES!r}, flush=True)
report(status='failed', reason={WRONG_REASON!r})
"""
CRASHES = "begin(); print('before it'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "begin(); time.sleep(1000)"
NO_MEMORY = "report(identity=here); report(status='unknown', reason='OutOfMemoryError: CUDA out of memory')"


class StandInGpu:
    """Torch sees one GPU, on which CUDA and Triton kernels can run; verdicts are kept below `folder`.

    children: the program that tries each way, by default one that finds nothing wrong.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, name: str = "Stand-in H100") -> None:
        self.folder = folder
        self.children = dict.fromkeys(trust.GPU_WAYS, PASSES)
        self.properties = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda device: True, raising=False)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: self.properties)
        for backend in (cuda, triton):
            patch.setattr(backend, "unavailable", lambda device: None)
        patch.setattr(trial, "command", self.command)
        patch.setattr(trial, "POLL_S", 0.005)  # programs of tests end soon
        patch.setattr(trust, "_trust", {})
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv(trust.MODE, "auto")

    def command(self, way: str, index: int) -> list[str]:
        """Command of a child, in place of trial.command, that is noted as tried."""
        with (self.folder / "tried").open("a") as opened:
            opened.write(f"{way}\n")
        here = json.dumps(identity.identity(index))
        return [sys.executable, "-I", "-S", "-c", PRELUDE + self.children[way], way, here]

    def tried(self) -> list[str]:
        """Ways that were tried by all processes that share `folder`, in the order of starting."""
        file = self.folder / "tried"
        return file.read_text().split() if file.exists() else []

    def kept(self) -> list[Path]:
        """Files with verdicts."""
        return sorted((self.folder / "bam_kernels" / "verdicts").glob("*.json"))


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> StandInGpu:
    """A GPU of which nothing is known yet."""
    return StandInGpu(monkeypatch, tmp_path)
