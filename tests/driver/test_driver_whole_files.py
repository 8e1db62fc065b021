"""Files that the driver and the library write: their names while they are written, their modes, disks that refuse."""

import errno
import os
import re
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from driver_runs import content, pretrain
from torch import nn
from videos import FRAME, two_squares, write_clip

from bam_kernels import tune, tuned, user_files
from bam_kernels.whole_files import UNFINISHED, replacing
from driver import checkpoint, cli, config, exits, export, history, linear, segment_video
from driver.config import UserError
from driver.data import inventory
from driver.distributed import World
from driver.evaluation import davis_clips
from driver.reporting import outputs

UNFINISHED_NAME = re.compile(rf"(.+){UNFINISHED}")


def state(step: int = 1) -> checkpoint.State:
    network = nn.Linear(9, 9)
    return checkpoint.State(network, None, torch.optim.SGD(network.parameters(), lr=0.1), step=step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# One name for each writer


def test_two_writers_of_one_file_have_two_names():
    with replacing(Path("a")) as first, replacing(Path("a")) as second:
        assert first != second and UNFINISHED_NAME.fullmatch(first.name)[1] == "a" and first.parent == Path()
        first.write_text("first")
        second.write_text("second")
    assert Path("a").read_text() == "first" and names(Path()) == ["a"]


def test_a_name_that_is_taken_is_not_written(monkeypatch):
    Path("precious").write_text("mine")
    Path(f"a.{'0' * 16}.writing").symlink_to("precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)
    with pytest.raises(FileExistsError), replacing(Path("a")) as temporary:
        temporary.write_text("new")
    assert Path("precious").read_text() == "mine" and not Path("a").exists()


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "x" + "ü" * 127, "\udcff" * 255, "a" * 231, "a" * 230])
def test_a_name_as_long_as_they_come(name):
    with replacing(Path(name)) as temporary:
        assert temporary.name.startswith(name[:60].replace("\udcff", ""))
        temporary.write_text("whole")
    assert Path(name).read_text() == "whole" and names(Path()) == [name]


def test_a_name_that_is_too_long_is_named():
    with pytest.raises(OSError, match=r"File name too long: 'a{256}'"), replacing(Path("a" * 256)) as temporary:
        temporary.touch()
    assert names(Path()) == []


# Modes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000], indirect=True)
def test_a_new_file_has_the_mode_of_any_new_file(umask):
    with replacing(Path("new")) as temporary:
        temporary.touch()
    user_files.write(Path("written"), "text")
    config.save(cli.parse([]), Path())
    assert {mode(Path(name)) for name in ("new", "written", config.FILE)} == {0o666 & ~umask}


@pytest.mark.parametrize("umask", [0o022], indirect=True)
@pytest.mark.parametrize("old", [0o600, 0o640, 0o666, 0o444, 0o755])
def test_a_file_keeps_the_mode_of_the_one_before(old, umask):
    """While it is written too, it is open to nobody to whom the old one was not."""
    Path("a").touch()
    Path("a").chmod(old)
    with replacing(Path("a")) as temporary:
        assert mode(temporary) & ~(old | 0o600) == 0
        temporary.write_text("new")
    assert mode(Path("a")) == old and Path("a").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022], indirect=True)
def test_a_library_that_writes_a_file_of_its_own(umask):
    """safetensors puts a private file in the place of the one that it is given."""
    pytest.importorskip("safetensors")
    directory = pretrain("--optim.epochs=1")
    out = export.export(export.Export(directory))
    assert mode(out) == 0o644
    out.chmod(0o640)
    assert mode(export.export(export.Export(directory))) == 0o640


@pytest.mark.parametrize("umask", [0o022], indirect=True)
@pytest.mark.parametrize("links", [True, False])
def test_a_kept_checkpoint_has_the_mode_of_the_checkpoint(links, umask, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(state(), {}, Path())
    Path("checkpoint.pt").chmod(0o600)
    checkpoint.save(state(2), {}, Path(), keep_last=2)
    assert {mode(Path(name)) for name in ("checkpoint.pt", "step-000000002.pt")} == {0o600}
    assert Path("checkpoint.pt").samefile("step-000000002.pt") == links


def test_a_file_system_that_keeps_no_modes(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    Path("a").touch(0o640)
    monkeypatch.setattr(os, "chmod", refuse)
    with replacing(Path("a")) as temporary:
        temporary.unlink()
        temporary.touch(0o600)
    assert mode(Path("a")) == 0o600


def test_a_checkpoint_that_is_a_link():
    """The link becomes a file, and what it led to stays."""
    Path("elsewhere").write_bytes(b"old")
    Path("checkpoint.pt").symlink_to("elsewhere")
    checkpoint.save(state(5), {}, Path())
    assert Path("elsewhere").read_bytes() == b"old" and not Path("checkpoint.pt").is_symlink()
    assert content(Path())["step"] == 5


# Disks that refuse


def write_masks() -> None:
    (clip,) = davis_clips.read_clips(Path("davis"), "val")
    segment_video.write_masks(np.zeros((6, *FRAME), np.uint8), clip, Path("out"))


def write_layers() -> None:
    heads = linear.Heads(2, 2, 1, False, World())
    linear.write(Path("out"), {"epoch": 1}, {"heads": heads}, None)


def write_page() -> None:
    record = history.History()
    record.add("train", 1, 1.0, lr=0.1)
    outputs.write_with("no images", None, record, cli.parse([]), Path("out"))


WRITERS = {
    "config.yaml": lambda: config.save(cli.parse([]), Path("out")),
    "history.jsonl": lambda: history.File(Path("out"), []),
    "images.tsv.gz": lambda: inventory.Inventory(b"training\t1\ta\n", b"").write(Path("out")),
    "checkpoint.pt": lambda: checkpoint.save(state(), {}, Path("out")),
    "dashboard.png": write_page,
    "linear.jsonl": write_layers,
    "00000.png": write_masks,
    "tuned.json": lambda: tuned.save(tuned.Tuning(), Path("out/tuned.json")),
}


def refuse_to_create(original, number: int):
    def create(path, flags, *more, **named):
        if flags & os.O_CREAT and str(path).endswith(".writing"):
            raise OSError(number, os.strerror(number), path)
        return original(path, flags, *more, **named)

    return create


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("when", ["created", "synced"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_refuses_names_the_file(name, when, number, monkeypatch):
    """The file that was there stays, and no other one is left."""

    def refuse(handle):
        raise OSError(number, os.strerror(number))

    write_clip(Path("davis"), two_squares())
    Path("out").mkdir()
    Path("out", name).write_bytes(b"old")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    if when == "created":
        monkeypatch.setattr(os, "open", refuse_to_create(os.open, number))
    else:
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises((OSError, UserError)) as raised:
        WRITERS[name]()
    text = str(raised.value) if isinstance(raised.value, UserError) else exits.about_files(raised.value)
    assert f"out/{name}" in text and os.strerror(number) in text and ".writing" not in text
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize("names", [[], ["TEMPORARY"], ["TEMPORARY", None, "there"]])
def test_an_error_names_one_file(names):
    """Whatever names the system gave: none, as from a write, one, or two, as from a renaming."""
    with pytest.raises(OSError) as error, replacing(Path("there")) as temporary:
        raise OSError(errno.ENOSPC, "Full", *(str(temporary) if name == "TEMPORARY" else name for name in names))
    assert str(error.value) == f"[Errno {errno.ENOSPC}] Full: 'there'"


def test_a_line_that_a_full_disk_has_cut_stays_alone():
    """The run ends; the file begins anew from the checkpoint's rows, and no later line joins the cut one."""
    numbers = dict.fromkeys(history.NUMBERS["train"], 0.5)
    rows = [{"kind": "train", "step": step, "epoch": 0.0, "text": "x" * 300, **numbers} for step in range(4)]
    file = history.File(Path(), rows[:1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(history.FILE).stat().st_size + 100, limits[1]))
    try:
        for write in (lambda: file(rows[1]), file.close):
            with pytest.raises(OSError, match=f"File too large: '{history.FILE}'"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Path(history.FILE).read_text().endswith("\n") and history.read(Path()).rows == rows[:1]
    file = history.File(Path(), rows[:1])
    file(rows[2])
    file.close()
    assert history.read(Path()).rows == [rows[0], rows[2]]


@pytest.mark.parametrize("before", ["", '{"epoch": 1}\n', '{"epoch": 1}\n{"epo', '{"epo'])
def test_results_of_layers_do_not_join_a_line_that_was_cut(before):
    Path("out").mkdir()
    Path("out/linear.jsonl").write_text(before)
    write_layers()
    whole = before[: before.rfind("\n") + 1]
    assert Path("out/linear.jsonl").read_text() == whole + '{"epoch": 1}\n'


def test_a_mask_that_was_interrupted_is_not_there(monkeypatch):
    def save(image, file, *_):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    write_clip(Path("davis"), two_squares())
    monkeypatch.setattr("PIL.Image.Image.save", save)
    with pytest.raises(KeyboardInterrupt):
        write_masks()
    assert names(Path("out")) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_tuning_file_that_cannot_be_written_is_one_line(late, monkeypatch, capsys):
    """The line comes before the measurement where the fault can be known."""
    pytest.importorskip("triton")
    Path("folder").mkdir()
    path = Path("tuned.json" if late else "folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.triton, "unavailable", lambda device: None)
    monkeypatch.setattr(tuned, "path", lambda: path)
    monkeypatch.setattr(tune, "tune", lambda *_: tuned.Tuning() if late else pytest.fail("measured"))
    monkeypatch.setattr(os, "open", refuse_to_create(os.open, errno.ENOSPC))
    with pytest.raises(SystemExit) as end:
        tune.main(["--shapes", "512x512x64"])
    said = capsys.readouterr().err.splitlines()[-1]
    why = "tuned.json: not written (No space left on device); what was there stays whole"
    assert said.endswith(why if late else "folder cannot be written: Is a directory") and end.value.code == 2 - late
