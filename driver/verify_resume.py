"""Break a run at random steps, resume it each time, and compare it bit for bit with an unbroken one.

python driver/verify_resume.py                                    kill -9, on the digits
python driver/verify_resume.py --signal TERM --breaks 5           as a scheduler ends a job
python driver/verify_resume.py --options="--data.root /PATH --optim.epochs 2"

A folder's path is to be absolute. Everything is written under a temporary directory. Exit code 0: equal; 1: not.
"""

import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro

from driver.checkpoint import FILE
from driver.signals import STOPPED

PARTS = ("network", "teacher", "optimizer", "scaler", "boxes", "images", "epoch", "step")
SMALL = "--model.width 8 --optim.epochs 3 --run.eval-every 0 --run.save-every 1"


@dataclass(frozen=True)
class Verify:
    options: str = SMALL
    """Options of driver/pretrain.py, in one string."""
    signal: Literal["KILL", "TERM", "USR1"] = "KILL"
    breaks: int = 2
    """How often the run is broken."""
    save_steps: int = 4
    """Steps between checkpoints: what kill -9 leaves."""
    seed: int | None = None
    """Of the steps at which it is broken. None: others each time."""


def verify(verify: Verify) -> int:
    """The exit code."""
    options = [*shlex.split(verify.options), "--run.log-every", "1", "--run.save-steps", str(verify.save_steps)]
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        total = run(unbroken, options, None, 0)
        draw = random.Random(verify.seed)
        at = sorted(draw.sample(range(1, total), min(verify.breaks, total - 1)))
        for step in [*at, None]:
            run(broken, options, step, getattr(signal, f"SIG{verify.signal}"))
        contents = [
            torch.load(newest(path) / FILE, map_location="cpu", weights_only=True) for path in (unbroken, broken)
        ]
        differing = [part for part in PARTS if not same(*(content[part] for content in contents))]
    where = ", ".join(map(str, at))
    if differing:
        print(f"NOT EQUAL: {', '.join(differing)} differ after SIG{verify.signal} at steps {where} of {total}")
        return 1
    print(f"equal bit for bit after SIG{verify.signal} at steps {where} of {total}: {', '.join(PARTS)}")
    return 0


def run(folder: Path, options: list[str], stop_at: int | None, number: int) -> int:
    """Start or resume the run under `folder`, send it the signal once that step is done; the run's number of steps."""
    folder.mkdir(exist_ok=True)
    directory = newest(folder)
    resumes = directory is not None and (directory / FILE).is_file()
    command = [sys.executable, str(Path(__file__).with_name("pretrain.py"))]
    command += ["--run.resume", str(directory)] if resumes else options
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, total, sent = "", 0, False
    while piece := process.stderr.read(16):
        said += piece
        for done, of in re.findall(r"(\d+)/(\d+) \[", said[-400:]):
            total = int(of)
            if not sent and stop_at is not None and int(done) >= stop_at:
                process.send_signal(number)
                sent = True
    code = process.wait()
    expected = 0 if not sent else -number if number == signal.SIGKILL else STOPPED
    if code not in (0, expected):  # it may have been done before the signal came
        raise RuntimeError(f"{' '.join(command)}: exit code {code}, not {expected}\n{said[-3000:]}")
    return total


def newest(folder: Path) -> Path | None:
    """The last of the runs under it."""
    return max((folder / "runs").glob("*"), default=None)


def same(a: Any, b: Any) -> bool:
    """Nested containers with bitwise equal tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    sys.exit(verify(tyro.cli(Verify, description=__doc__)))
