"""Workers of the driver that make no progress, or that a killed run leaves: stopped, slow, hanging between epochs."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from photographs import PHOTOGRAPHS, write_images

from driver import config
from driver.config import LostWorker
from driver.data import watching, workers
from driver.data.sources import Files
from driver.distributed import World

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The main process looks at its workers every 0.1 seconds, instead of every 5."""
    monkeypatch.setattr(watching.WatchedBatches._try_get_data, "__defaults__", (0.1,))


class Slow(Files):
    """Image files of which each takes longer than a look at the workers."""

    def read(self, index: int):
        time.sleep(0.25)
        return super().read(index)


def images_of(kind: type[Files], workers_: int = 1) -> workers.InWorkers:
    """Training views of 9 images, in two batches."""
    if not Path("pets").exists():
        write_images(Path("pets"), 12)
    data = dataclasses.replace(PHOTOGRAPHS, workers=workers_)
    return workers.InWorkers(kind(Path("pets"), 0.25), data, config.Boxes(), CPU, 0, World())


def crops(images: workers.InWorkers, epoch: int) -> list[torch.Tensor]:
    return [crop.clone() for parts in images.views(epoch) for part in parts for crop in part]


def processes(images: workers.InWorkers) -> list:
    return images.loader.loader._iterator._workers


@pytest.mark.parametrize(
    "looks, hangs",
    [
        ([(False, 0)] * 3, True),
        ([(False, 0)] * 2, False),
        ([(False, 0), (False, 0), (True, 0), (False, 0), (False, 0)], False),  # a batch came
        ([(False, 0), (False, 0), (False, 1), (False, 0), (False, 0)], False),  # an image was begun
        ([(False, 0), (False, 0), (False, 1), (False, 0), (False, 0), (False, 0)], True),
    ],
)
def test_patience_counts_from_the_last_progress_of_any_worker(looks, hangs):
    """Looks of a second each with a patience of 3: whether a batch came, how many images were begun."""
    watch = watching.Watch(2, patience_s=3)

    def look() -> None:
        for found, begun in looks:
            watch.state[1, 1] += begun
            watch.waited(found, 1.0)

    if hangs:
        with pytest.raises(watching.Hanging):
            look()
    else:
        look()


def test_slow_images_are_the_same_images():
    """Several looks find no batch before each batch comes. Patience is shorter than a batch takes."""
    expected = crops(images_of(Files, 0), 0)
    slow, found = images_of(Slow), []
    for parts in slow.views(0):
        slow.loader.dataset.watch.patience_s = 0.7  # from the first batch on: the worker is up
        found += [crop.clone() for part in parts for crop in part]
    assert len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def test_a_worker_that_is_stopped_and_continued_goes_on():
    """A shell's job control or a sleeping machine stops and continues processes."""
    expected = crops(images_of(Files, 0), 1)
    images = images_of(Files)
    crops(images, 0)
    (worker,) = processes(images)
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.7, os.kill, (worker.pid, signal.SIGCONT)).start()
    assert all(map(torch.equal, crops(images, 1), expected))
    assert processes(images) == [worker]


def test_a_worker_that_is_stopped_between_epochs_is_named():
    images = images_of(Files, 2)
    crops(images, 0)
    images.loader.dataset.watch.patience_s = 0.5
    stopped = processes(images)[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    words = rf"no progress for 0.5 s: worker 1 \(process {stopped.pid}\) was stopped by a signal"
    with pytest.raises(LostWorker, match=words) as error:
        crops(images, 1)
    assert "\n" not in str(error.value) and not stopped.is_alive()


READS_AND_WAITS = """
import sys
import torch
from pathlib import Path
from driver import config
from driver.data import workers
from driver.data.sources import Files
from driver.distributed import World
data = config.Data(source="folder", root=Path("pets"), size=16, batch_size=4, workers=2)
images = workers.InWorkers(Files(Path("pets"), 0.25), data, config.Boxes(), torch.device("cpu"), 0, World())
list(images.views(0))
print(*[worker.pid for worker in images.loader.loader._iterator._workers], flush=True)
sys.stdin.read()
"""


def test_workers_end_with_a_run_that_is_killed():
    """And so does the server that forks them. The pipe on which they print ends when no process has it any more."""
    write_images(Path("pets"), 12)
    command, pipe = [sys.executable, "-c", READS_AND_WAITS], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as run:
        numbers = run.stdout.readline().split()
        assert len(numbers) == 2
        run.kill()
        left = []

        def end() -> None:
            for number in numbers:
                left.append(number)
                os.kill(int(number), signal.SIGKILL)

        timer = threading.Timer(20, end)
        timer.start()
        run.stdout.read()
        timer.cancel()
    assert not left
