"""WebDataset shards as a source: which files are shards, their parts, and the line on how they were understood."""

import dataclasses
import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("kornia")
pytest.importorskip("timm")

from driver_runs import content
from photographs import PHOTOGRAPHS, make, write_classes
from tars import link, picture, samples, write_tar

from driver import cli, train
from driver.config import UserError
from driver.data import sources
from driver.data.sources import Shards
from driver.distributed import World


def write_shards(count: int, name: str = "") -> None:
    """A shard for each of two classes of so many images, which are in pets/ too."""
    write_classes(Path("pets"), count)
    Path("shards").mkdir(exist_ok=True)
    for number, label in enumerate(("cats", "dogs")):
        with tarfile.open(f"shards/{name}{number}.tar", "w") as tar:
            for path in sorted(Path("pets", label).iterdir()):
                tar.add(path, arcname=f"{label}/{path.stem}.png")
                text = tarfile.TarInfo(f"{label}/{path.stem}.cls")
                text.size = 1
                tar.addfile(text, io.BytesIO(str(number).encode()))


def test_shards_hold_the_images_of_the_files():
    write_shards(4)
    files, shards = sources.Files(Path("pets"), 0.25), sources.Shards(Path("shards"), 0.25)
    assert torch.equal(files.labels, shards.labels) and torch.equal(files.test, shards.test)
    assert [shards.read(i).tobytes() for i in range(8)] == [files.read(i).tobytes() for i in range(8)]
    options = dataclasses.replace(PHOTOGRAPHS, held_out=0.0)
    of_files, of_shards = (
        next(make(dataclasses.replace(options, **change)).views(0))[0]
        for change in ({}, {"source": "webdataset", "root": Path("shards")})
    )
    assert all(map(torch.equal, of_files, of_shards))
    cut = Path("shards/1.tar").read_bytes()
    Path("shards/1.tar").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(UserError, match=r"shards/1.tar: not a readable shard.*.png has .* the shard ends at 10,240"):
        sources.Shards(Path("shards"), 0.25)
    Path("shards/1.tar").unlink()
    Path("shards/2.tar").write_bytes(b"no shard" * 200)
    with pytest.raises(UserError, match=r"shards/2.tar: not a readable shard"):
        sources.Shards(Path("shards"), 0.25)
    with pytest.raises(UserError, match=r"pets: no .tar shards in it or below it, but 8 .png; --data.source folder"):
        sources.Shards(Path("pets"), 0.25)


@pytest.mark.parametrize(
    "names, expected",
    [
        (("train-", "val-"), ("train-", "val-")),
        (("a1k-train-", "a1k-validation-", "a1k-test-"), ("a1k-train-", "a1k-validation-")),
        (("train-", "test-", "other-"), ("train-", "test-")),
    ],
)
def test_shards_with_their_own_validation_set(names, expected):
    """As of folders: the first of val and test beside train, and nothing else."""
    for count, name in enumerate(names, 3):
        write_shards(count, name)
    shards = sources.Shards(Path("shards"), 0.5)
    for part, name in zip((shards.train, shards.test), expected, strict=True):
        count = names.index(name) + 3
        assert [shards.name(i).partition(":")[0] for i in part] == [
            f"shards/{name}{n}.tar" for n in (0, 1) for _ in range(count)
        ]
        assert shards.labels[part].tolist() == [0] * count + [1] * count


@pytest.mark.parametrize("names", [("train-", "extra-"), ("val-", "pretraining-"), ("test-", "val-")])
def test_shards_of_one_kind_are_split(names):
    for name in names:
        write_shards(4, name)
    shards = sources.Shards(Path("shards"), 0.5)
    assert (len(shards.train), len(shards.test)) == (8, 8)
    assert {shards.name(i).partition("-")[0] for i in shards.test} == {f"shards/{name[:-1]}" for name in names}


@pytest.mark.slow
def test_a_run_on_shards_is_that_of_the_files(capsys):
    """Shared between ranks, resumed, and with a member that is no picture in one of them."""
    write_shards(9)
    shard = bytearray(Path("shards/0.tar").read_bytes())
    place = sources.Shards(Path("shards"), 0.0).members[3]
    shard[place[1] : place[1] + 40] = bytes(40)
    Path("shards/0.tar").write_bytes(shard)
    Path("pets/cats/03.png").write_bytes(b"not a picture")

    def run(source: str, root: str, *more: str) -> Path:
        options = [f"--data.source={source}", f"--data.root={root}", "--recipe=images", "--data.max-unreadable=0.2"]
        options += ["--data.size=16", "--data.batch-size=8", "--data.workers=1", "--run.eval-every=0"]
        return train.pretrain(
            cli.parse([*options, "--model.name=convnet", "--model.width=4", "--optim.epochs=2", *more])
        )

    files = content(run("folder", "pets"))
    capsys.readouterr()
    broken = run("webdataset", "shards", "--run.stop-after=1")
    assert capsys.readouterr().err.count("note: shards/0.tar:cats/03.png: not a readable image (no format") == 1
    train.pretrain(cli.parse([f"--run.resume={broken}"]))
    resumed = content(broken)
    assert resumed["step"] == files["step"] > 0
    assert all(torch.equal(value, resumed["network"][name]) for name, value in files["network"].items())

    options = dataclasses.replace(
        PHOTOGRAPHS, source="webdataset", root=Path("shards"), held_out=0.0, batch_size=2, max_unreadable=0.2
    )
    whole = [step[0][0] for step in make(dataclasses.replace(options, batch_size=4)).views(0)]
    ranks = [[step[0][0] for step in make(options, world=World(rank, 2)).views(0)] for rank in range(2)]
    for together, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1), together)


# Which files are shards, and their parts


@pytest.mark.parametrize(
    "paths, part",
    [
        (("train/0.tar", "val/0.tar"), "val"),
        (("Training/a/0.tar", "VALIDATION/b/0.tar"), "val"),
        (("set-TRAIN-0.tar", "set-Valid-0.tar"), "val"),
        (("train000.TAR", "testing/000.tar"), "test"),
        (("trainset-0.tar", "valset-0.tar"), "val"),
        (("pets_traindata0.tar", "pets_testdata0.tar"), "test"),
        (("petsTrain0.tar", "petsVal0.tar"), "val"),
        (("TrainSet/0.tar", "TestSet/0.tar"), "test"),
        (("test-shards/train_0.tar", "test-shards/val_0.tar"), "val"),  # the file's name comes before its folder's
    ],
)
def test_parts_by_the_names_of_files_and_folders(paths, part):
    write_tar(Path("shards", paths[0]), samples(4))
    write_tar(Path("shards", paths[1]), samples(2))
    shards = Shards(Path("shards"), 0.5)
    assert [shards.name(i).rpartition(":")[0] for i in range(6)] == [f"shards/{paths[0]}"] * 4 + [
        f"shards/{paths[1]}"
    ] * 2
    assert (shards.train.tolist(), shards.test.tolist()) == ([0, 1, 2, 3], [4, 5])
    assert f"in 2 shards, 4 to train on and 2 held out ({part})" in shards.summary


def test_shards_of_other_parts_are_counted():
    for name in ("train-0", "val-0", "test-0", "test-1", "extra-0", "trainer-0"):
        write_tar(Path("shards", f"{name}.tar"), samples(4))
    assert "left out: 2 other .tar, 2 test .tar" in Shards(Path("shards"), 0.5).summary


def test_one_file_and_links_to_shards_elsewhere():
    write_tar(Path("elsewhere/blob"), samples(4))
    Path("shards").mkdir()
    Path("shards/a.tar").symlink_to("../elsewhere/blob")
    Path("shards/again").symlink_to("../shards")
    Path("shards/._a.tar").write_bytes(b"Mac OS X")
    Path("shards/0.tar").mkdir()
    for root in ("shards", "shards/a.tar"):
        shards = Shards(Path(root), 0.5)
        assert shards.name(0) == "shards/a.tar:000.png" and len(shards.labels) == 4
        assert shards.entry(1) == ("a.tar:001.png", len(picture(1)))
    Path("shards/latest").symlink_to("train")  # comes before train in the order of names
    write_tar(Path("shards/train/0.tar"), samples(4))
    write_tar(Path("shards/val/0.tar"), samples(2))
    assert len(Shards(Path("shards"), 0.5).train) == 4
    Path("shards/b.tar").symlink_to("a.tar")
    with pytest.raises(UserError, match=r"shards/b.tar and shards/a.tar are one file; remove one of the two links"):
        Shards(Path("shards"), 0.5)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("x.tar.gz", "x.tar.gz: shards must be uncompressed .tar files, this one ends in .tar.gz; decompress it"),
        ("x.TGZ", "this one ends in .TGZ"),
        ("x.tar.zst", "this one ends in .tar.zst"),
        ("x.tar", "x.tar: compressed by gzip; shards must be uncompressed .tar files: decompress it"),
    ],
)
def test_compressed_shards_are_refused(name, wrong):
    write_tar(Path("shards/a.tar"), samples(4))
    Path("shards", name).write_bytes(gzip.compress(Path("shards/a.tar").read_bytes()))
    for root in (Path("shards"), Path("shards", name)):
        with pytest.raises(UserError) as error:
            Shards(root, 0.5)
        assert wrong in str(error.value)
    if name == "x.tar.gz":  # kept beside what came out of it
        Path("shards/a.tar").rename("shards/x.tar")
        assert len(Shards(Path("shards"), 0.5).labels) == 4


@pytest.mark.parametrize(
    "root, wrong",
    [
        ("none", "none: no such folder or .tar file; brace patterns"),
        ("empty", "empty: no .tar shards in it or below it, but nothing"),
        ("zero", "zero/0.tar: not a readable shard, an uncompressed .tar (empty file)"),
        ("broken", "broken/0.tar: not a readable shard (No such file or directory)"),
        ("texts", "texts: no images in 1 shard; left out: 1 .txt"),
        ("void", "void: no images in 1 shard"),
        ("pipe.tar", "pipe.tar: not a readable shard, since it is no file"),  # would wait for a writer for ever
    ],
)
def test_roots_without_an_image(root, wrong):
    for name in ("empty", "zero", "broken", "texts", "void"):
        Path(name).mkdir()
    Path("zero/0.tar").touch()
    os.mkfifo("pipe.tar")
    Path("broken/0.tar").symlink_to("nowhere.tar")
    write_tar(Path("texts/0.tar"), [("a.txt", b"a")])
    write_tar(Path("void/0.tar"), [])
    with pytest.raises(UserError) as error:
        Shards(Path(root), 0.5)
    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_the_summary_says_how_the_shards_were_understood():
    write_tar(Path("shards/0.tar"), [*samples(10), ("000.txt", b""), ("001.JSON", b"{}"), ("002.json", b"{}")])
    write_tar(Path("shards/1.tar"), [*samples(10, first=10), ("README", b""), ("x/._000.png", b""), ("lost.cls", b"7")])
    assert Shards(Path("shards"), 0.2).summary == (
        "shards: 20 images in 2 classes (0, 1) in 2 shards, 16 to train on and 4 held out (--data.held-out 0.2); "
        "left out: 2 .json, 1 .cls without an image, 1 .txt and 2 more"
    )


def test_held_out_shards_are_not_used_where_there_are_no_classes():
    write_tar(Path("shards/train-0.tar"), samples(4, classes=1))
    write_tar(Path("shards/val-0.tar"), samples(2))
    shards = Shards(Path("shards"), 0.2)
    assert (len(shards.train), len(shards.test)) == (4, 0)
    assert "4 to train on; the other 2 (val) are not used, as accuracies need two classes" in shards.summary


def test_classes_that_are_held_out_alone_are_named():
    write_tar(Path("shards/train-0.tar"), samples(4))
    write_tar(Path("shards/val-0.tar"), samples(3, classes=3))
    assert "; no image to train on is of 1 of the classes held out (2)" in Shards(Path("shards"), 0.2).summary


def test_a_run_on_a_shard_with_links_and_no_labels(capsys):
    """One line says how the shard was understood, and the run ends well without accuracies."""
    members = [(f"{i}.v1.png", picture(20 * i)) for i in range(6)]
    write_tar(Path("s.tar"), [*members, link("6.png", "0.v1.png"), ("0.v1.cls", b"-1"), link("7.png", "none.png")])
    options = ["--data.source=webdataset", "--data.root=s.tar", "--recipe=images", "--data.size=8"]
    options += [
        "--data.batch-size=2",
        "--data.workers=0",
        "--optim.epochs=1",
        "--model.name=convnet",
        "--model.width=2",
    ]
    train.pretrain(cli.parse(options))
    said = capsys.readouterr().out
    assert said.count("s.tar: 7 images in 1 shard, all to train on; without labels; 1 left out as a link") == 1
