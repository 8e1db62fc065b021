"""A run knows its images again: the inventory of their names and sizes, and the first difference from it."""

import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from photographs import write_classes, write_images
from PIL import Image

from driver.data import inventory
from driver.data.folders import Files
from driver.data.inventory import Inventory
from driver.data.shards import Shards
from driver.data.sources import Cifar, Digits

CATS = Path("pets/cats")


def of(root: str = "pets") -> Inventory:
    return Inventory.of(Files(Path(root), 0.0))


def kept(root: str = "pets") -> dict[str, str]:
    """Write the inventory of the images to the current directory, as a run does, and return its digests."""
    before = of(root)
    before.write(Path())
    return before.digests


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: (CATS / "01.png").rename(CATS / "1b.png"), "image 1 (from 0) was cats/01.png of 9 bytes, is cats/02"),
        (lambda: (CATS / "02.png").unlink(), "image 2 (from 0) was cats/02.png of 9 bytes, is dogs/00.png of 9 bytes"),
        (lambda: (CATS / "015.png").touch(), "image 2 (from 0) was cats/02.png of 9 bytes, is cats/015.png of 0 bytes"),
        (
            lambda: (CATS / "02.png").write_bytes(bytes(4321)),
            "was cats/02.png of 9 bytes, is cats/02.png of 4,321 byte",
        ),
        (lambda: CATS.rename("pets/lions"), "image 0 (from 0) was cats/00.png of 9 bytes, is dogs/00.png of 9 bytes"),
        (lambda: CATS.rename("pets/ants"), "image 0 (from 0) was cats/00.png of 9 bytes, is ants/00.png of 9 bytes"),
        (
            lambda: Path("pets/dogs/03.png").touch(),
            "image 6 (from 0) was none, is dogs/03.png of 0 bytes; 6 training im",
        ),
        (
            lambda: Path("pets/dogs/02.png").unlink(),
            "image 5 (from 0) was dogs/02.png of 9 bytes, is none; 6 training ",
        ),
    ],
    ids="renamed removed added resized class class-before one-more one-less".split(),
)
def test_first_difference(change, message):
    for folder in ("cats", "dogs"):
        for i in range(3):
            Path("pets", folder).mkdir(parents=True, exist_ok=True)
            Path("pets", folder, f"{i:02d}.png").write_bytes(bytes(9))
    digests = kept()
    assert of().difference(digests, Path()) == ""
    change()
    assert message in of().difference(digests, Path())


def test_images_that_take_each_others_names():
    """Where their sizes differ, this is seen."""
    write_classes(Path("pets"), 2)
    (CATS / "00.png").write_bytes(bytes(7))
    digests = kept()
    for old, new in (("00", "x"), ("01", "00"), ("x", "01")):
        (CATS / f"{old}.png").rename(CATS / f"{new}.png")
    assert "training image 0 (from 0) was cats/00.png of 7 bytes, is cats/00.png of" in of().difference(digests, Path())


@pytest.mark.parametrize("part", ["train", "val"])
def test_parts_have_digests_of_their_own(part):
    write_classes(Path("pets/train"), 2)
    write_classes(Path("pets/val"), 1)
    digests = kept()
    Path(f"pets/{part}/dogs/00.png").unlink()
    found = {
        "train": "training image 2 (from 0) was train/dogs/00.png of 1,5",
        "val": "held-out image 1 (from 0) was val/dogs/00.png of",
    }
    assert of().digests["held_out" if part == "train" else "training"] in digests.values()
    assert of().difference(digests, Path()).startswith(found[part][:50])


def test_a_folder_at_another_place_is_the_same_set(monkeypatch):
    write_classes(Path("pets"), 2)
    before = of()
    assert before == of(str(Path("pets").absolute())) == of("pets/../pets/.")
    shutil.copytree("pets", "elsewhere/animals")
    Path("link").symlink_to("pets")
    assert before == of("elsewhere/animals") == of("link")
    Path("pets").rename("moved")
    assert before == of("moved")
    monkeypatch.chdir("moved")
    assert before == of(".")
    assert b"training\t%d\tcats/00.png\n" % Path("cats/00.png").stat().st_size in before.training


def test_flat_folders_and_files_behind_links():
    write_images(Path("flat"), 2)
    before = of("flat")
    Path("store").mkdir()
    Path("flat/01.png").rename("store/some-hash")
    Path("flat/01.png").symlink_to("../store/some-hash")
    assert of("flat") == before
    Path("store/some-hash").unlink()
    before.write(Path())
    gone = of("flat").difference(before.digests, Path())
    assert gone == "training image 1 (from 0) was 01.png of 1,528 bytes, is none; 2 training images then, 1 now"


def test_names_of_any_bytes():
    """A line's end, a tab and bytes that are no UTF-8 in a name; accents, composed or not, are one name."""
    Path("flat").mkdir()
    names = [b"a\nb.png", b"c\td.png", b"e\\n.png", b"f\xff.png", "z\u0301.png".encode(), b"h\r.png"]
    for name in names:
        Path("flat", os.fsdecode(name)).touch()
    digests = kept("flat")
    assert of("flat").training.count(b"\n") == len(inventory.read(Path()).training.splitlines()) == len(names)
    assert inventory.read(Path()) == of("flat")
    Path("flat", "z\u0301.png").rename(Path("flat", "\u017a.png"))
    assert of("flat").difference(digests, Path()) == ""
    Path("flat", os.fsdecode(b"f\xff.png")).unlink()
    assert "image 3 (from 0) was f\\xff.png of 0 bytes, is h\\r.png of" in of("flat").difference(digests, Path())


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_text("x")]
)
def test_without_its_list_the_digests_decide(damage):
    write_classes(Path("pets"), 2)
    digests = kept()
    damage(Path(inventory.FILE))
    assert of().difference(digests, Path()) == ""
    (CATS / "00.png").unlink()
    assert of().difference(digests, Path()) == (
        "the digest of its training images differs, and no images.tsv.gz beside it names the first other one"
    )


def test_the_list_of_other_images_names_no_difference():
    write_classes(Path("pets"), 2)
    digests = of().digests
    (CATS / "00.png").unlink()
    kept()
    (CATS / "01.png").unlink()
    assert "no images.tsv.gz beside it names" in of().difference(digests, Path())


def write_shard(path: Path, names: list[str]) -> None:
    """Tar shard of small members, each of a size of its own."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


def test_shards():
    write_shard(Path("shards/00.tar"), ["a.jpg", "b.jpg", "c.jpg"])
    write_shard(Path("shards/01.tar"), ["d.jpg"])
    before = Inventory.of(Shards(Path("shards"), 0.0))
    before.write(Path())
    shutil.copytree("shards", "moved")
    assert Inventory.of(Shards(Path("moved"), 0.0)) == before
    write_shard(Path("shards/00.tar"), ["c.jpg", "a.jpg", "b.jpg"])  # sorted by key: the order stays
    assert Inventory.of(Shards(Path("shards"), 0.0)) == before
    write_shard(Path("shards/00.tar"), ["a.jpg", "b.jpg"])
    write_shard(Path("shards/01.tar"), ["c.jpg", "d.jpg"])
    repacked = Inventory.of(Shards(Path("shards"), 0.0))
    assert "training image 2 (from 0) was 00.tar:c.jpg of 5 bytes, is 01.tar:c.jpg" in repacked.difference(
        before.digests, Path()
    )


def test_pixels_without_files():
    digits = Digits(0.25)
    before = Inventory.of(digits)
    before.write(Path())
    assert Inventory.of(Digits(0.25)) == before
    place = int(digits.train[5])
    digits.images[place, 0, 0, 0] += 1
    found = Inventory.of(digits).difference(before.digests, Path())
    assert f"training image 5 (from 0) was scikit-learn's digit {place}, pixels " in found
    cifar = object.__new__(Cifar)
    cifar.pixels = [np.zeros((3, 32, 32, 3), np.uint8), np.zeros((2, 32, 32, 3), np.uint8)]
    cifar.train, cifar.test = torch.arange(5).split([3, 2])
    before = Inventory.of(cifar)
    cifar.pixels[1][1, 0, 0, 0] = 1
    assert Inventory.of(cifar).training == before.training and Inventory.of(cifar).held_out != before.held_out
    assert cifar.entry(4)[1] == 3072 and isinstance(cifar.read(4), Image.Image)


BOMBS = {
    "zeros": bytes(50 << 20),
    "one line": b"training\t1\t" + b"a" * (50 << 20),
    "another part": b"training\t1\ta\nother\t1\ta\n",
    "no size": b"training\tmany\ta\n",
    "a size of 5000 digits": b"training\t" + b"9" * 5000 + b"\ta\n",
    "cut": b"training\t1\ta\ntraining\t1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_no_inventory_is_not_unpacked(name):
    """A small file that unpacks to much is given up at its first wrong line."""
    Path(inventory.FILE).write_bytes(gzip.compress(BOMBS[name], 1))
    tracemalloc.start()
    assert inventory.read(Path()) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_an_inventory_above_the_limit_is_not_read(monkeypatch):
    lines = b"training\t1\ta\n" * 1000
    Path(inventory.FILE).write_bytes(gzip.compress(lines))
    assert inventory.read(Path()) == Inventory(lines, b"")
    monkeypatch.setattr(inventory, "LIMIT", 5000)
    assert inventory.read(Path()) is None


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"no gzip", gzip.compress(b"training\t1\ta\n", mtime=0)[:-6]])
def test_a_damaged_inventory_names_no_image(content):
    Path(inventory.FILE).write_bytes(content)
    found = Inventory(b"training\t1\ta\n", b"").difference(Inventory(b"training\t1\tb\n", b"").digests, Path())
    assert (
        found == "the digest of its training images differs, and no images.tsv.gz beside it names the first other one"
    )
