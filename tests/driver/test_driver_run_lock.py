"""One process at a time trains a run: its lock, and what a killed process leaves behind."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driver_runs import ROOT, TINY, content, pretrain, torchrun

from driver import checkpoint, cli, files, history, train
from driver import pretrain as program
from driver.config import UserError
from driver.files import LOCK, RunLock, remove_unfinished

BUSY = "another process is at work on this run"
HERE = socket.gethostname()


@pytest.fixture
def run() -> Path:
    """Directory of a run in which nobody is at work."""
    Path("run").mkdir()
    return Path("run")


def refused(directory: Path) -> str:
    """Message of the error by which a second holder is refused; "" where it is not."""
    try:
        with RunLock() as second:
            second.take(directory)
    except UserError as error:
        return str(error)
    return ""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Runs


def test_a_run_is_locked_from_before_its_images_are_listed_to_its_report(monkeypatch):
    """A new run as soon as it has a directory, and a resumed one; both are free at the end."""
    directory, seen = Path("runs/digits-001"), []

    def see(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: (seen.append((name, bool(refused(directory)))), original(*a))[1])

    see(checkpoint, "save")
    see(train.outputs, "write")
    assert pretrain("--optim.epochs=1") == directory
    assert refused(directory) == ""
    assert seen == [("save", True), ("write", True)]
    see(train, "make_images")
    see(checkpoint, "load")
    seen.clear()
    train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.epochs=2"]))
    assert seen == [(name, True) for name in ("make_images", "load", "save", "write")]
    assert refused(directory) == "" and LOCK not in names(directory)


def test_a_second_process_is_refused_at_once(monkeypatch, capsys):
    directory = pretrain("--optim.epochs=1")
    monkeypatch.setattr(train, "make_images", lambda *_: pytest.fail("images were listed"))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with RunLock() as holder:
        assert holder.take(directory)
        capsys.readouterr()
        for resume in (directory, directory / checkpoint.FILE):
            assert program.main([f"--run.resume={resume}", "--optim.epochs=2"]) == 1
            said = capsys.readouterr().err.strip()
            assert said == (
                f"error: {directory}: {BUSY} (process {os.getpid()} on {HERE}). Wait for its end, or end it; "
                "or start a new run, without --run.resume"
            )
        assert refused(directory) != ""  # to refuse one process does not free the lock
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_a_run_that_fails_is_free(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train.Training, "epoch", fail)
    with pytest.raises(error):
        pretrain("--optim.epochs=1")
    assert refused(Path("runs/digits-001")) == "" and LOCK not in names(Path("runs/digits-001"))


HOLD = """
import subprocess, sys, time
from pathlib import Path
from driver.files import RunLock
lock = RunLock()
assert lock.take(Path("run"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_holder_frees_the_lock_though_its_children_live(run):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment)
    child = int(holder.stdout.readline())
    try:
        assert f"{BUSY} (process {holder.pid} on {HERE})." in refused(run)
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        assert names(run) == [LOCK] and refused(run) == ""
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def family(process: int) -> set[int]:
    """Ids of a process and of all that descend from it."""
    found = {process}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        found |= family(int(child))
    return found


@pytest.mark.slow
def test_data_workers_do_not_hold_the_lock():
    """A run of real processes is killed, and resumed at once while its workers may still be there."""
    pytest.importorskip("torchvision")
    from photographs import write_images

    write_images(Path("flat"), 32)
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=4", "--model.name=convnet", "--model.width=4"]
    options += ["--optim.epochs=40000", "--run.log-every=1", "--run.save-steps=1", "--data.workers=2"]
    command = [sys.executable, str(ROOT / "driver/pretrain.py"), *options]
    directory = Path("runs/flat-001")
    with open("said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            until = time.monotonic() + 120
            while not (directory / checkpoint.FILE).is_file():
                assert process.poll() is None and time.monotonic() < until, Path("said").read_text()
                time.sleep(0.1)
            assert f"{BUSY} (process {process.pid} on {HERE})." in refused(directory)
            everyone = family(process.pid)
            assert len(everyone) >= 4  # the run, the server that starts workers, and two workers
            inode = (directory / LOCK).stat().st_ino
            holders = {
                member
                for member in everyone
                for handle in Path(f"/proc/{member}/fd").iterdir()
                if handle.exists() and handle.stat().st_ino == inode
            }
            assert holders == {process.pid}
            process.kill()
            process.wait()
            assert refused(directory) == ""
        finally:
            process.kill()
    epochs = content(directory)["epoch"] + 1
    assert program.main([f"--run.resume={directory}", f"--optim.epochs={epochs}", "--run.eval-every=0"]) == 0


@pytest.mark.slow
def test_ranks_are_refused_in_one_message():
    directory = pretrain("--optim.epochs=1", "--virtual-batch=512")
    with RunLock() as holder:
        holder.take(directory)
        found = torchrun(2, f"--run.resume={directory}", "--data.batch-size=256", "--optim.epochs=2")
    assert found.returncode == 1 and found.stderr.count(BUSY) == 1
    assert "driver/train.py" not in found.stderr  # no rank left a traceback


# The lock's file


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"process 12",
        b"process 0 on here\n",
        b"process 12345678 on here\n",
        b"process 12 on \x1b[31mred\n",
        b"process 12 on two words\n",
        b"process 12 on here\nprocess 13 on there\n",
        b"\0" * 10**6,
        b"process 4194305 on " + HERE.encode() + b"\n",  # more than Linux gives: a process that is dead
    ],
)
def test_a_holder_that_is_not_plausible_is_not_shown(text, run):
    with RunLock() as holder:
        holder.take(run)
        (run / LOCK).write_bytes(text)
        assert f"{BUSY}. Wait" in refused(run)


def test_a_holder_on_another_machine_is_shown(run):
    with RunLock() as holder:
        holder.take(run)
        (run / LOCK).write_text("process 12 on node-7.cluster\n")
        assert f"{BUSY} (process 12 on node-7.cluster). Wait" in refused(run)


def test_a_stale_file_does_not_block(run):
    (run / LOCK).write_text("process 1 on elsewhere, and much more text than a holder would write\n")
    with RunLock() as holder:
        assert holder.take(run)
        assert (run / LOCK).read_text() == f"process {os.getpid()} on {HERE}\n"


def test_a_lock_that_is_a_link_leads_nowhere(run):
    Path("precious").write_text("mine")
    (run / LOCK).symlink_to(Path("precious").absolute())
    with pytest.raises(OSError, match=r"run/run\.lock"), RunLock() as holder:
        holder.take(run)
    assert Path("precious").read_text() == "mine"


@pytest.mark.parametrize("what", [os.mkdir, os.mkfifo])
def test_what_is_no_lock_is_named(what):
    directory = pretrain("--optim.epochs=1")
    what(directory / LOCK)
    with pytest.raises(UserError, match=f"--run.resume {directory}: {directory}/run.lock cannot be written"):
        train.pretrain(cli.parse([f"--run.resume={directory}"]))


def test_the_file_of_another_user_is_locked_too(run, monkeypatch):
    """In a directory that users share, a second one may read the first one's lock, and not write it."""
    original = os.open

    def read_only(path, flags, *more, **named):
        if str(path).endswith(LOCK) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path, flags, *more, **named)

    with RunLock() as holder:
        assert holder.take(run)
        monkeypatch.setattr(os, "open", read_only)
        assert BUSY in refused(run)
    (run / LOCK).touch()
    with RunLock() as holder:
        assert holder.take(run) and BUSY in refused(run)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(number, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    directory = pretrain("--optim.epochs=1")
    assert train.pretrain(cli.parse([f"--run.resume={directory}", "--optim.epochs=2"])) == directory
    said = capsys.readouterr().out
    assert said.count(f"note: {directory}: no locks there ({os.strerror(number)})") == 2
    assert content(directory)["epoch"] == 2


@pytest.mark.parametrize(
    "number, message", [(errno.EIO, "Input/output error: 'run'"), (errno.EACCES, BUSY), (errno.EAGAIN, BUSY)]
)
def test_other_errors_of_a_lock(number, message, run, monkeypatch):
    """Some file systems say EACCES where another process holds the lock."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises((OSError, UserError), match=message), RunLock() as holder:
        holder.take(run)


# Removed under way


def test_a_file_that_is_removed_while_it_is_locked_is_not_the_lock(run, monkeypatch):
    """A holder that ends removes its file. Who has opened that file before must lock the one at its path."""
    original, calls = fcntl.flock, []

    def flock(file, flags):
        calls.append(flags)
        if len(calls) == 1:
            (run / LOCK).unlink()
        original(file, flags)

    with RunLock() as holder:
        monkeypatch.setattr(fcntl, "flock", flock)
        assert holder.take(run)
        assert len(calls) == 2 and BUSY in refused(run)


def test_a_lock_whose_file_was_removed_is_taken_anew(run):
    with RunLock() as holder, RunLock() as other:
        holder.take(run)
        (run / LOCK).unlink()
        holder.keep()
        assert BUSY in refused(run)
        (run / LOCK).unlink()
        other.take(run)
        with pytest.raises(UserError, match=BUSY):
            holder.keep()
        holder.release()
        assert BUSY in refused(run)  # what another process holds is not removed
        other.keep()


def save_after(monkeypatch, change) -> None:
    """Runs make this change before their next checkpoint is saved."""
    original = train.Training.save

    def save(self):
        change()
        original(self)

    monkeypatch.setattr(train.Training, "save", save)


def test_a_directory_that_is_removed_is_named(monkeypatch, capsys):
    save_after(monkeypatch, lambda: Path("runs/digits-001").rename("away"))
    assert program.main([*TINY, "--optim.epochs=1"]) == 1
    said = capsys.readouterr().err
    assert "error: runs/digits-001/checkpoint.pt: not written" in said and "Traceback" not in said
    assert "runs/digits-001: No such file or directory); no checkpoint was written yet" in said


def test_a_directory_that_another_run_has_taken_is_left_alone(monkeypatch, capsys):
    other = RunLock()

    def take() -> None:
        Path("runs/digits-001").rename("away")
        Path("runs/digits-001").mkdir()
        other.take(Path("runs/digits-001"))

    save_after(monkeypatch, take)
    with other:
        assert program.main([*TINY, "--optim.epochs=1"]) == 1
        assert f"error: runs/digits-001: {BUSY}" in capsys.readouterr().err
        assert names(Path("runs/digits-001")) == [LOCK]


# What is left behind


def unfinished(name: str, size: int = 7, age_s: float = 0.0, code: str = ".0123456789abcdef") -> str:
    path = Path("runs/digits-001", f"{name}{code}.writing")
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age_s,) * 2)
    return path.name


OWN = ["checkpoint.pt", "step-000000012.pt", "epoch-0003.pt", "epoch-12345.pt", "config.yaml", history.FILE]
OTHERS = ["report.html", "dashboard.png", "backbone.safetensors", "step-1.pt", "my checkpoint.pt", "a\nb"]
DAY_S = 24 * 60 * 60


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(capsys):
    directory = pretrain("--optim.epochs=1")
    before = names(directory)
    for name in (*OWN, "images.tsv.gz"):
        unfinished(name)
        unfinished(name, code="")  # of an older version, which had one name for all
    for name in OTHERS:
        unfinished(name, age_s=DAY_S + 60)
    young = [unfinished(name, age_s=DAY_S - 60, code=".fedcba9876543210") for name in OTHERS]
    mine = [unfinished(name, age_s=9 * DAY_S, code="") for name in OTHERS]
    mine += [unfinished(name, age_s=9 * DAY_S, code=".0123") for name in ("checkpoint.pt", "report.html")]
    Path("precious").write_text("mine")
    (directory / "checkpoint.pt.aaaaaaaaaaaaaaaa.writing").symlink_to("../../precious")
    (directory / "epoch-0001.pt.writing").mkdir()
    kept = ["checkpoint.pt.aaaaaaaaaaaaaaaa.writing", "epoch-0001.pt.writing"]
    capsys.readouterr()
    train.pretrain(cli.parse([f"--run.resume={directory}"]))
    note = f"note: {directory}: removed 20 files that were being written when a process was killed, 140 bytes\n"
    assert capsys.readouterr().out.count(note) == 1
    assert names(directory) == sorted([*before, *young, *mine, *kept]) and Path("precious").read_text() == "mine"


def test_without_a_lock_only_old_files_are_removed(capsys):
    """Another process may be writing the younger files."""
    Path("runs/digits-001").mkdir(parents=True)
    young = unfinished("checkpoint.pt", age_s=DAY_S - 60)
    unfinished("checkpoint.pt", age_s=DAY_S + 60, size=1234, code="")
    remove_unfinished(Path("runs/digits-001"), train.OWN_FILES, at_once=False)
    assert names(Path("runs/digits-001")) == [young]
    assert "removed 1 file that was being written when a process was killed, 1,234 bytes" in capsys.readouterr().out


def test_nothing_is_said_where_nothing_is_left(run, capsys):
    remove_unfinished(run, train.OWN_FILES, at_once=True)
    assert capsys.readouterr().out == "" and files.OLD_S == DAY_S
