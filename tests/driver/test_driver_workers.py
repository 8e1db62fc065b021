"""Worker processes of the driver: bytes that they send, shared memory, workers that end, hang or lose a batch."""

import collections
import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from driver_runs import ROOT
from photographs import PHOTOGRAPHS, make, write_classes, write_images
from torchvision.transforms.v2 import functional

from driver import config, distributed
from driver.config import UserError
from driver.data import loading, shared_memory, watching, workers
from driver.data.images import floats
from driver.data.labelled import Labelled
from driver.data.sources import Files
from driver.distributed import World
from driver.exits import StopSignal
from driver.model import IMAGENET_MEAN, IMAGENET_STD, Standardize

CPU = torch.device("cpu")
MB = 2**20
IN_WORKERS = dataclasses.replace(PHOTOGRAPHS, workers=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """torch looks for ended workers every 0.2 seconds, instead of every 5."""
    monkeypatch.setattr(watching.WatchedBatches._try_get_data, "__defaults__", (0.2,))


@pytest.fixture
def impatient(monkeypatch):
    """The patience with workers is a second, once one of them has reached image 5."""
    original = watching.Watch.waited

    def waited(watch: watching.Watch, *how) -> None:
        watch.patience_s = 1 if 5 in watch.busy_with else watching.PATIENCE_S
        original(watch, *how)

    monkeypatch.setattr(watching.Watch, "waited", waited)


class Faulty(Files):
    """Image files; image 5 is not read as it should be, in the way that `fault` names."""

    fault = ""

    def read(self, index: int):
        if index == 5:
            self.fail()
        return super().read(index)

    def fail(self) -> None:
        if self.fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.fault))
        elif self.fault == "exit":
            os._exit(3)
        elif self.fault == "hang":
            time.sleep(60)
        elif self.fault == "few files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def faulty(fault: str) -> Faulty:
    write_images(Path("pets"), 8)
    source = Faulty(Path("pets"), 0.25)
    source.fault = fault
    return source


def images_of(source: Files) -> workers.InWorkers:
    """Training views of a source, whose batches are made by one worker."""
    return workers.InWorkers(source, IN_WORKERS, config.Boxes(), CPU, 0, World())


# Bytes


def test_views_leave_workers_as_bytes_and_are_numbers_in_the_network():
    """Bytes over 255, rounded as torchvision does, whatever the network's dtype; floats are taken as they are."""
    write_classes(Path("pets"), 4)
    views = next(make(PHOTOGRAPHS).views(0))[0]
    assert [view.dtype for view in views] == [torch.uint8] * 2
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    numbers = functional.to_dtype(every, torch.float32, scale=True)
    assert torch.equal(floats(every), numbers) and floats(numbers) is numbers
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        standardize = Standardize(IMAGENET_MEAN, IMAGENET_STD).to(dtype)
        assert standardize(every).dtype == dtype and torch.equal(standardize(every), standardize(numbers))
    assert standardize(every).float().abs().max() < 3  # about zero mean and unit variance, not bytes


def test_an_evaluation_gets_numbers():
    write_classes(Path("pets"), 4)
    images = make(PHOTOGRAPHS)
    batches = [next(images.bank())[0], next(images.held_out())[0], next(images.whole(torch.tensor([0])))]
    for batch in batches:
        assert batch.dtype == torch.float32 and 0.5 < batch.max() <= 1 and batch.min() >= 0


# Free shared memory


Mounted = collections.namedtuple("Mounted", "f_bavail f_frsize")


def has_free(monkeypatch, free: int) -> None:
    """Let the shared memory have so many free bytes."""
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda _: Mounted(free // 4096, 4096))


def test_too_little_shared_memory_is_an_error_before_training(monkeypatch):
    """2 workers with 2 batches each and one in use, of 64 images in 2 views of 64 pixels and 3 of 8; and the boxes."""
    write_classes(Path("pets"), 200)
    options = dataclasses.replace(PHOTOGRAPHS, workers=2, batch_size=64, size=64, held_out=0.0)
    needed = (2 * 2 + 1) * 64 * 3 * (2 * 64**2 + 3 * 8**2) + 400 * 16
    enough = -(-needed // 4096) * 4096
    has_free(monkeypatch, enough)
    make(options)
    has_free(monkeypatch, enough - 4096)
    with pytest.raises(UserError, match=r"/dev/shm has 7.6 MB .* of 2 workers need 7.7 MB. .*--shm-size 1g.*workers 0"):
        make(options)
    make(dataclasses.replace(options, workers=0))
    make(dataclasses.replace(options, batch_size=32))


def test_an_evaluation_needs_no_more_memory_at_large_sizes():
    """64 MB suffice for 2 workers with small batches of large images."""
    data = dataclasses.replace(PHOTOGRAPHS, workers=2, size=384)
    write_images(Path("pets"), 8)
    reader = workers.Reader(Files(Path("pets"), 0.25), data, CPU)
    assert reader.shared_bytes(10**6) < 40 * MB < workers.Reader(reader.source, data, CPU, 32).shared_bytes(10**6)
    assert reader.shared_bytes(3) == 3 * 3 * 384**2  # no more than all images


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    """Two machines of two ranks: on one of them another process has taken memory. All ranks raise."""
    ranks = [
        (machine, free, 30 * MB) for machine, free in [("a", 64 * MB), ("a", 60 * MB), ("b", 64 * MB), ("b", 50 * MB)]
    ]
    world = World(0, 4)
    monkeypatch.setattr(World, "gather", lambda _, mine: ranks[:3])
    shared_memory.check(30 * MB, 2, world)
    monkeypatch.setattr(World, "gather", lambda _, mine: ranks)
    with pytest.raises(UserError, match=r"has 50.0 MB .* of 2 workers on each of 2 ranks need 60.0 MB"):
        shared_memory.check(30 * MB, 2, world)
    shared_memory.check(30 * MB, 0, world)


@pytest.mark.parametrize("on_device", [False, True])
def test_evaluations_look_at_shared_memory_too(on_device, monkeypatch):
    """Frozen features of 8 images, at most 4 in a batch, and images that workers decode for the device."""
    write_classes(Path("pets"), 8)
    options = dataclasses.replace(PHOTOGRAPHS, workers=1, size=256, on_device=on_device)
    read = make if on_device else lambda data: Labelled(Files(Path("pets"), 0.25), data, CPU, World())
    needed = 12 * 3 * 256**2  # 12 of the 16 images are trained on: 3 batches of 4, or all at once
    has_free(monkeypatch, needed)
    read(options)
    has_free(monkeypatch, needed - 4096)
    with pytest.raises(UserError, match=r"the batches of 1 workers need 2.3 MB"):
        read(options)


def test_no_shared_memory_is_used_without_workers(monkeypatch):
    write_classes(Path("pets"), 4)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: pytest.fail("shared"))
    images = make(PHOTOGRAPHS)
    assert list(images.views(0)) and list(images.bank())


def test_free_memory_is_found_where_there_is_such_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    state = os.statvfs(tmp_path)
    assert abs(shared_memory.free() - state.f_bavail * state.f_frsize) < 0.1 * state.f_blocks * state.f_frsize
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    assert shared_memory.free() == float("inf")


# Workers that fail


FAILURES = {
    "SIGKILL": r"ended by SIGKILL while it read pets/05.png; the system does so where memory is short",
    "SIGBUS": r"ended by SIGBUS while it read pets/05.png; shared memory may be full. .*--shm-size",
    "SIGSEGV": r"ended by SIGSEGV while it read pets/05.png; a crash in the decoding",
    "SIGABRT": r"ended by SIGABRT while it read pets/05.png; a crash in the decoding",
    "exit": r"ended with exit code 3 while it read pets/05.png; its own message is above",
    "hang": r"no progress for 1 s: worker 0 \(process \d+\), which reads pets/05.png, hangs: is its file system",
    "SIGSTOP": r"no progress for 1 s: worker 0 \(process \d+\), which reads pets/05.png, was stopped by a signal",
    "few files": r"^too many open files: raise the limit \(ulimit -n 4096\)",
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_worker_that_fails_is_one_clear_error(fault, impatient):
    images = images_of(faulty(fault))
    started = time.perf_counter()
    with pytest.raises(UserError, match=FAILURES[fault]) as error:
        list(images.views(0))
    assert "\n" not in str(error.value) and time.perf_counter() - started < 50
    assert not any(worker.is_alive() for worker in images.loader.loader._iterator._workers)


def fail(*_) -> list:
    raise TypeError("a bug")


def lack_memory(*_) -> list:
    raise MemoryError


@pytest.mark.parametrize(
    "views, kind, words",
    [
        (fail, TypeError, r"in fail\n.*\n.*TypeError: a bug"),
        (
            lack_memory,
            UserError,
            r"^too little memory to read pets/\d+.png and, in its place, pets/\d+.png: take fewer",
        ),
    ],
)
def test_a_fault_in_making_views_is_none_of_the_image(views, kind, words):
    """A fault of the code keeps its traceback."""
    images = images_of(faulty(""))
    images.loader.dataset.views = views
    with pytest.raises(kind, match=words):
        list(images.views(0))


def test_a_worker_that_ends_between_epochs_is_seen():
    images = images_of(faulty(""))
    list(images.views(0))
    os.kill(images.loader.loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a data-loading worker was ended by SIGKILL; the system"):
        list(images.views(1))


def test_an_evaluation_whose_worker_ends_is_one_clear_error():
    source = faulty("SIGSEGV")
    reader = workers.Reader(source, IN_WORKERS, CPU)
    with pytest.raises(UserError, match=r"ended by SIGSEGV while it read pets/05.png"):
        list(reader.batches(torch.arange(8), functional.pil_to_tensor))


def no_views(*_) -> list:
    return []


class Unsendable(workers.TrainingViews):
    """Views whose batches cannot be pickled, so that the thread that sends them fails."""

    @staticmethod
    def collate(items: list) -> object:
        return lambda: items


def test_a_batch_that_cannot_be_sent_is_no_wait_for_ever():
    dataset = Unsendable(faulty(""), 1, no_views, 0, torch.zeros(8, 4), torch.zeros(1, dtype=torch.bool))
    with pytest.raises(UserError, match="ended with exit code 72; it could not send a batch"):
        list(loading.Loader(dataset, 2, CPU, [(0, 1)]))


def test_too_many_files_to_send_a_batch(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(loading.queues.Queue, "_on_queue_feeder_error", None)
    monkeypatch.setattr(sys, "excepthook", None)
    loading._prepare_worker(0)
    loading.queues.Queue._on_queue_feeder_error(OSError(errno.EMFILE, "Too many open files"), None)
    assert codes[0] == loading.NO_FILE and "ulimit" in loading._obituary(codes[0], None)


def test_a_worker_prints_no_traceback_where_the_run_has_ended(monkeypatch, capsys):
    """Threads of a worker that hand over shared memory meet a closed connection after Ctrl-C; other errors show."""
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(loading.queues.Queue, "_on_queue_feeder_error", None)
    loading._prepare_worker(0)
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError(), KeyError("a bug")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "KeyError: 'a bug'\n"


BLOCKED = """
from multiprocessing import forkserver, resource_tracker
from driver.data.loading import _fork_server
_fork_server()
for pid in (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid):
    status = open(f"/proc/{pid}/status").read()
    print(*(status.split(f"{name}:")[1].split()[0] for name in ("SigBlk", "SigIgn")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
@pytest.mark.slow
def test_a_schedulers_signals_do_not_reach_the_processes_behind_the_workers():
    """In a fresh process: where another test has started the resource tracker, Python does not unblock SIGTERM."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True, cwd=ROOT)
    for line in done.stdout.splitlines():
        blocked, ignored = (int(signals, 16) for signals in line.split())
        for number in StopSignal.NAMES:
            assert (blocked | ignored) >> (number - 1) & 1, (number, done.stdout)
    assert len(done.stdout.splitlines()) == 2


LEFT = """
import time
from driver.data.loading import _fork_server
if __name__ == "__main__":
    worker = _fork_server().Process(target=time.sleep, args=(120,), daemon=True)
    worker.start()
"""


@pytest.mark.slow
def test_a_worker_that_is_left_does_not_keep_a_run_from_its_end():
    """Python ends it by SIGTERM, which it blocks, and then waits for it."""
    Path("left.py").write_text(LEFT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "left.py"], env=environment, check=True, timeout=60)


def full(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")


def test_shared_memory_that_fills_up_is_an_error_of_the_worker(monkeypatch):
    """Moved there before it is queued: the error says what did not fit, and how much there is."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(shared_memory, "get_worker_info", lambda: 1)
    has_free(monkeypatch, 8192)
    with pytest.raises(UserError, match=r"no room for 2.0 MB more, 0.0 MB are free. .*--shm-size"):
        workers.LabelledImages.collate([(torch.zeros(2 * MB, dtype=torch.uint8), torch.tensor(1), [])])
    with pytest.raises(UserError, match=r"no room for 2.0 MB more"):
        workers.TrainingViews.collate([([torch.zeros(1, 2 * MB, dtype=torch.uint8)], [])])


@pytest.mark.parametrize("ranks, hangs, ends", [(2, False, True), (1, True, True), (1, False, False)])
def test_a_run_that_is_abandoned_kills_its_workers(ranks, hangs, ends, monkeypatch):
    """Workers block SIGTERM, and Python would wait for ever for one that hangs in a system call."""
    said = []
    worker = types.SimpleNamespace(kill=lambda: said.append("killed"), terminate=lambda: said.append("asked"))
    worker.join, worker.is_alive = lambda timeout: None, lambda: hangs
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: ranks > 1)
    monkeypatch.setattr(distributed.multiprocessing, "active_children", lambda: [worker])
    monkeypatch.setattr(os, "_exit", said.append)
    World(0, ranks).abandon(1)
    assert said == ["killed", 1] if ends else ["killed"]
