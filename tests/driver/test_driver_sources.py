"""Where the driver's photographs come from: CIFAR-10, shards; and images that cannot be read."""

import dataclasses
import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("kornia")
pytest.importorskip("timm")

from driver_runs import content
from photographs import PHOTOGRAPHS, make, write_classes, write_images
from torchvision import datasets

from driver import cli, config, train
from driver.config import UserError
from driver.data import sources
from driver.distributed import World
from driver.pretrain import main


def write_shards(count: int, name: str = "", unlabelled: tuple[str, ...] = ()) -> None:
    """A shard for each of two classes of so many images, which are in pets/ too."""
    write_classes(Path("pets"), count)
    Path("shards").mkdir(exist_ok=True)
    for number, label in enumerate(("cats", "dogs")):
        with tarfile.open(f"shards/{name}{number}.tar", "w") as tar:
            for path in sorted(Path("pets", label).iterdir()):
                tar.add(path, arcname=f"{label}/{path.stem}.png")
                if f"{label}/{path.stem}" in unlabelled:
                    continue
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
    with pytest.raises(UserError, match=r"shards/1.tar: not a readable shard.*unexpected end of data"):
        sources.Shards(Path("shards"), 0.25)
    Path("shards/1.tar").unlink()
    Path("shards/2.tar").write_bytes(b"no shard" * 200)
    with pytest.raises(UserError, match=r"shards/2.tar: not a readable shard"):
        sources.Shards(Path("shards"), 0.25)
    with pytest.raises(UserError, match=r"pets: no images in its 0 .tar shards"):
        sources.Shards(Path("pets"), 0.25)


def test_a_label_that_is_missing_among_others_is_an_error():
    write_shards(4, unlabelled=("dogs/01", "dogs/03"))
    with pytest.raises(UserError, match=r"shards/1.tar:dogs/01.png: no .cls beside it, as other images have"):
        sources.Shards(Path("shards"), 0.25)
    write_shards(4, unlabelled=tuple(f"{label}/{i:02d}" for label in ("cats", "dogs") for i in range(4)))
    shards = sources.Shards(Path("shards"), 0.25)
    assert shards.labels.tolist() == [0] * 8 and (len(shards.train), len(shards.test)) == (8, 0)


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


def test_cifar10_keeps_its_test_set(monkeypatch):
    class Downloaded(datasets.CIFAR10):
        def __init__(self, root, train, download):
            self.data = torch.randint(256, (6 if train else 4, 32, 32, 3), dtype=torch.uint8).numpy()
            self.targets = [i % 2 for i in range(len(self.data))]

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    source = sources.make_source(config.Data(source="cifar10", root=Path("cifar")))
    assert (source.train.tolist(), source.test.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert source.read(7).size == (32, 32) and source.read(7).tobytes() == source.pixels[1][1].tobytes()

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(Downloaded, "__init__", unreachable)
    with pytest.raises(UserError, match=r"cifar: CIFAR-10 is neither there nor to be downloaded \(no route\)"):
        sources.make_source(config.Data(source="cifar10", root=Path("cifar")))


def test_cifar10_is_downloaded_once_by_ranks_that_begin_together(monkeypatch):
    """A lock is its open file's, of a thread as of a process. The stand-in is slow to write and reads what is there."""
    downloads = []

    class Downloaded(datasets.CIFAR10):
        def __init__(self, root, train, download):
            file = Path(root, "batch")
            whole = file.exists() and file.read_text() == "whole"
            if download and not whole:
                downloads.append(root)
                file.write_text("wh")
                time.sleep(0.3)
                file.write_text("whole")
            elif not whole:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy(), [0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(sources.Cifar, [Path("new/cifar")] * 4))
    assert downloads == ["new/cifar"] and all(len(source.labels) == 4 for source in found)
    # What is there is read from a disk that takes no lock file.
    Path("new/cifar/cifar10.lock").unlink()
    sources.Cifar(Path("new/cifar"))
    assert not Path("new/cifar/cifar10.lock").exists() and len(downloads) == 1


# Images that cannot be read


@pytest.mark.parametrize("more", [["--data.workers=1"], ["--data.on-device=True", "--data.workers=0"]])
def test_a_few_unreadable_images_are_named_once_and_replaced(more, capsys):
    write_images(Path("flat"), 24)
    Path("flat/03.png").write_bytes(b"not a picture")
    Path("flat/05.png").write_bytes(Path("flat/06.png").read_bytes()[:300])  # cut short
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, *more, "--optim.epochs=3", "--data.max-unreadable=0.1"]) == 0
    said = capsys.readouterr().err
    for name in ("03", "05"):
        assert said.count(f"note: flat/{name}.png: not a readable image") == 1
    assert "another takes its place (2 so far)" in said
    assert content(Path("runs/flat-001"))["step"] == 9


def test_too_many_unreadable_images_end_the_run(capsys):
    write_images(Path("flat"), 24)
    for i in range(3, 10):
        Path(f"flat/{i:02d}.png").write_bytes(b"not a picture")
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, "--data.workers=0", "--data.max-unreadable=0.1"]) == 1
    said = capsys.readouterr().err
    assert "7 unreadable, a share above --data.max-unreadable 0.1 of 24 images" in said
    assert "Traceback" not in said
