"""The driver's checkpoints: runs broken at any step, by any means, go on as if nothing had happened."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from driver_runs import ROOT, content, pretrain

from driver import checkpoint, cli, config, exits, history, train, verify_resume
from driver import pretrain as program
from driver.config import UserError
from driver.data import inventory
from driver.verify_resume import same

PARTS = ("network", "teacher", "optimizer", "scaler", "boxes", "images", "epoch", "step", "backend")


# Broken runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KILL", "USR1"])
def test_a_broken_run_goes_on_bit_for_bit(name, monkeypatch, capsys):
    """Real processes; other steps in every test run. With a teacher and momentum schedule. Half the run is left when
    the signal is due, so that it does not matter how soon it comes.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "--model.width 4 --optim.epochs 12 --run.eval-every 0 --run.save-every 1 --model.teacher-momentum 0.9"
    assert verify_resume.verify(verify_resume.Verify(options, name, breaks=1, save_steps=3)) == 0
    assert f"equal bit for bit after SIG{name} at steps" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["breaks", "ranks", "save_steps"])
def test_breaking_a_run_less_than_once(option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be from 1 to [0-9,]+, got 0"):
        verify_resume.verify(verify_resume.Verify(**{option: 0}))


@pytest.mark.parametrize("broken, message", [(True, "NOT EQUAL: network"), (False, "NOT BROKEN")])
def test_a_run_that_differs_is_seen(broken, message, monkeypatch, capsys):
    def another_run(folder, options, ranks, stop_at, number):
        (folder / "runs/digits-001").mkdir(parents=True, exist_ok=True)
        saved = dict.fromkeys(PARTS, torch.rand(2)) | {"step": 9}
        torch.save(saved, folder / "runs/digits-001/checkpoint.pt")
        return broken

    monkeypatch.setattr(verify_resume, "run", another_run)
    assert verify_resume.verify(verify_resume.Verify(breaks=1)) == 1
    assert message in capsys.readouterr().out


def stopping_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """The process gets the signal while that step is under way."""
    original = train.follow

    def follow(*arguments):
        original(*arguments)
        stopping_at.done += 1
        if stopping_at.done == step:
            os.kill(os.getpid(), number)

    stopping_at.done = 0
    monkeypatch.setattr(train, "follow", follow)


@pytest.mark.parametrize("step", [1, 2, 3])  # within an epoch of two steps, at its end, and in the next
def test_a_signal_saves_at_the_next_step(step, monkeypatch, capsys):
    options = ["--optim.epochs=3", "--model.teacher-momentum=0.9", "--run.eval-every=0", "--data.batch-size=512"]
    options += ["--model.width=4"]
    assert program.main(options) == 0
    straight = content(Path("runs/digits-001"))
    with monkeypatch.context() as patch:
        stopping_at(patch, step)
        assert program.main(options) == exits.STOPPED == 75
    said = capsys.readouterr().err
    assert f"stopped by a signal after step {step}; --run.resume runs/digits-002 goes on from there" in said
    assert content(Path("runs/digits-002"))["step"] == step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert program.main(["--run.resume=runs/digits-002"]) == 0
    resumed = content(Path("runs/digits-002"))
    for part in PARTS:
        assert same(resumed[part], straight[part]), part


def reached(step: int, within_s: float) -> bool:
    """Whether the run under the current directory has done that step in this time."""
    deadline = time.monotonic() + within_s
    while verify_resume.steps_done(Path(), None) < step:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", exits.StopSignal.NAMES)
def test_a_signal_to_two_ranks_and_their_workers(number):
    """Every process of the job gets it, as from Slurm; the ranks agree at a log line, and the first one saves."""
    pytest.importorskip("torchvision")
    from photographs import write_images

    write_images(Path("flat"), 32)
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=4", "--model.name=convnet", "--model.width=4"]
    options += ["--optim.epochs=40000", "--run.log-every=5", "--run.save-every=40000", "--data.workers=1"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONFAULTHANDLER": "1",
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment |= {"MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "driver" / "pretrain.py"), *options],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    begun = reached(5, within_s=300)
    for rank in ranks:  # where they hang, all their threads say where
        os.killpg(rank.pid, number if begun else signal.SIGABRT)
    timer = threading.Timer(300, lambda: [os.killpg(rank.pid, signal.SIGABRT) for rank in ranks])
    timer.start()
    ends = [rank.communicate()[1] for rank in ranks]
    timer.cancel()
    assert begun and [rank.returncode for rank in ranks] == [exits.STOPPED] * 2, "\n".join(ends)
    step = content(Path("runs/flat-001"))["step"]
    assert step > 0 and f"stopped by a signal after step {step};" in ends[0]


# Disks


def test_an_interrupted_save_leaves_the_last_one(monkeypatch):
    directory = pretrain("--optim.epochs=1")
    before = (directory / checkpoint.FILE).read_bytes()

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.epochs=2"]))
    assert (directory / checkpoint.FILE).read_bytes() == before
    assert not list(directory.glob("*.writing"))


def test_a_full_disk_leaves_the_last_one():
    """A quota below the size of a checkpoint: an error that names both, and no half-written file."""
    directory = pretrain("--optim.epochs=1")
    before = (directory / checkpoint.FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint.pt: not written \(.*last good checkpoint is runs/digits-001/"):
            train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.epochs=2"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (directory / checkpoint.FILE).read_bytes() == before
    assert not list(directory.glob("*.writing"))


def test_a_full_disk_is_told_wherever_it_is_met(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "dashboard.png")

    monkeypatch.setattr(train.outputs, "write", full)
    assert program.main(["--data.batch-size=512", "--model.width=4", "--optim.epochs=1"]) == 1
    assert "No space left on device: 'dashboard.png': the disk is full" in capsys.readouterr().err
    assert content(Path("runs/digits-001"))["step"] == 2


def test_a_full_disk_leaves_the_options():
    """config.yaml is written again at every resume."""
    options = cli.parse([])
    config.save(options, Path())
    before = Path(config.FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError):
            config.save(options, Path())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_bytes()) for path in Path().iterdir()] == [(config.FILE, before)]


def test_a_full_disk_leaves_what_was_kept(monkeypatch):
    """Where a copy must do, for want of hard links."""
    directory = pretrain("--optim.epochs=2", "--run.save-every=1", "--run.keep-every=1")
    before = (directory / "epoch-0002.pt").read_bytes()

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left on device"):
        train.pretrain(cli.parse([f"--run.resume={directory}/epoch-0001.pt"]))
    assert (directory / "epoch-0002.pt").read_bytes() == before
    assert not list(directory.glob("*.writing"))


def without_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_is_on_the_disk_before_it_has_its_name(monkeypatch):
    done = []
    original = os.replace

    def replace(source, target):
        done.append(Path(target).name)
        original(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    monkeypatch.setattr(os, "replace", replace)
    pretrain("--optim.epochs=1")
    names = (config.FILE, inventory.FILE, history.FILE, checkpoint.FILE)
    assert done == [step for name in names for step in ("fsync", name, "fsync")]


# What is kept, and what is refused


@pytest.mark.parametrize("links", [True, False])
def test_the_last_and_every_nth_are_kept(links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    options = ["--optim.epochs=5", "--run.save-every=1", "--run.keep-last=2", "--run.keep-every=2"]
    directory = pretrain(*options, "--run.eval-every=0")
    names = sorted(path.name for path in directory.glob("*.pt"))
    assert names == ["checkpoint.pt", "epoch-0002.pt", "epoch-0004.pt", "step-000000008.pt", "step-000000010.pt"]
    steps = [torch.load(directory / name, weights_only=True)["step"] for name in names]
    assert steps == [10, 4, 8, 8, 10]
    last = content(directory)
    train.pretrain(cli.parse([f"--run.resume={directory}/epoch-0002.pt"]))
    assert same(content(directory)["network"], last["network"])


def test_gone_back_to_an_older_one():
    """Step files after it are of a run that is no more, whether before or after the next save; epoch files stay."""
    options = ["--optim.epochs=3", "--run.eval-every=0", "--run.save-every=1", "--run.save-steps=1"]
    directory = pretrain(*options, "--run.keep-last=3", "--run.keep-every=1")
    assert step_files(directory) == [4, 5, 6]
    train.pretrain(cli.parse([f"--run.resume={directory}/epoch-0001.pt", "--run.stop-after=2"]))
    assert step_files(directory) == [3, 4]
    (directory / "step-of-mine.pt").touch()
    train.pretrain(cli.parse([f"--run.resume={directory}/epoch-0001.pt", "--run.save-steps=0"]))
    assert step_files(directory) == [4, 6]
    assert sorted(path.name for path in directory.glob("epoch-*")) == [f"epoch-{n:04d}.pt" for n in (1, 2, 3)]
    train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.epochs=4", "--run.keep-last=1"]))
    assert step_files(directory) == [] and (directory / "step-of-mine.pt").exists()


def test_checkpoints_within_an_epoch():
    """The last step of the run is not one of them."""
    directory = pretrain("--optim.epochs=2", "--data.batch-size=256", "--run.save-steps=3", "--run.keep-last=9")
    assert step_files(directory) == [3, 6, 9, 10]


def step_files(directory: Path) -> list[int]:
    return [int(path.stem[5:]) for path in sorted(directory.glob("step-0*.pt"))]


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_momentum_given_beside_resume(name):
    if name == "lars":
        pytest.importorskip("timm")
    directory = pretrain("--optim.epochs=1", f"--optim.name={name}", "--optim.lr=0.01")
    assert [group["momentum"] for group in content(directory)["optimizer"]["param_groups"]] == [0.9, 0.9]
    train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.momentum=0.5", "--optim.epochs=2"]))
    assert [group["momentum"] for group in content(directory)["optimizer"]["param_groups"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    "write, message",
    [
        (
            lambda path: path.write_bytes(b"half"),
            "neither a checkpoint of PyTorch nor safetensors",
        ),
        (lambda path: torch.save({"state": 1}, path), "not a checkpoint of this driver: no 'config' in it"),
        (
            lambda path: path.unlink(),
            "checkpoint.pt: no such file; .* ended before its first checkpoint, start it anew",
        ),
    ],
)
def test_what_is_no_checkpoint(write, message):
    directory = pretrain("--optim.epochs=1")
    write(directory / checkpoint.FILE)
    with pytest.raises(UserError, match=message):
        train.pretrain(cli.parse([f"--run.resume={directory}"]))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: "", "config.yaml: no data.source in it; each checkpoint has a copy"),
        (lambda text: text[: text.index("neighbours")], "config.yaml: no run.neighbours in it"),
        (lambda text: text[: text.index(" name: convnet")], "config.yaml: model must be a mapping of options"),
        (lambda text: text.replace(": ", ": [", 1), "config.yaml: expected ',' or ']', but got ':', line 2"),
    ],
)
def test_damaged_options(damage, message):
    directory = pretrain("--optim.epochs=1")
    path = directory / config.FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=f"--run.resume {directory}: damaged options .*{message}"):
        cli.parse([f"--run.resume={directory}"])


def test_steps_of_another_size_are_refused():
    directory = pretrain("--optim.epochs=1")
    message = "1347 training images, 512 per step; the options give 1347 training images, 256 per step"
    with pytest.raises(UserError, match=message):
        train.pretrain(cli.parse([f"--run.resume={directory}", "--data.batch-size=256", "--virtual-batch=256"]))
