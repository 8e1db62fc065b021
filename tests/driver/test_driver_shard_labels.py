"""Labels of shards: which label belongs to an image, what a label may say, and images without one."""

from pathlib import Path

import pytest
from tars import picture, samples, write_tar

from driver.config import UserError
from driver.data.sources import Shards

SHARD = Path("s.tar")


def write_labels(labels: dict[str, bytes], shard: Path = SHARD) -> None:
    """Images of these names without their endings, with these labels."""
    members = [
        member for name, label in labels.items() for member in ((f"{name}.png", picture(0)), (f"{name}.cls", label))
    ]
    write_tar(shard, members)


@pytest.mark.parametrize(
    "labels, expected, classes",
    [
        ([b"0", b"5\n", b" 1000000 ", b"5"], [0, 1, 2, 1], "3 classes (0, 5, 1000000)"),
        ([b"2", b"10", b"2", b"\xef\xbb\xbf10"], [0, 1, 0, 1], "2 classes (2, 10)"),
        ([b"3.0", b"1e1", b"+3", b"003"], [0, 1, 0, 0], "2 classes (3, 10)"),
        ([b"1" * 30, b"0", b"1" * 30, b"0"], [1, 0, 1, 0], "2 classes (0, " + "1" * 30 + ")"),
        ([b"dog", b"cat\r\n", "élan".encode(), b"cat"], [1, 0, 2, 0], "3 classes (cat, dog, élan)"),
        ([b"3d-printer", b"nan", b"n01440764", b"nan"], [0, 2, 1, 2], "3 classes (3d-printer, n01440764, nan)"),
    ],
)
def test_labels_become_classes(labels, expected, classes):
    write_labels(dict(zip("abcd", labels, strict=True)))
    shards = Shards(SHARD, 0.0)
    assert shards.labels.tolist() == expected
    assert f"4 images in {classes} in 1 shard" in shards.summary


def test_classes_are_those_of_all_shards():
    write_labels({"a": b"owl", "b": b"cat"}, Path("shards/train-0.tar"))
    write_labels({"a": b"cat", "b": b"bat"}, Path("shards/val-0.tar"))
    assert Shards(Path("shards"), 0.0).labels.tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize(
    "label, wrong",
    [
        (b"", "s.tar:b.cls: a label must be an integer or the name of a class on one line, got b''"),
        (b" \n", r"got b' \n'"),
        (b"0.5", "got 0.5"),
        (b"+inf", r"got +inf"),
        (b"\x80\x03\x00\xff", r"got b'\x80\x03\x00\xff'"),
        (b"\x01\x00\x00\x00\x00\x00\x00\x00", "got b"),
        (b"a photo\nof a cat", r"got b'a photo\nof a cat'"),
        (b"a" * 2000, "got b'" + "a" * 40 + "'..."),
        (
            b"cat",
            "s.tar:b.png: its label is the name 'cat', but s.tar:a.png has the number 1; labels must be all numbers",
        ),
    ],
)
def test_what_is_no_label_is_refused(label, wrong):
    write_labels({"a": b"1", "b": label})
    with pytest.raises(UserError) as error:
        Shards(SHARD, 0.0)
    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_the_label_that_belongs_to_an_image():
    images = ("2021.05.01", "2021.05.02", "b.v2", "c.left", "c.right", "d", "x.y/e", "f.jpg")
    labels = {"2021.05.01": 1, "2021.05.02": 2, "b.v2": 3, "b": 0, "c": 4, "d": 5, "x.y/e": 6, "x": 0, "f.jpg.png": 7}
    members = [(f"{name}.cls", b"%d" % label) for name, label in labels.items()]
    write_tar(SHARD, [*members, *((f"{name}.png", picture(0)) for name in images)])
    shards = Shards(SHARD, 0.0)
    found = {shards.name(i)[6:-4]: int(label) for i, label in enumerate(shards.labels)}
    assert found == dict(zip(images, (0, 1, 2, 3, 3, 4, 5, 6), strict=True))
    assert "2 .cls without an image" in shards.summary


def test_labels_of_an_image_that_comes_twice():
    twice = [("./a.png", picture(10)), ("a.cls", b"0"), ("a.png", picture(20)), ("a.cls", b"1")]
    write_tar(SHARD, twice)
    shards = Shards(SHARD, 0.0)
    assert [(shards.read(i).getpixel((0, 0))[0], int(shards.labels[i])) for i in range(2)] == [(10, 0), (20, 1)]
    write_tar(SHARD, [*twice, ("a.png", picture(30))])
    with pytest.raises(UserError, match=r"s.tar:a.cls: 2 labels that differ, but 3 images of that name"):
        Shards(SHARD, 0.0)
    write_tar(SHARD, [*twice[:3], *samples(2, first=1)])
    assert Shards(SHARD, 0.0).labels.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("label", [b"-1", b"-100\n", b"-1.0", None])
def test_some_images_without_a_label_mean_no_accuracies(label):
    """Never a class 0 that nobody gave."""
    members = samples(4)
    if label is None:
        del members[3]
    else:
        members[3] = ("001.cls", label)
    write_tar(SHARD, members)
    shards = Shards(SHARD, 0.5)
    assert (len(shards.train), len(shards.test), shards.labels.tolist()) == (4, 0, [0] * 4)
    assert shards.summary == (
        "s.tar: 4 images in 1 shard, all to train on; without accuracies, since .cls is missing or negative for "
        "1 of 4 images (first: s.tar:001.png)"
    )


def test_held_out_shards_without_labels_are_named():
    write_tar(Path("shards/train-0.tar"), samples(4))
    write_tar(Path("shards/val-0.tar"), [("a.png", picture(0)), ("b.png", picture(0))])
    shards = Shards(Path("shards"), 0.5)
    assert (len(shards.train), len(shards.test)) == (4, 0)
    assert ".cls is missing or negative for 2 of 6 images (first: shards/val-0.tar:a.png)" in shards.summary
