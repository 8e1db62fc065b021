"""Runs of the driver of several ranks, one of which gets a signal at a given place of the run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--model.width=4", "--data.batch-size=512", "--optim.epochs=2", "--optim.warmup-epochs=0"]
RUN += ["--run.log-every=1", "--run.device=cpu", "--run.save-every=1"]
SILENCE_S = 3
"""Seconds after which a rank that does not answer is given up, in place of half an hour."""


@dataclass(frozen=True)
class Fault:
    """Signal `name` that rank `rank` gets when it calls method `place` for the `time`-th time."""

    place: str
    rank: int
    name: str = "SIGKILL"
    time: int = 1


def broken(fault: Fault, *options: str) -> list[subprocess.CompletedProcess]:
    """Let two ranks make a run on the digits under the current directory, with this fault; what became of each."""
    from driver.verify_resume import environments_of  # not importable yet where this file is the program

    command = [sys.executable, __file__, fault.place, str(fault.rank), fault.name, str(fault.time), *RUN, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=e | {"OMP_NUM_THREADS": "1"}, **pipes) for e in environments_of(2)]
    lost = ranks[fault.rank]
    others = [rank for rank in ranks if rank is not lost]
    printed = {rank.pid: rank.communicate(timeout=120) for rank in others}
    lost.kill()  # a stopped one is there still
    printed[lost.pid] = lost.communicate(timeout=10)
    return [subprocess.CompletedProcess(command, rank.returncode, *printed[rank.pid]) for rank in ranks]


def main(place: str, rank: str, name: str, when: str, *options: str) -> int:
    """One rank: run the driver, and send the signal to itself at the place if it is the rank that is lost."""
    sys.path.insert(0, str(ROOT))
    from driver import checkpoint, distributed, pretrain, train
    from driver.ranks import meeting

    places = {
        "start": (distributed.World, "start"),
        "images": (train, "make_images"),
        "step": (train.Training, "step"),
        "evaluation": (train, "evaluate"),
        "save": (checkpoint, "save"),
        "finish": (train.Training, "finish"),
    }
    owner, method = places[place]
    original, left = getattr(owner, method), [int(when)]

    def faulty(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and os.environ["RANK"] == rank:
            time.sleep(0.3)  # the other rank is in a collective by now
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args, **kwargs)

    setattr(owner, method, faulty)
    distributed.SILENCE = timedelta(seconds=SILENCE_S)
    meeting.ANSWER_S = SILENCE_S
    return pretrain.main(list(options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
