"""Break a run at random steps, resume it each time, and compare it bit for bit with an unbroken one.

python driver/verify_resume.py                                    kill -9, on the digits
python driver/verify_resume.py --signal TERM --breaks 5           as a scheduler ends a job
python driver/verify_resume.py --ranks 2                          the same of two processes, all broken at once
python driver/verify_resume.py --options="--data.root /PATH --optim.epochs 2"

A folder's path is to be absolute. Everything is written under a temporary directory. Exit code 0: equal; 1: not.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro

from driver import history
from driver.checkpoint import FILE
from driver.exits import STOPPED

PARTS = ("network", "teacher", "optimizer", "scaler", "boxes", "images", "epoch", "step")
SMALL = "--model.width 8 --optim.epochs 3 --run.eval-every 0 --run.save-every 1"


@dataclass(frozen=True)
class Verify:
    options: str = SMALL
    """Options of driver/pretrain.py, in one string."""
    signal: Literal["KILL", "TERM", "USR1"] = "KILL"
    breaks: int = 2
    """How often the run is broken."""
    ranks: int = 1
    """Processes of the run, started here, without torchrun."""
    save_steps: int = 4
    """Steps between checkpoints: what kill -9 leaves."""
    seed: int | None = None
    """Of the steps at which it is broken. None: others each time."""


def verify(verify: Verify) -> int:
    """The exit code."""
    options = [
        *shlex.split(verify.options),
        "--run.deterministic",
        "True",
        "--run.log-every",
        "1",
        "--run.save-steps",
        str(verify.save_steps),
    ]
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        run(unbroken, options, verify.ranks, None, 0)
        total = content(unbroken)["step"]
        # In the first half: a run may take many a step before it is seen to have taken this one.
        early = range(1, max(2, total // 2))
        at = sorted(random.Random(verify.seed).sample(early, min(verify.breaks, len(early))))
        number = getattr(signal, f"SIG{verify.signal}")
        was_broken = [run(broken, options, verify.ranks, step, number) for step in at]
        run(broken, options, verify.ranks, None, 0)
        differing = [part for part in PARTS if not same(content(unbroken)[part], content(broken)[part])]
    where = ", ".join(map(str, at))
    if not all(was_broken):
        print(f"NOT BROKEN: the run was done before SIG{verify.signal} came; give it more --optim.epochs")
        return 1
    if differing:
        print(f"NOT EQUAL: {', '.join(differing)} differ after SIG{verify.signal} at steps {where} of {total}")
        return 1
    print(f"equal bit for bit after SIG{verify.signal} at steps {where} of {total}: {', '.join(PARTS)}")
    return 0


def run(folder: Path, options: list[str], ranks: int, stop_at: int | None, number: int) -> bool:
    """Start or resume the run under `folder`; once it has done that step, send all its ranks the signal. Whether that
    ended it.

    Raises: RuntimeError where it ends in any other way.
    """
    folder.mkdir(exist_ok=True)
    directory = newest(folder)
    resumes = directory is not None and (directory / FILE).is_file()
    command = [sys.executable, str(Path(__file__).with_name("pretrain.py"))]
    command += ["--run.resume", str(directory)] if resumes else options
    if resumes and stop_at is not None:
        # It is under way once there are steps of its own in the history, which it writes again from the checkpoint.
        stop_at = max(stop_at, content(folder)["step"] + 1)
        (directory / history.FILE).unlink()
    with (folder / "said").open("w+") as said:
        environments = environments_of(ranks)
        processes = [subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, env=e) for e in environments]
        sent = False
        while any(process.poll() is None for process in processes):
            if stop_at is not None and not sent and steps_done(folder, directory if resumes else None) >= stop_at:
                # Killed one by one, a rank might see that another has gone, and say so.
                for each in (signal.SIGSTOP, number) if number == signal.SIGKILL else (number,):
                    for process in processes:
                        process.send_signal(each)
                sent = True
            time.sleep(0.01)
        ended = -number if number == signal.SIGKILL else STOPPED
        codes = {process.returncode for process in processes}
        if codes not in (({0}, {ended}) if sent else ({0},)):
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit codes {codes}\n{said.read()[-3000:]}")
    return codes == {ended}


def environments_of(ranks: int) -> list[dict[str, str]]:
    """What each rank is started in."""
    if ranks == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def steps_done(folder: Path, resumed: Path | None) -> int:
    """By the history of the run that is resumed, or of the newest one."""
    directory = resumed or newest(folder)
    if directory is None or not (directory / history.FILE).is_file():
        return 0
    last = history.read(directory).last("train")
    return 0 if last is None else last["step"]


def content(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of the last run under the folder."""
    return torch.load(newest(folder) / FILE, map_location="cpu", weights_only=True)


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
