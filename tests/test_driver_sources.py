"""Where the driver's photographs come from: folders, CIFAR-10, shards; and those that cannot be read."""

import dataclasses
import io
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("kornia")
pytest.importorskip("timm")

from photographs import write_classes, write_images
from test_driver import content, elsewhere  # noqa: F401
from test_driver_photographs import PHOTOGRAPHS, make

from driver import command, config, sources, train
from driver.config import UserError
from driver.pretrain import main
from driver.world import World


def test_a_folder_with_its_own_validation_set():
    write_classes(Path("pets/train"), 5)
    write_classes(Path("pets/val"), 3)
    files = sources.Files(Path("pets"), 0.5)
    assert (len(files.train), len(files.test)) == (10, 6)
    assert files.name(10).startswith("pets/val/cats") and files.labels[files.test].tolist() == [0, 0, 0, 1, 1, 1]


def write_shards(count: int) -> None:
    """A shard for each of two classes of so many images, which are in pets/ too."""
    write_classes(Path("pets"), count)
    Path("shards").mkdir()
    for number, label in enumerate(("cats", "dogs")):
        with tarfile.open(f"shards/{number}.tar", "w") as tar:
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
    with pytest.raises(UserError, match=r"shards/1.tar: not a readable shard.*unexpected end of data"):
        sources.Shards(Path("shards"), 0.25)
    Path("shards/1.tar").unlink()
    Path("shards/2.tar").write_bytes(b"no shard" * 200)
    with pytest.raises(UserError, match=r"shards/2.tar: not a readable shard"):
        sources.Shards(Path("shards"), 0.25)
    with pytest.raises(UserError, match=r"pets: no images in its 0 .tar shards"):
        sources.Shards(Path("pets"), 0.25)


def test_a_run_on_shards_is_that_of_the_files(capsys):
    """Shared between ranks, resumed, and with a member that is no picture in one of them."""
    write_shards(9)
    shard = bytearray(Path("shards/0.tar").read_bytes())
    place = sources.Shards(Path("shards"), 0.0).places[3]
    shard[place[1] : place[1] + 40] = bytes(40)
    Path("shards/0.tar").write_bytes(shard)
    Path("pets/cats/03.png").write_bytes(b"not a picture")

    def run(source: str, root: str, *more: str) -> Path:
        options = [f"--data.source={source}", f"--data.root={root}", "--recipe=images", "--data.max-unreadable=0.2"]
        options += ["--data.size=16", "--data.batch-size=8", "--data.workers=1", "--run.eval-every=0"]
        return train.pretrain(
            command.parse([*options, "--model.name=convnet", "--model.width=4", "--optim.epochs=2", *more])
        )

    files = content(run("folder", "pets"))
    capsys.readouterr()
    broken = run("webdataset", "shards", "--run.stop-after=1")
    assert capsys.readouterr().err.count("note: shards/0.tar:cats/03.png: not a readable image (no format") == 1
    train.pretrain(command.parse([f"--run.resume={broken}"]))
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
    class Downloaded(sources.CIFAR10):
        def __init__(self, root, train, download):
            self.data = torch.randint(256, (6 if train else 4, 32, 32, 3), dtype=torch.uint8).numpy()
            self.targets = [i % 2 for i in range(len(self.data))]

    monkeypatch.setattr(sources, "CIFAR10", Downloaded)
    source = sources.make_source(config.Data(source="cifar10", root=Path("cifar")))
    assert (source.train.tolist(), source.test.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert source.read(7).size == (32, 32) and source.read(7).tobytes() == source.pixels[1][1].tobytes()

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(Downloaded, "__init__", unreachable)
    with pytest.raises(UserError, match=r"cifar: CIFAR-10 is neither there nor to be downloaded \(no route\)"):
        sources.make_source(config.Data(source="cifar10", root=Path("cifar")))


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
    for i in (3, 5, 7):
        Path(f"flat/{i:02d}.png").write_bytes(b"not a picture")
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, "--data.workers=0", "--data.max-unreadable=0.1"]) == 1
    said = capsys.readouterr().err
    assert "3 unreadable, a share above --data.max-unreadable 0.1 of 24 images" in said
    assert "Traceback" not in said
