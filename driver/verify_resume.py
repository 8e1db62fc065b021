"""Break a run at random steps, resume it each time, and compare it bit for bit with an unbroken run.

python driver/verify_resume.py                                    kill -9, on the digits
python driver/verify_resume.py --signal TERM --breaks 5           as a scheduler ends a job
python driver/verify_resume.py --ranks 2                          two processes, both broken at once
python driver/verify_resume.py --options="--data.root /PATH --optim.epochs 2"

Everything is written under a temporary directory. Exit code 0: equal; 1: not equal, or not broken.
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
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro

from driver import history, weights
from driver.bounds import PROCESSES, SEED, at_least
from driver.checkpoint import FILE
from driver.cli import check_bounds
from driver.config import UserError, helpful
from driver.exits import STOPPED, exit_code

PARTS = ("network", "teacher", "optimizer", "scaler", "boxes", "images", "epoch", "step", "backend")
RUNS = "runs"
SMALL = "--model.width 8 --optim.epochs 3 --run.eval-every 0 --run.save-every 1"


@helpful
@dataclass(frozen=True)
class Verify:
    """Break a run at random steps, resume it each time, and compare it bit for bit with an unbroken run.

    Everything is written under a temporary directory. Exit code 0: equal; 1: not equal, or not broken.
    """

    options: str = SMALL
    """Options of driver/pretrain.py in one string, e.g. `--data.root /PATH --optim.epochs 2`; absolute paths only."""
    signal: Literal["KILL", "TERM", "USR1"] = "KILL"
    """Signal that breaks the run. KILL: as by kill -9. TERM or USR1: as a scheduler ends a job."""
    breaks: Annotated[int, at_least(1)] = 2
    """Number of times that the run is broken."""
    ranks: Annotated[int, at_least(1, PROCESSES)] = 1
    """Processes of the run, started by this script without torchrun."""
    save_steps: Annotated[int, at_least(1)] = 4
    """Steps between checkpoints, from which a run goes on after kill -9."""
    seed: Annotated[int | None, SEED] = None
    """Seed of the steps at which the run is broken. None: other steps each time."""


def verify(verify: Verify) -> int:
    """Break and resume the run as the options say, print the result, return the exit code: 0 equal, 1 not.

    Raises: UserError on an option out of bounds, or where a run ends in an unexpected way.
    """
    check_bounds(verify)
    try:
        own = shlex.split(verify.options)
    except ValueError as error:
        raise UserError(f"--options {verify.options}: {error}") from error
    options = [
        *own,
        "--run.directory",
        RUNS,  # under the temporary directory, whatever the options say
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
        # Breaks lie in the first half: a run may take many further steps before a step is seen in its history.
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
    """Start or resume the run under `folder`; once it has done step `stop_at`, send signal `number` to all its ranks.

    Returns whether the signal ended the run. Raises: UserError where the run ends in any other way.
    """
    folder.mkdir(exist_ok=True)
    directory = newest(folder)
    resumes = directory is not None and (directory / FILE).is_file()
    command = [sys.executable, str(Path(__file__).with_name("pretrain.py"))]
    command += ["--run.resume", str(directory)] if resumes else options
    if resumes and stop_at is not None:
        # The resumed run writes the history again, from the checkpoint: a later step in it shows that it is under way.
        stop_at = max(stop_at, content(folder)["step"] + 1)
        (directory / history.FILE).unlink()
    with (folder / "output").open("w+") as output:
        environments = environments_of(ranks)
        processes = [subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=e) for e in environments]
        sent = False
        while any(process.poll() is None for process in processes):
            if stop_at is not None and not sent and steps_done(folder, directory if resumes else None) >= stop_at:
                # All ranks are stopped before any is killed: a rank that sees another one end would print an error.
                for each in (signal.SIGSTOP, number) if number == signal.SIGKILL else (number,):
                    for process in processes:
                        process.send_signal(each)
                sent = True
            time.sleep(0.01)
        ended = -number if number == signal.SIGKILL else STOPPED
        codes = {process.returncode for process in processes}
        if codes not in (({0}, {ended}) if sent else ({0},)):
            output.seek(0)
            raise UserError(f"{' '.join(command)}: exit codes {codes}\n{output.read()[-3000:]}")
    return codes == {ended}


def environments_of(ranks: int) -> list[dict[str, str]]:
    """Environment variables of each rank's process, as torchrun would set them."""
    if ranks == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def steps_done(folder: Path, resumed: Path | None) -> int:
    """Last step in the history of the run `resumed`, or of the newest run under `folder`; 0 without a history."""
    directory = resumed or newest(folder)
    if directory is None or not (directory / history.FILE).is_file():
        return 0
    last = history.read(directory).last("train")
    return 0 if last is None else last["step"]


def content(folder: Path) -> dict[str, Any]:
    """Newest checkpoint of the last run under `folder`."""
    return weights.read(newest(folder) / FILE)


def newest(folder: Path) -> Path | None:
    """Directory of the last run under `folder`, if there is one."""
    return max((folder / RUNS).glob("*"), default=None)


def same(a: Any, b: Any) -> bool:
    """Whether two nested containers have equal keys, lengths and values, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    sys.exit(exit_code(lambda _: verify(tyro.cli(Verify))))
