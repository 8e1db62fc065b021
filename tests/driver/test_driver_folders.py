"""How the driver understands a folder of images: parts, classes, what is left out, and what it refuses."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from photographs import PHOTOGRAPHS, write_classes, write_images

from driver import knn, linear
from driver.config import UserError
from driver.data import sources
from driver.data.labelled import Labelled
from driver.data.listing import counted, printable
from driver.data.parts import divide, part_of
from driver.data.sources import Files
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.exits import exit_code
from driver.pretrain import main


def touch(*folders: str, count: int = 8) -> None:
    """Empty files named as images, in each folder below r/."""
    for folder in folders:
        Path("r", folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Path("r", folder, f"{i}.png").touch()


def link(name: str, target: str) -> None:
    Path("r", name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, Path("r", name))


def labels_of(files: Files, part: torch.Tensor) -> dict[str, int]:
    """Label of each directory with images of a part; every directory must have a single label."""
    pairs = {(os.path.dirname(files.paths[i]).removeprefix("r/"), int(files.labels[i])) for i in part.tolist()}
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(
    "part, names",
    [
        ("train", "train training Train TRAIN"),
        ("val", "val valid validation Val VALIDATION"),
        ("test", "test testing Testing"),
        (None, "train2017 trains trainval cats value testing2 .train"),
    ],
)
def test_the_part_that_a_name_stands_for(part, names):
    assert [part_of(name) for name in names.split()] == [part] * len(names.split())


def test_held_out_images_are_used_where_training_images_are_of_two_classes():
    assert divide(torch.tensor([0, 1, 0, 0, 0]), 3, 0.5)[1].tolist() == [3, 4]
    assert divide(torch.tensor([0, 0, 0, 0, 1]), 3, 0.5)[1].tolist() == []


def test_a_folder_with_its_own_validation_set():
    write_classes(Path("pets/train"), 5)
    write_classes(Path("pets/val"), 3)
    files = Files(Path("pets"), 0.5)
    assert (len(files.train), len(files.test)) == (10, 6)
    assert files.name(10).startswith("pets/val/cats") and files.labels[files.test].tolist() == [0, 0, 0, 1, 1, 1]
    assert files.read(0).size == (24, 20)


@pytest.mark.parametrize(
    "train, val, lacking",
    [
        ("bird cat dog", "cat dog", "val/ lacks 1 of the 3 classes of train/ (bird)"),
        ("cat dog", "bird cat dog zebra", "train/ lacks 2 of the 4 classes of val/ (bird, zebra)"),
        ("bird cat dog", "cat zebra", "val/ lacks 2 of the 3 classes of train/ (bird, dog)"),
        ("cafe\u0301 cat", "caf\u00e9 cat", ""),  # an accent as macOS writes it, and as others do
        ("n01/sub n02", "n01 n02/a/b", ""),
    ],
)
def test_a_class_has_one_label_in_both_parts(train, val, lacking):
    touch(*(f"train/{name}" for name in train.split()), *(f"val/{name}" for name in val.split()))
    for part in ("train", "val"):  # neither is a class
        Path("r", part, ".ipynb_checkpoints").mkdir()
        Path("r", part, "aaa_empty").mkdir()
    files = Files(Path("r"), 0.1)

    def by_class(part: torch.Tensor) -> dict[str, int]:
        found = labels_of(files, part).items()
        return {folder.split("/")[1].replace("e\u0301", "\u00e9"): label for folder, label in found}

    of_train, of_val = by_class(files.train), by_class(files.test)
    names = sorted({*of_train, *of_val})
    assert of_train | of_val == {name: label for label, name in enumerate(names)}
    assert all(of_train[name] == of_val[name] for name in of_train.keys() & of_val.keys())
    assert lacking in files.summary and ("lacks" in files.summary) == bool(lacking)


@pytest.mark.parametrize(
    "folders, train, test",
    [
        ("Train/a Train/b Val/a Val/b", "Train/a Train/b", "Val/a Val/b"),
        ("training/a training/b testing/a", "training/a training/b", "testing/a"),
        ("train/a train/b validation/a test/a", "train/a train/b", "validation/a"),
        ("train/a train/b valid/a unlabeled", "train/a train/b", "valid/a"),
        ("train/a train/b val/a val_v2/a sketch/a test", "train/a train/b", "val/a"),
        ("r/train/a r/train/b r/val/b __MACOSX/r/train/a", "r/train/a r/train/b", "r/val/b"),
        ("train/train/a train/train/b test/test/b", "train/train/a train/train/b", "test/test/b"),
        ("images/train images/val", "images/train", ""),
        ("train val", "train", ""),
        ("train/train test/test", "train/train", ""),
        ("train/a val/a", "train/a", ""),
        ("train/a val/a val/b", "train/a", ""),
        ("train/a/sub val/a val/b", "train/a/sub", ""),
        ("train/all/a train/all/b val/all/b", "train/all/a train/all/b", "val/all/b"),
    ],
)
def test_parts_are_found_by_their_names(folders, train, test):
    touch(*folders.split())
    files = Files(Path("r"), 0.25)
    assert (sorted(labels_of(files, files.train)), sorted(labels_of(files, files.test))) == (
        train.split(),
        test.split(),
    )


@pytest.mark.parametrize(
    "folders, classes",
    [
        ("a b c .git .thumbnails __MACOSX/a @eaDir/0.png $RECYCLE.BIN", "a b c"),
        ("train/a train/b", "train/a train/b"),
        ("r/a r/b", "r/a r/b"),
        ("bus car train", "bus car train"),
        ("bullet_train test_tube val_de_travers a b c d", "a b bullet_train c d test_tube val_de_travers"),
        ("cat.jpg dog.jpg", "cat.jpg dog.jpg"),
        ("n1/x n1/y/z n2", "n1/x n1/y/z n2"),
        ("mask no_mask", "mask no_mask"),
        ("a b c labels", "a b c labels"),
        ("2023/a 2023/b 2024/a 2024/b", "2023/a 2023/b 2024/a 2024/b"),
        ("a b c b_like/b", "a b b_like/b c"),
    ],
)
def test_class_folders_are_split(folders, classes):
    touch(*folders.split())
    files = Files(Path("r"), 0.25)
    assert len(files.test) == len(files.paths) // 4 and len(files.train) + len(files.test) == len(files.paths)
    assert sorted(labels_of(files, torch.arange(len(files.paths)))) == classes.split()


@pytest.mark.parametrize("folders", [". .thumbnails @eaDir/0.png", "train", "photos", "2023/may"])
def test_images_without_two_classes_are_all_trained_on(folders):
    touch(*folders.split())
    files = Files(Path("r"), 0.25)
    assert (len(files.train), len(files.test), set(files.labels.tolist())) == (8, 0, {0})
    assert files.summary.partition("; ")[0].endswith("all to train on, without accuracies")


@pytest.mark.parametrize(
    "folders, words",
    [
        ("train/a Train/b val/a", "r: Train/, train/ may each be meant"),
        ("train/a val/a validation/b", "r: val/, validation/ may each be meant"),
        ("val/a val/b", "r: val/ without train/; .* --data.root r/val "),
        ("val/a test/b", "r: val/, test/ without train/"),
        ("test cats dogs", "r: test/ without train/"),
        ("train/a train/b cats dogs", "r: train/ beside cats/, dogs/ and no val/; give --data.root r/train "),
        ("train unlabeled", "r: train/ beside unlabeled/ and no val/"),
        ("train/a val/a cats dogs", "r: cats/, dogs/ with images beside train/, val/"),
        ("train/a train/b val", r"r: val/ has no class folders, train/ has 2 \(a, b\); .* --data.root r/train "),
        ("train val/a val/b", "r: train/ has no class folders, val/ has 2"),
        ("Data/CLS-LOC/train/n1 Data/CLS-LOC/train/n2 Data/CLS-LOC/val", "r/Data/CLS-LOC: val/ has no class folders"),
        (
            "train/n1/images train/n2/images val/images test/images",
            r"r: no class of val/ \(images\) is one of train/ \(n1",
        ),
        ("cars_train cars_test", "r: cars_test/, cars_train/ would be classes"),
        ("train/a train/b test/test", r"r: no class of test/ \(test\) is one of train/ \(a, b\)"),
        ("cats/train cats/val dogs/train dogs/val", "r: cats/ holds parts; put classes into parts, as train/cats/"),
        ("bottle/train/good bottle/test/bad cable/train/good", "r: bottle/ holds parts"),
        ("train2017 val2017 test2017 unlabeled2017", "r: test2017/, train2017/, val2017/ would be classes"),
        ("training_set/a training_set/b test_set/a", "r: test_set/, training_set/ would be classes"),
        ("seg_train/a seg_test/a seg_pred", "r: seg_test/, seg_train/ would be classes"),
        ("trainA trainB testA testB", "r: testA/, testB/, trainA/ and 1 more would be classes"),
        ("images annotations/trimaps", "r: images/ beside annotations/ would be classes; give --data.root r/images "),
        ("train/images train/masks val/images", "r/train: images/ beside masks/ would be classes"),
        ("jpg segmim", "r: jpg/ beside segmim/ would be classes; give --data.root r/jpg "),
        ("birds/images/a birds/images/b segmentations/a", "r: segmentations/ beside birds/ would be classes; move"),
        ("cats/images cats/masks dogs/images dogs/masks", "r: cats/ holds images/ beside masks/, .* of one class"),
        ("cats dogs pets/cats pets/dogs", r"r: cats/, dogs/ stand beside pets/ and in it; .* --data.root r/pets if"),
        ("a b c thumbs/a thumbs/b", "r: a/, b/ stand beside thumbs/ and in it; move one copy away, or give"),
        ("valid invalid", "r: valid/ without train/; .* or give a class of that name another name"),
        (". a", r"r: 8 images \(0.png, 1.png, 2.png and 5 more\) beside a/ with 8 images"),
    ],
)
def test_a_folder_with_two_readings_is_refused(folders, words):
    touch(*folders.split())
    with pytest.raises(UserError, match=f"^--data.root {words}"):
        Files(Path("r"), 0.25)


@pytest.mark.parametrize("empty, full", [("val", "train/a"), ("train", "val/a"), ("Train", "test/a")])
def test_a_part_without_images_is_refused(empty, full):
    touch(full)
    Path("r", empty).mkdir()
    with pytest.raises(UserError, match=f"^--data.root r: no images in {empty}/ or its subfolders"):
        Files(Path("r"), 0.25)


@pytest.mark.parametrize(
    "links, classes, out",
    [
        ({"a/up": ".."}, "a b", "1 link to a folder listed already"),
        ({"a/up": "../.."}, "a b", "1 link to a folder listed already"),
        ({"a/up": "/"}, "a b", "1 link to a folder listed already"),
        ({"aa": "b", "c": "b"}, "a b", "2 links to folders listed already"),
        ({"a/loop": "loop", "b/9.png": "nowhere.png"}, "a b", "2 broken links"),
        ({"c": "../elsewhere/c"}, "a b c", ""),
    ],
)
def test_each_real_directory_is_listed_once(links, classes, out):
    touch("a", "b", "../elsewhere/c")
    for name, target in links.items():
        link(name, target)
    files = Files(Path("r"), 0.25)
    assert sorted(labels_of(files, torch.arange(len(files.paths)))) == classes.split()
    assert len(files.paths) == len({os.path.realpath(path) for path in files.paths}) == 8 * len(classes.split())
    assert files.summary.partition("left out: ")[2] == out


@pytest.mark.parametrize(
    "folders, links, words",
    [
        ("val/a val/b", {"train": "val"}, "r: the link train leads to r/val, which is listed already"),
        ("train/a train/b", {"val": "train"}, "r: the link val leads to r/train, which is listed already"),
        ("train/a train/b", {"val": "nowhere"}, "r: the link val leads nowhere"),
        ("../o/a ../o/b", {"train": "../o", "val": "../o"}, "r: the link val leads to r/train"),
        ("train/b val/a val/b", {"train/a": "../val/a"}, "r: r/train/a leads to r/val/a"),
        ("../o/a train/b", {"train/a": "../../o/a", "val": "../o"}, "r: r/val/a leads to r/train/a"),
    ],
)
def test_parts_that_share_images_through_a_link_are_refused(folders, links, words):
    touch(*folders.split())
    for name, target in links.items():
        link(name, target)
    with pytest.raises(UserError, match=f"^--data.root {words}"):
        Files(Path("r"), 0.25)


def test_links_to_files_and_to_parts_elsewhere_are_followed():
    touch("../o/a", "../o/b", "../p/a", "../p/b", count=2)
    link("train", "../o")
    link("val", "../p")
    link("../o/a/9.png", "../b/0.png")
    files = Files(Path("r"), 0.25)
    assert (len(files.train), len(files.test)) == (5, 4) and "r/train/a/9.png" in files.paths
    link("../root", "r")
    assert Files(Path("root/"), 0.25).paths[0] == "root/train/a/0.png"


def test_what_is_left_out_is_counted():
    touch("a", "b")
    for name in ("a/1.txt", "a/2.TXT", "b/._0.png", "README", "x.mat", "y.json", "z.csv", "a/Thumbs.db", "preview.jpg"):
        Path("r", name).touch()
    os.mkfifo("r/a/pipe.png")  # to open it would wait for ever
    files = Files(Path("r"), 0.25)
    assert files.summary == (
        "r: 16 images in 2 classes (a, b), 12 to train on and 4 held out (--data.held-out 0.25); "
        "left out: 2 .txt, 1 .csv, 1 .db and 6 more"
    )
    assert not any("pipe" in path or "._" in path for path in files.paths)
    assert counted({"hidden": 1200, ".txt": 3}) == "1,200 hidden, 3 .txt"


def test_folders_within_classes_are_named():
    """Two sets of the same classes side by side; a tree of classes."""
    touch("color/a", "color/b", "grey/a", "grey/b", count=2)
    files = Files(Path("r"), 0.5)
    assert "in 2 classes (color, grey)" in files.summary and files.summary.endswith(
        "; folders within a class are no classes of their own (color/a, color/b, grey/a and 1 more)"
    )


def test_a_folder_without_images_says_what_is_there():
    Path("r/a").mkdir(parents=True)
    for name in ("0", "1", "2", "a/x.csv", ".x"):
        Path("r", name).touch()
    with pytest.raises(UserError, match=r"^--data.root r: no images .*: 3 without extension, 1 .csv, 1 hidden "):
        Files(Path("r"), 0.25)
    Path("r/0.tar").touch()
    with pytest.raises(UserError, match=r"--data.source webdataset reads the .tar shards"):
        Files(Path("r"), 0.25)


@pytest.mark.parametrize(
    "name, words",
    [
        ("pets.zip", "not a folder but an archive; unpack it and give the new folder$"),
        (
            "pets.tar",
            "not a folder but an archive; unpack it and give the new folder; --data.source webdataset .* or one shard$",
        ),
        ("pets.png", "not a folder$"),
        ("~nobody/pets", "no such folder"),
        ("n" * 300 + "~", "File name too long"),
        ("loop~", "Too many levels of symbolic links"),
    ],
)
def test_a_root_that_is_no_folder(name, words):
    os.symlink("loop~", "loop~")
    if "~" not in name:
        Path(name).touch()
    with pytest.raises(UserError, match=words):
        Files(Path(name), 0.25)


def test_a_folder_that_cannot_be_listed_is_named(monkeypatch):
    """Tests may run as root, who can list any folder."""
    touch("a", "b")
    scandir = os.scandir

    def refused(folder):
        if folder == "r/b":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"^--data.root: r/b cannot be listed \(Permission denied\)"):
        Files(Path("r"), 0.25)


def test_odd_names_are_shown_on_one_line_and_read():
    odd = ["a b", "\U0001f408", "n" * 200, "x\ny", os.fsdecode(b"\xff\xfe")]
    for name in odd:
        write_images(Path("r", name), 2)
    files = Files(Path("r"), 0.5)
    assert len(set(files.labels.tolist())) == 5 and files.read(9).mode == "RGB"
    assert "\n" not in files.summary and "n" * 41 not in files.summary and files.summary.encode()
    assert printable("x\ny\udcff\U0001f408") == "x\\ny\\udcff\U0001f408"


def test_a_root_that_the_run_could_not_record_is_refused():
    root = Path(os.fsdecode(b"odd\xff"))
    write_classes(root, 2)
    with pytest.raises(UserError, match=r"odd\\udcff: the path must be UTF-8"):
        sources.make_source(replace(PHOTOGRAPHS, root=root))


@pytest.mark.parametrize(
    "names, folders", [(".git __MACOSX", False), ("train", True), ("cifar-10-batches-py x", False)]
)
def test_cifar10_is_read_from_folders_that_may_hold_images(names, folders):
    for name in names.split():
        Path("r", name).mkdir(parents=True)
    assert sources._has_class_folders(Path("r")) == folders


def test_names_are_printed_whatever_the_encoding_of_the_terminal(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_code(lambda world: print("caf\u00e9 \udcff") or 0) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


def test_without_two_classes_no_accuracy_is_shown(capsys):
    write_images(Path("flat/train"), 8)
    write_images(Path("flat/val"), 8)
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, "--data.workers=0", "--optim.epochs=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("flat: 16 images without classes, 8 to train on (train/); the other 8 (val/) are not used") == 1
    assert "accuracy" not in shown and "8 training images, 0 held out" in shown
    rows = [json.loads(line) for line in Path("runs/flat-001/history.jsonl").read_text().splitlines()]
    assert rows and not any("knn" in row or "linear" in row for row in rows)
    backbone = Backbone(run=Path("runs/flat-001"), device="cpu")
    for script in (knn, linear):
        with pytest.raises(UserError, match="flat: no labelled images to test with"):
            script.main(script.Options(backbone=backbone), World())


def test_classes_too_small_to_hold_an_image_out():
    touch("a", "b", count=1)
    data = replace(PHOTOGRAPHS, root=Path("r"))
    with pytest.raises(
        UserError, match=r"r: .*; --data.held-out 0.25 of each class is less than an image; put some in"
    ):
        Labelled(Files(Path("r"), data.held_out), data, torch.device("cpu"), World())
