"""Kept verdicts: damaged and hostile files, homes that cannot be written, and the lock."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bam_kernels import tuned, user_files
from bam_kernels.verification import store
from bam_kernels.verification.store import Lock, Verdict

HERE = {"gpu": "Stand-in H100", "torch": "2.11.0"}
FAILED = Verdict("failed", "wrong", 1.5, "2026-11-27 04:00:00", "last\nlines é\U0001f600")
VERIFIED = Verdict("verified", "", 2, "2026-11-27 05:00:00")


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """The cache folder; temporary files are beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


def block(folder: Path) -> None:
    """Let nobody, root included, make a folder here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def test_kept_beside_others_and_only_for_this_identity(home):
    assert store.load(HERE) == {} and not list((home.parent / "tmp").iterdir())
    file = store.save(HERE, {"cuda": FAILED, "flash": Verdict("unknown", "no memory")})
    assert file.is_relative_to(home / "bam_kernels" / "verdicts")
    assert store.save(HERE, {"triton": VERIFIED}) == file
    assert store.load(HERE) == {"cuda": FAILED, "triton": VERIFIED}
    assert store.load(HERE | {"torch": "2.12.0"}) == store.load(HERE | {"driver": "1"}) == {}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_unknown_is_not_kept_and_takes_nothing_away(home):
    assert store.save(HERE, {"cuda": Verdict("unknown", "no memory")}) is None
    assert not home.exists()
    store.save(HERE, {"cuda": VERIFIED})
    assert store.save(HERE, {"cuda": Verdict("unknown", "no memory")}) is None
    assert store.load(HERE) == {"cuda": VERIFIED}


def test_a_new_verdict_takes_the_place_of_a_kept_one(home):
    store.save(HERE, {"cuda": VERIFIED})
    store.save(HERE, {"cuda": FAILED})
    assert store.load(HERE) == {"cuda": FAILED}


def damaged(change) -> bytes:
    plain = json.loads(store._encode(HERE, {"cuda": FAILED, "triton": VERIFIED}))
    change(plain)
    return json.dumps(plain).encode()


def field(name: str, value: object):
    return lambda plain: plain["verdicts"]["cuda"].update({name: value})


DAMAGED = {
    "empty": b"",
    "truncated": store._encode(HERE, {"cuda": FAILED})[:-9].encode(),
    "nested": b"[" * 200_000,
    "number": b"5",
    "long number": b"9" * 10_000,
    "not UTF-8": b'{"identity": "\xff"}',
    "binary": bytes(range(256)) * 10,
    "large": damaged(field("output", "x" * store.MOST_BYTES)),
    "another identity": damaged(lambda plain: plain["identity"].update(torch="2.12.0")),
    "more identity": damaged(lambda plain: plain["identity"].update(more="1")),
    "no verdicts": damaged(lambda plain: plain.pop("verdicts")),
    "list of verdicts": damaged(lambda plain: plain.update(verdicts=[1])),
    "unknown way": damaged(lambda plain: plain["verdicts"].update(vulkan={"status": "verified"})),
    "way of the CPU": damaged(lambda plain: plain["verdicts"].update(cpu={"status": "verified"})),
    "unknown status": damaged(field("status", "fine")),
    "status that is not kept": damaged(field("status", "unknown")),
    "list for a status": damaged(field("status", [])),
    "number for a reason": damaged(field("reason", 5)),
    "null for an output": damaged(field("output", None)),
    "list for a date": damaged(field("date", [])),
    "text for seconds": damaged(field("seconds", "x")),
    "number in a text for seconds": damaged(field("seconds", "1.0")),
    "NaN": damaged(field("seconds", float("nan"))),
    "infinity": damaged(field("seconds", float("inf"))),
    "large integer": damaged(field("seconds", 10**400)),
    "negative": damaged(field("seconds", -1)),
    "another field": damaged(field("more", 1)),
    "no status": damaged(lambda plain: plain["verdicts"]["cuda"].pop("status")),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_counts_as_none_and_is_replaced(home, content):
    file = store.save(HERE, {"cuda": VERIFIED})
    file.write_bytes(content)
    assert store.load(HERE) == {}
    assert store.save(HERE, {"flash": VERIFIED}) == file
    assert store.load(HERE) == {"flash": VERIFIED}


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself", "device"])
def test_what_is_no_file(home, kind):
    file = store.save(HERE, {"cuda": VERIFIED})
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "link to itself": file}.get(kind, "nothing"))
    before = descriptors()
    assert store.load(HERE) == {}
    assert descriptors() == before
    kept = store.save(HERE, {"cuda": VERIFIED})
    assert kept.is_relative_to(tempfile.tempdir if kind == "folder" else home)
    assert store.load(HERE) == {"cuda": VERIFIED}


@pytest.mark.parametrize("home_of", ["a file", "relative", "no home", "relative home"])
def test_where_verdicts_go_without_a_writable_cache_folder(home, monkeypatch, home_of):
    monkeypatch.chdir(home.parent)
    if home_of == "a file":
        block(home)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        monkeypatch.setenv("HOME", "relative" if home_of == "relative home" else str(home / "own"))
    if home_of == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    file = store.save(HERE, {"cuda": VERIFIED})
    folder = home / "own" / ".cache" if home_of == "relative" else Path(tempfile.gettempdir())
    assert file.is_relative_to(folder) and store.load(HERE) == {"cuda": VERIFIED}
    assert not home.is_dir() or sorted(home.iterdir()) == [home / "own"]


def test_the_latest_counts_where_the_home_has_become_read_only(home):
    kept = store.save(HERE, {"cuda": FAILED, "triton": FAILED})
    (user_files.private_folder() / kept.name).write_text(store._encode(HERE, {"cuda": VERIFIED, "flash": VERIFIED}))
    assert store.load(HERE) == {"cuda": VERIFIED, "triton": FAILED, "flash": VERIFIED}
    (user_files.private_folder() / kept.name).write_text(store._encode(HERE, {"cuda": replace(VERIFIED, date="")}))
    assert store.load(HERE) == {"cuda": FAILED, "triton": FAILED}


def test_nothing_can_be_kept(home, monkeypatch):
    block(home)
    block(Path(tempfile.tempdir) / f"bam_kernels-{os.getuid()}")
    assert store.save(HERE, {"cuda": VERIFIED}) is None and store.load(HERE) == {}
    with Lock(HERE) as lock:
        lock.tell({"cuda": VERIFIED})
        lock.touch()
        assert lock.acquire() and lock.wait(0) == {}


def test_a_failed_write_leaves_the_old_file(home, monkeypatch):
    file = store.save(HERE, {"cuda": VERIFIED})

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert store.save(HERE, {"cuda": FAILED}) is None
    assert store.load(HERE) == {"cuda": VERIFIED} and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    "fault", ["missing", "file", "link", "writable by others", "another user's", "no temporary folder"]
)
def test_private_folder(monkeypatch, tmp_path, fault):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"bam_kernels-{os.getuid()}"
    if fault == "missing":
        assert user_files.private_folder() == user_files.private_folder() == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        return
    if fault == "file":
        folder.write_text("")
    elif fault == "link":
        (tmp_path / "other").mkdir()
        folder.symlink_to(tmp_path / "other")
    elif fault == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "another user's":
        folder.mkdir(0o700)
        monkeypatch.setattr(os, "getuid", lambda: folder.parent.stat().st_uid + 1)
        folder.rename(tmp_path / f"bam_kernels-{os.getuid()}")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="No such file" if fault == "no temporary folder" else "only this user can write"):
        user_files.private_folder()


def test_tuning_of_a_user_without_a_home(monkeypatch, gpu):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    monkeypatch.delenv(tuned.FILE, raising=False)
    assert tuned.path() is None


def test_one_holds_the_lock(home):
    with Lock(HERE) as first, Lock(HERE) as second, Lock(HERE | {"gpu": "another"}) as third:
        assert first.acquire() and not second.acquire() and third.acquire()
        first.release()
        assert second.acquire()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_lock_file_that_is_no_file(home, kind):
    with Lock(HERE):
        pass
    (file,) = (home / "bam_kernels" / "verdicts").glob("*.lock")
    file.unlink()
    file.mkdir() if kind == "folder" else file.symlink_to("other")
    with Lock(HERE) as first, Lock(HERE) as second:
        assert first.acquire() and not second.acquire()
    assert list(user_files.private_folder().glob("*.lock"))


def test_a_process_forked_meanwhile_does_not_hold_the_lock(home):
    with Lock(HERE) as lock, Lock(HERE) as other:
        assert lock.acquire()
        child = os.fork()
        if child == 0:
            time.sleep(1000)
            os._exit(0)
        try:
            lock.release()
            assert other.acquire()
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_waiting_ends_unless_the_holder_touches_the_lock(home, monkeypatch):
    monkeypatch.setattr(store, "TOUCH_S", 0.0)
    monkeypatch.setattr(store, "POLL_S", 0.02)
    with Lock(HERE) as holder, Lock(HERE) as waiting:
        holder.acquire()
        begin = time.monotonic()
        assert waiting.wait(0.2) is None
        assert 0.2 < time.monotonic() - begin < 3
        touches = threading.Thread(target=lambda: [(time.sleep(0.1), holder.touch()) for _ in range(8)])
        touches.start()
        begin = time.monotonic()
        assert waiting.wait(0.5) is None
        assert 1.0 < time.monotonic() - begin < 5
        touches.join()


def test_waiting_for_a_lock_that_a_file_server_has_lost(home, monkeypatch):
    def stale(handle: int) -> None:
        raise OSError(116, "Stale file handle")

    with Lock(HERE) as holder, Lock(HERE) as waiting:
        holder.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            told = waiting.wait(0.1)
    assert told is None


def test_touching_is_cheap(home, monkeypatch):
    touched = []
    monkeypatch.setattr(os, "utime", touched.append)
    with Lock(HERE) as lock:
        for _ in range(100):
            lock.touch()
    assert len(touched) == 1


@pytest.mark.parametrize("told", ["verdicts", "nothing", "half"])
def test_who_waits_gets_what_the_holder_tells(home, told):
    unknown = Verdict("unknown", "no memory", 3.0, "2026-11-27 06:00:00")
    found = {"cuda": unknown, "triton": VERIFIED}
    with Lock(HERE) as holder, Lock(HERE) as waiting:
        holder.acquire()
        holder.tell({"cuda": FAILED})  # of an earlier trial

        def end() -> None:
            if told == "verdicts":
                holder.tell(found)
            elif told == "half":
                os.ftruncate(holder._handle, 20)
            holder.release()

        timer = threading.Timer(0.3, end)
        timer.start()
        assert waiting.wait(5) == (found if told == "verdicts" else {})
        timer.join()


def test_a_killed_holder_frees_the_lock_and_leaves_no_half_file(home):
    program = f"""
import sys, time
from pathlib import Path
import bam_kernels.user_files as files
files.os.replace = lambda *_: (print("writing", flush=True), time.sleep(1000))
from bam_kernels.verification import store
here = {HERE!r}
with store.Lock(here) as lock:
    assert lock.acquire()
    store.save(here, {{"cuda": store.Verdict("verified")}})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        with Lock(HERE) as lock:
            assert not lock.acquire()
            process.kill()
            assert lock.wait(5) == {}
        assert store.load(HERE) == {} and store.save(HERE, {"cuda": VERIFIED})
    finally:
        process.kill()
        process.communicate()


def test_size_of_what_is_read(tmp_path):
    file = tmp_path / "file"
    file.write_text("0123456789")
    assert user_files.read(file, 10) == "0123456789"
    with pytest.raises(OSError, match="is not a plain file of at most 9 bytes"):
        user_files.read(file, 9)
