"""Images that the driver cannot read: which faults count, what is said, how many end a run, what takes their place."""

import io
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import write_classes, write_images
from PIL import Image, UnidentifiedImageError

from driver import cli, config, knn
from driver.config import UserError
from driver.data import labelled, unreadable
from driver.data.decode import FORMATS, Decoder
from driver.data.images import Source
from driver.data.sources import make_source
from driver.data.unreadable import Tally, fault_of, read
from driver.data.workers import LabelledImages
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.pretrain import main


class Faulty(Source):
    """A source whose first images raise exceptions; image i of the others is filled with i."""

    def __init__(self, faults: list[Exception], count: int) -> None:
        self.faults, self.labels = faults, torch.arange(count)
        self.train, self.test = self.labels, self.labels[:0]

    def read(self, index: int) -> torch.Tensor:
        if index < len(self.faults):
            raise self.faults[index]
        return torch.full((3, 2, 2), float(index))

    def name(self, index: int) -> str:
        return f"image {index}"


FAULTS = [
    (OSError("image file is truncated"), "image file is truncated"),
    (ValueError("two\n  lines of <_io.BytesIO object at 0x7f00> here"), "two lines of _io.BytesIO here"),
    (UnidentifiedImageError("an empty file"), "an empty file"),
    (RuntimeError("Failed to decode frame 0"), "RuntimeError Failed to decode frame 0"),
    (KeyError(65), "KeyError 65"),
    (IndexError(), "IndexError"),
    (struct.error("unpack requires 4 bytes"), "error unpack requires 4 bytes"),
    (OverflowError("too large"), "OverflowError too large"),
    (MemoryError(), "MemoryError"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError division by zero"),
    (TypeError("no number"), "TypeError no number"),
    (zlib.error("Error -3"), "error Error -3"),
    (Image.DecompressionBombError("Image size"), "DecompressionBombError Image size"),
    (OSError(), "OSError"),
]


@pytest.mark.parametrize("fault, words", FAULTS, ids=[type(fault).__name__ for fault, _ in FAULTS])
def test_any_exception_makes_an_image_unreadable(fault, words):
    index, pixels, reports = read(Faulty([fault], 5), list(range(5)), 0)
    assert index > 0 and (pixels == index).all()
    assert reports[0][0] == 0 and reports[0][1].startswith(words) and "0x" not in reports[0][1]


def test_errors_of_the_user_and_signals_are_not_faults_of_an_image():
    with pytest.raises(UserError, match="shard is gone"):
        read(Faulty([UserError("shard is gone")], 5), list(range(5)), 0)
    with pytest.raises(KeyboardInterrupt):
        read(Faulty([KeyboardInterrupt()], 5), list(range(5)), 0)


def test_long_faults_are_cut():
    assert fault_of(ValueError("x" * 5000)) == "x" * unreadable.LONGEST


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_unreadable(kind):
    """Bytes changed, removed and added, and files cut short: nothing but exceptions that `read` takes, and RGB."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, kind)
    numbers, outcomes = random.Random(0), set()
    for attempt in range(60):
        data = bytearray(file.getvalue())
        place = numbers.randrange(min(len(data), 400))
        data[place : place + (0, 1, 9, len(data))[attempt % 4]] = bytes([numbers.randrange(256)] * (attempt % 3))
        try:
            outcomes.add(Decoder()(io.BytesIO(data)).mode)
        except Exception as error:
            outcomes.add("unreadable")
            assert "\n" not in fault_of(error) and " at 0x" not in fault_of(error)
    assert "unreadable" in outcomes <= {"unreadable", "RGB"}


@pytest.mark.parametrize(
    "images, share, most",
    [
        (50, 0.01, 9),  # fewer than 10 are no error
        (12, 0.01, 3),  # at most a quarter of the images
        (3, 0.01, 0),
        (3, 0.5, 1),  # a larger share counts in any set
        (2000, 0.01, 20),
        (2000, 0.001, 9),
        (50, 0.0, 0),
        (50, 1.0, 50),
    ],
)
def test_how_many_unreadable_images_end_a_run(images, share, most, capsys):
    tally = Tally(Faulty([], images), share)
    for index in range(most):
        tally.add([(index, "damaged")] * 2)
        tally.settle(World())
    assert capsys.readouterr().err.count("note: image") == most
    if most < images:
        tally.add([(most, "damaged")])
        with pytest.raises(
            UserError, match=rf"image {most}: .* {most + 1} unreadable, a share above .* of {images} images"
        ):
            tally.settle(World())


def test_the_label_is_that_of_the_image_in_the_place():
    faults: list[Exception] = [OSError("damaged")] * 4
    dataset = LabelledImages(Faulty(faults, 12), torch.arange(12), 0, lambda image: image)
    for place in range(12):
        image, label, reports = dataset[place]
        assert (image == label).all() and label >= 4 and len(reports) == (place < 4)


# Whole sets


@pytest.fixture
def pets():
    pytest.importorskip("torchvision")
    write_classes(Path("pets"), 12)
    return Path("pets")


def test_one_bad_file_of_24_ends_no_run(pets, capsys):
    Path(pets, "cats/03.png").write_bytes(b"not a picture")
    options = ["--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4", "--optim.epochs=1"]
    assert main([f"--data.root={pets}", *options, "--data.workers=0"]) == 0
    assert capsys.readouterr().err.count("note: pets/cats/03.png: not a readable image (no format") == 1


def test_unreadable_images_of_the_evaluation(pets, capsys):
    """k-NN over all images: one of 24 may be unreadable, unless the option says 0."""
    Path(pets, "dogs/05.png").write_bytes(b"not a picture")
    pytest.importorskip("timm")

    def evaluate(**more: float) -> None:
        labels = labelled.Labels(root=pets, batch_size=8, workers=0, **more)
        knn.main(knn.Options(Backbone(name="test_vit", size=32, device="cpu"), labels, k=(1,)), World())

    evaluate()
    assert "note: pets/dogs/05.png" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"05.png: .* 1 unreadable, a share above --data.max-unreadable 0 of 24 images"):
        evaluate(max_unreadable=0.0)


def test_pixel_range_and_exif_reach_every_source(pets):
    for name in ("pets/cats/00.png", "pets/dogs/00.png"):
        Image.fromarray(np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)).save(name)
    with tarfile.open("pets/0.tar", "w") as shard:
        shard.add("pets/cats/00.png", "00.png")
    for source in ("folder", "cifar10", "webdataset"):
        data = config.Data(source=source, root=pets, pixel_range=(0, 4095), exif=False)
        found = make_source(data)
        assert found.decode == Decoder((0, 4095), False)
        assert len(np.unique(np.asarray(found.read(0)))) == 256
        with pytest.raises(ValueError, match=r"values from 0 to 4092: of 1024 levels, .* give --data.pixel-range"):
            make_source(config.Data(source=source, root=pets)).read(0)
    run = config.Config(data=config.Data(source="folder", root=pets, pixel_range=(0, 5)))
    for given, expected in (((0, 4095), (0, 4095)), (None, (0, 5))):
        found = labelled.Labels(pixel_range=given).load(run, 8, torch.device("cpu"), World()).source
        assert found.decode == Decoder(expected)
    with pytest.raises(UserError, match=r"--data.pixel-range .* do nothing for --data.source digits"):
        labelled.Labels(pixel_range=(0, 5)).load(config.Config(), 8, torch.device("cpu"), World())


def test_options_that_do_nothing_without_files():
    pytest.importorskip("torchvision")
    for source, more in (("digits", {"exif": False}), ("cifar10", {"pixel_range": (0, 1)})):
        with pytest.raises(UserError, match=rf"do nothing for --data.source {source}: no image files"):
            make_source(config.Data(source=source, root=Path(), **more))


def test_a_set_of_12_bits_names_the_option(capsys):
    pytest.importorskip("torchvision")
    write_images(Path("flat"), 8)
    for i in range(8):
        Image.fromarray(np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)).save(f"flat/{i:02d}.png")
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    options += ["--data.workers=0", "--optim.epochs=1"]
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "values from 0 to 4092: of 1024 levels" in said and "give --data.pixel-range LOW HIGH" in said
    assert main([*options, "--data.pixel-range", "0", "4095"]) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--data.root=pets", "--data.pixel-range", "5", "5"],
            "pixel-range must be two finite numbers, the smaller first",
        ),
        (["--data.root=pets", "--data.pixel-range", "0", "nan"], "pixel-range must be two finite numbers"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        cli.parse(options)


def test_a_negative_range_is_saved_with_the_run():
    options = cli.parse(["--data.root=pets", "--data.pixel-range", "-1000", "4e-05", "--data.exif=False"])
    config.save(options, Path())
    saved = cli.parse([f"--config={config.FILE}"]).data
    assert saved.pixel_range == options.data.pixel_range == (-1000, 4e-05) and not saved.exif
