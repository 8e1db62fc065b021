"""Places where the driver writes: directories of runs, --out, files in the way, full disks."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from driver_runs import TINY, pretrain

from bam_kernels.whole_files import replacing
from driver import cli, config, export, history, linear, report, segment_video, train
from driver import pretrain as program
from driver.config import UserError
from driver.evaluation.frozen import Backbone
from driver.exits import exit_code
from driver.reporting import plots, summary


def entries() -> set[str]:
    """Everything under the current directory."""
    return {str(path) for path in Path().rglob("*")}


def make_bad_place(kind: str) -> None:
    """Make ./runs a place where no directory can be made."""
    Path("file").touch()
    if kind == "file":
        Path("runs").touch()
    else:
        Path("runs").symlink_to({"dead link": "/nowhere/scratch", "link to a file": "file", "loop": "runs"}[kind])


BAD_PLACES = [
    ("file", "Not a directory|runs is not a folder"),
    ("link to a file", "Not a directory|runs is not a folder"),
    ("dead link", "runs is a link to /nowhere/scratch, which is not there"),
    ("loop", "runs is a link to runs, which is not there"),
]


@pytest.mark.parametrize("kind, why", BAD_PLACES)
@pytest.mark.parametrize("folder", ["runs", "runs/a/b"])
def test_bad_places(kind, why, folder):
    make_bad_place(kind)
    before = entries()
    with pytest.raises(UserError, match=f"--run.directory {folder}: {folder}/digits-001 cannot be made: ({why})"):
        train.fresh_directory("digits", Path(folder))
    with pytest.raises(UserError, match=f"--out x: {folder} cannot be written: ({why})"):
        cli.check_folder(Path(folder), "--out x")
    assert entries() == before


ERRORS = [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EACCES, errno.ENOENT, errno.ESTALE]


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("runs_exists", [True, False])
def test_a_system_that_refuses_a_directory(number, runs_exists, monkeypatch):
    """As a read-only file system, a quota or a directory that vanishes; root may write where others may not."""
    if runs_exists:
        Path("runs").mkdir()

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=f"--run.directory runs: .*{os.strerror(number)}"):
            train.fresh_directory("digits")
        with pytest.raises(UserError, match=f"--out x: runs cannot be written: {os.strerror(number)}"):
            cli.check_folder(Path("runs"), "--out x")
    assert entries() == ({"runs"} if runs_exists else set())


def test_a_folder_is_tried_without_a_trace():
    for folder in ("runs", "a/b/c", "."):
        assert cli.check_folder(Path(folder), "--out x", "linear.pt") == Path(folder)
    assert entries() == set()
    Path("a/linear.pt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--out a: a/linear.pt cannot be written: Is a directory"):
        cli.check_folder(Path("a"), "--out a", "linear.pt")
    assert entries() == {"a", "a/linear.pt"}


@pytest.mark.parametrize("name", ["a" * 201, "ü" * 101, "a\nb", "a\x9b31m", "a\0b", ""])
def test_names_that_no_directory_can_have(name):
    with pytest.raises(UserError, match=r"--run.name must"):
        pretrain(f"--run.name={name}")
    assert entries() == set()


# --run.directory


def test_a_run_in_another_folder(capsys):
    """It is found by its directory alone: the file of options does not tie further runs to the folder."""
    first = pretrain("--run.directory=some where/deep", "--optim.epochs=2", "--run.stop-after=1")
    assert first == Path("some where/deep/digits-001") and not Path("runs").exists()
    assert "directory" not in (first / config.FILE).read_text()
    said = capsys.readouterr().out
    assert said.startswith(f"{first}: ") and f"--run.resume '{first}'" in said.splitlines()[-1]
    assert train.pretrain(cli.parse([f"--run.resume={first}"])) == first
    assert history.read(first).epoch == 2
    assert train.fresh_directory("digits", Path("some where/deep")).name == "digits-002"


def test_the_next_command_keeps_the_folder():
    options = config.Config(data=config.Data(source="folder", root=Path("a")))
    record = history.History()
    record.add("train", 1, 100.0, collapse_gap=1.0, uniform_loss=1.0, source_entropy=0.0)
    _, line = summary.next_step(record, options, Path("x y/pets-001"))
    assert "--config 'x y/pets-001/config.yaml' --run.directory 'x y' --optim" in line
    _, line = summary.next_step(record, options, Path("runs/pets-001"))
    assert "--run.directory" not in line


def test_a_resumed_run_has_its_directory():
    first = pretrain("--optim.epochs=1")
    for option in (["--run.directory=b"], ["--run.directory", "b"]):
        with pytest.raises(UserError, match=f"--run.directory b: does nothing with --run.resume {first}"):
            cli.parse([f"--run.resume={first}", *option])


def test_a_file_of_options_may_name_the_folder():
    Path("few.yaml").write_text("run: {directory: elsewhere, name: über}\n", encoding="utf-8")
    run = cli.parse(["--config=few.yaml"]).run
    assert run.directory == Path("elsewhere") and run.name == "über"


# Found before long work


@pytest.mark.parametrize("kind, why", BAD_PLACES)
def test_a_run_ends_before_its_images_are_listed(kind, why, monkeypatch, capsys):
    make_bad_place(kind)
    monkeypatch.setattr(train, "make_images", lambda *_: pytest.fail("images were listed"))
    assert program.main(TINY) == 1
    assert re.fullmatch(rf"error: --run\.directory runs: .*({why})", capsys.readouterr().err.strip())


@pytest.mark.parametrize("script", ["linear", "segment_video"])
def test_out_is_tried_before_the_backbone_is_loaded(script, monkeypatch):
    make_bad_place("dead link")
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("a backbone was loaded"))
    module = {"linear": linear, "segment_video": segment_video}[script]
    needed = {"davis": Path("davis")} if script == "segment_video" else {}
    with pytest.raises(UserError, match="--out runs/x: runs/x cannot be written: runs is a link to /nowhere/scratch"):
        module.main(module.Options(out=Path("runs/x"), **needed), train.World())


@pytest.mark.parametrize(
    "out, why", [("folder", "Is a directory"), ("/dev/null", "Not a regular file"), ("no/x", "there is no folder no")]
)
def test_export_tries_out_before_the_model_is_made(out, why, monkeypatch):
    directory = pretrain("--optim.epochs=1")
    Path("folder").mkdir()
    monkeypatch.setattr(export.backbones, "make", lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(UserError, match=f"--out {out}: .*{why}"):
        export.export(export.Export(directory, out=Path(out)))


def test_a_report_is_tried_before_the_images_are_listed(monkeypatch):
    directory = pretrain("--optim.epochs=1")
    (directory / "report.html").mkdir()
    monkeypatch.setattr(report, "make_images", lambda *_: pytest.fail("images were listed"))
    with pytest.raises(UserError, match=r"report.html cannot be written: Is a directory"):
        report.main(report.Report(directory, device="cpu"), train.World())


# Errors that come later


def ends(error: Exception) -> int:
    """Exit code of a script that ends by this error."""

    def run(_):
        raise error

    return exit_code(run)


@pytest.mark.parametrize(
    "error, text",
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "error: Permission denied: 'a/b'"),
        (OSError(errno.EIO, "Input/output error", "a", None, "b"), "error: Input/output error: 'a' -> 'b'"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), "error: No usable temporary directory"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "error: Disk quota exceeded: the disk is full; a checkpoint"),
    ],
)
def test_an_error_about_a_file_is_one_line(error, text, capsys):
    assert ends(error) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(text) and "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),  # as of a socket
        OSError("libx.so: cannot open"),
        TimeoutError("gloo"),
    ],
)
def test_other_errors_of_the_system_are_not_hidden(error):
    with pytest.raises(type(error)):
        ends(error)


def test_a_current_directory_that_was_removed(capsys, monkeypatch):
    gone = Path("gone").absolute()
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exit_code(lambda _: len(os.getcwd())) == 1
    assert "the current directory has been removed" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--run.directory runs: "):
        train.fresh_directory("digits")


def test_a_full_disk_names_the_history():
    """Also at the end, when the line that found no room is tried again."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record = history.File(Path(), [])
    record.file.close()
    record.file = SimpleNamespace(name=str(Path(history.FILE)), write=len, flush=full, close=full)
    for write in (lambda: record({"kind": "train"}), record.close):
        with pytest.raises(OSError, match="No space") as error:
            write()
        assert error.value.filename == history.FILE


def test_layers_that_cannot_be_saved(monkeypatch):
    """torch's own error of a full disk is a RuntimeError."""

    def full(content, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    Path("out").mkdir()
    Path("out/linear.pt").write_bytes(b"whole")
    heads = linear.Heads(2, 2, 1, False, train.World())
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"out/linear.pt: not written .*the last good checkpoint is out/linear.pt"):
        linear.write(Path("out"), {"epoch": 1}, {"heads": heads, "optimizer": optimizer}, None)
    assert Path("out/linear.pt").read_bytes() == b"whole" and not list(Path("out").glob("*.writing"))


def test_an_export_without_room(monkeypatch):
    safetensors = pytest.importorskip("safetensors")

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    directory = pretrain("--optim.epochs=1")
    before = entries()
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"--out .*backbone.safetensors: not written .*No space left"):
        export.export(export.Export(directory))
    assert entries() == before


def test_the_title_of_a_dashboard_is_any_name():
    """Bytes that are no text, and what would be a formula to the plots."""
    record = history.History()
    record.add("train", 1, 1.0, lr=0.1)
    folder = Path("cost $\\x$ \udcfc-001")
    folder.mkdir()
    plots.dashboard(record, folder / "dashboard.png")
    assert (folder / "dashboard.png").read_bytes()[:4] == b"\x89PNG"


# Replacing


@pytest.mark.parametrize("name, number", [("folder", errno.EISDIR), ("pipe", errno.EINVAL), ("no/x", errno.ENOENT)])
def test_what_cannot_be_replaced(name, number):
    Path("folder").mkdir()
    os.mkfifo("pipe")
    before = entries()
    with pytest.raises(OSError) as error, replacing(Path(name)) as temporary:
        temporary.write_text("new")
    assert error.value.errno == number and error.value.filename.startswith(name)
    assert entries() == before


def test_a_dead_link_is_replaced():
    Path("a").symlink_to("/nowhere/a")
    with replacing(Path("a")) as temporary:
        temporary.write_text("new")
    assert not Path("a").is_symlink() and Path("a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("folder", [True, False])
def test_a_file_system_that_cannot_sync(number, folder, monkeypatch):
    """Some network file systems refuse it for folders, which is no error; for a file it is one, and names the file."""

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") == folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    Path("a").write_text("old")
    try:
        with replacing(Path("a")) as temporary:
            temporary.write_text("new")
    except OSError as error:
        assert not folder and error.errno == number and error.filename == "a"
    assert Path("a").read_text() == ("new" if folder else "old")


def test_a_disk_that_fails_is_seen(monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error: 'a'"), replacing(Path("a")) as temporary:
        temporary.write_text("new")
    assert entries() == set()
