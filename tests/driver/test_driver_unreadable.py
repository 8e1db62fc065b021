"""Images that the driver cannot read: which faults count, what is said, how many end a run, what takes their place."""

import io
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
from driver.data import decode, labelled, unreadable
from driver.data.decode import FORMATS, Decoder
from driver.data.images import Source
from driver.data.sources import make_source
from driver.data.unreadable import Tally, fault_of, read
from driver.data.workers import LabelledImages
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.pretrain import main


def as_it_is(image):
    return image


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
    (MemoryError(), "too little memory for it; scale it down if it is large, else take fewer --data.workers"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError division by zero"),
    (TypeError("no number"), "TypeError no number"),
    (zlib.error("Error -3"), "error Error -3"),
    (Image.DecompressionBombError("Image size"), "DecompressionBombError Image size"),
    (OSError(), "OSError"),
    (ValueError("\x1b[31m"), r"\x1b[31m"),
]


@pytest.mark.parametrize("fault, words", FAULTS, ids=[type(fault).__name__ for fault, _ in FAULTS])
def test_any_exception_makes_an_image_unreadable(fault, words):
    index, pixels, reports = read(Faulty([fault], 5), list(range(5)), 0, as_it_is)
    assert index > 0 and (pixels == index).all()
    assert reports[0][0] == 0 and reports[0][1].startswith(words) and "0x" not in reports[0][1]


def test_errors_of_the_user_and_signals_are_not_faults_of_an_image():
    with pytest.raises(UserError, match="shard is gone"):
        read(Faulty([UserError("shard is gone")], 5), list(range(5)), 0, as_it_is)
    with pytest.raises(KeyboardInterrupt):
        read(Faulty([KeyboardInterrupt()], 5), list(range(5)), 0, as_it_is)


def refused_by_torch(image):
    if image[0, 0, 0] in (0, 1):
        torch.empty(1 << 60)
    return image


def test_an_image_whose_views_take_too_much_memory_is_unreadable():
    """Torch refuses an exabyte in the transform of images 0 and 1. Any other image is taken instead."""
    index, pixels, reports = read(Faulty([], 5), [0, 2, 3, 4], 0, refused_by_torch)
    assert index > 1 and (pixels == index).all() and reports == [(0, unreadable.TOO_LITTLE)]
    image, label, reports = LabelledImages(Faulty([], 5), torch.tensor([0, 2, 3]), 0, refused_by_torch)[0]
    assert (image == label).all() and label > 1 and reports == [(0, unreadable.TOO_LITTLE)]


def test_a_process_that_lacks_memory_for_two_images_says_so():
    said = r"^too little memory to read image 0 and, in its place, image 1: take fewer --data.workers or .* memory$"
    with pytest.raises(UserError, match=said):
        read(Faulty([], 2), [0, 1, 1, 1, 1, 1, 1], 0, refused_by_torch)
    with pytest.raises(UserError, match=said):
        read(Faulty([MemoryError(), MemoryError()], 5), [0, 1, 1, 1, 1, 1, 1], 0, as_it_is)


def test_a_fault_of_the_transform_is_none_of_the_image():
    def broken(image):
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        read(Faulty([], 5), list(range(5)), 0, broken)


def test_long_faults_are_cut():
    assert fault_of(ValueError("x" * 5000)) == "x" * unreadable.LONGEST


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_unreadable(kind, monkeypatch, recwarn, capsys):
    """Bytes changed, removed and added, and files cut short: an image of bounded size, or an exception of one line."""
    monkeypatch.setattr(decode, "PIXELS", 1 << 20)
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a" * 40
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(
        file,
        kind,
        exif=exif,
        **({"save_all": True, "append_images": [image]} if kind in ("GIF", "PNG", "TIFF", "WEBP") else {}),
    )
    numbers, outcomes = np.random.default_rng(0), set()
    for _ in range(300):
        data = bytearray(file.getvalue())
        for _ in range(numbers.integers(1, 5)):
            place, value = numbers.integers(len(data)), numbers.choice([0, 1, 127, 128, 255, numbers.integers(256)])
            removed = numbers.choice([0, 1, 9, len(data)], p=[0.02, 0.94, 0.02, 0.02])
            data[place : place + removed] = bytes([value] * numbers.integers(removed > 1, 3 if removed != 1 else 2))
        try:
            found = Decoder()(io.BytesIO(data))
        except Exception as error:
            outcomes.add("unreadable")
            assert "\n" not in fault_of(error) and " at 0x" not in fault_of(error)
        else:
            outcomes.add(found.mode)
            assert found.width * found.height <= 1 << 20
    assert outcomes == {"unreadable", "RGB"}
    assert not recwarn.list and capsys.readouterr() == ("", "")


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
            "pixel-range must be two numbers from -1e30 to 1e30 and at least 1e-30 apart, the smaller first, got",
        ),
        (["--data.root=pets", "--data.pixel-range", "0", "nan"], "pixel-range must be two numbers from -1e30 to 1e30"),
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
