"""Runs of the driver in tests: where they are written, tiny ones, what they leave, and processes of torchrun."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from driver import checkpoint, cli, history, train

ROOT = Path(__file__).resolve().parents[2]
# Two steps an epoch of 1,348 digits, and a network that costs nothing.
TINY = ["--data.batch-size=512", "--model.width=4", "--model.head-width=16", "--model.head-dim=8", "--run.seed=3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Iterator[None]:
    """Write runs under an empty current directory, use one thread, and leave out reports, which take longer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.outputs, "write", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pretrain(*options: str) -> Path:
    """Directory of a tiny run on the digits."""
    return train.pretrain(cli.parse([*TINY, *options]))


def content(directory: Path) -> dict:
    return torch.load(directory / checkpoint.FILE, weights_only=True)


def rows(checkpoint: dict, kind: str) -> list[dict]:
    """Rows of this kind in the checkpoint's history."""
    return history.History(checkpoint["history"]).of(kind)


def torchrun(
    W: int, *options: str, script: Path = ROOT / "driver" / "pretrain.py", restarts: int = 0
) -> subprocess.CompletedProcess:
    """Run a script on W ranks of one thread each, and keep what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(W)]
    command += ["--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(script), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
