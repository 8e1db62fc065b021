"""The driver: options, data, evaluation, checkpoints, and whole runs of a few seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from driver_runs import ROOT, content, pretrain, rows
from photographs import write_images

from bam_kernels import BAMLoss
from driver import checkpoint, cli, config, history, model, optim, train
from driver.config import UserError
from driver.data import make_images, views_of_digits
from driver.data.images import epoch_order
from driver.data.labelled import Labels
from driver.data.parts import split
from driver.data.sources import Digits
from driver.distributed import World
from driver.pretrain import main
from driver.verify_resume import same

EXTRA = ("torchvision", "timm", "kornia", "tensorboard", "safetensors")


def script(*options: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """driver/pretrain.py in a process of its own, in which some packages cannot be imported."""
    Path("sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n")
    paths = os.pathsep.join([os.getcwd(), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "driver" / "pretrain.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# Whole runs


def test_digits_run_with_the_base_install():
    run = script("--model.width=8", "--optim.epochs=5", "--optim.warmup-epochs=1", without=EXTRA)
    assert run.returncode == 0, run.stderr
    for row in ("raw pixels", "network, before BAM", "network, after 5 epochs of BAM"):
        assert re.search(rf"^ *{row}(?: +[01]\.\d\d\d){{4}}$", run.stdout, re.M), run.stdout
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith("next") and last.endswith(
        'pip install -e ".[driver]" && python driver/pretrain.py --data.root PATH'
    )

    directory = Path("runs/digits-001")
    names = ["checkpoint.pt", "config.yaml", "dashboard.png", "history.jsonl", "images.tsv.gz", "report.html"]
    assert sorted(p.name for p in directory.iterdir()) == names
    assert (directory / "dashboard.png").read_bytes()[:4] == b"\x89PNG"
    record = history.read(directory)
    first, *_, last = record.of("train")
    assert last["step"] == 50 and last["epoch"] == 5
    assert last["target_entropy"] < last["loss"] < first["loss"] and last["collapse_gap"] > first["collapse_gap"]
    assert [row["epoch"] for row in record.of("evaluation")] == [0, 5]
    (raw,) = record.of("pixels")
    assert raw["knn_moved"] + 0.2 < raw["knn"] > 0.95 and raw["linear_moved"] + 0.2 < raw["linear"] > 0.95


def test_resume_is_bit_exact_and_seeded():
    """Two epochs equal one and then one more; with a teacher, whose weights are part of the state."""
    options = ["--optim.epochs=2", "--model.teacher-momentum=0.9", "--optim.clip-norm=1"]
    straight = content(pretrain(*options))
    first = pretrain(*options, "--run.stop-after=1")
    half = content(first)
    assert half["epoch"] == 1 and not same(half["network"], straight["network"])
    assert train.pretrain(cli.parse([f"--run.resume={first}"])) == first
    resumed = content(first)
    for part in ("network", "teacher", "optimizer", "epoch", "step", "config"):
        assert same(resumed[part], straight[part]), part
    assert [row["step"] for row in rows(resumed, "train")] == [2, 4]
    assert same(rows(resumed, "evaluation")[-1], rows(straight, "evaluation")[-1])
    assert history.read(first).rows == resumed["history"]


def test_another_seed_is_another_run():
    a, b = (content(pretrain("--optim.epochs=1", f"--run.seed={seed}"))["network"] for seed in (1, 2))
    assert not same(a, b)


def test_non_finite_loss_stops_and_keeps_the_checkpoint():
    directory = pretrain("--optim.epochs=1")
    before = (directory / checkpoint.FILE).read_bytes()
    with pytest.raises(UserError, match=r"stopped at step \d+ \(epoch \d\).*last good checkpoint is runs/digits-001/"):
        train.pretrain(
            cli.parse([f"--run.resume={directory}", "--optim.epochs=9", "--optim.lr=1e9", "--run.save-every=9"])
        )
    assert (directory / checkpoint.FILE).read_bytes() == before
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        pretrain("--optim.epochs=9", "--optim.lr=1e9")


@pytest.mark.parametrize(
    "what, message",
    [
        ("loss", r"stopped at step 3 \(epoch 2\): the loss is nan"),
        ("gradient", r"stopped at step 4.*weight is not finite"),
    ],
)
def test_nan_without_an_error_is_not_saved(monkeypatch, what, message):
    """As on a GPU, where the library does not look at values. Step 3 is the last one before the second checkpoint."""

    class NanAtStep3(BAMLoss):
        def forward(self, student, teacher=None, step=None):
            if step == 3 and what == "gradient":
                student.register_hook(lambda gradient: gradient * float("nan"))
            loss, stats = super().forward(student, teacher, step)
            return loss * (float("nan") if step == 3 and what == "loss" else 1.0), stats

    monkeypatch.setattr("driver.loss.BAMLoss", NanAtStep3)
    with pytest.raises(UserError, match=message + ".*last good checkpoint is runs/digits-001/"):
        pretrain("--optim.epochs=3", "--run.save-every=1", "--run.log-every=50")
    saved = content(Path("runs/digits-001"))
    assert saved["step"] == 2 and all(value.isfinite().all() for value in saved["network"].values())


def test_run_directories_are_never_shared():
    assert [str(train.fresh_directory("a")) for _ in range(3)] == ["runs/a-001", "runs/a-002", "runs/a-003"]


@pytest.mark.parametrize("images", [512, 1024])
def test_a_rising_learning_rate_is_said(images, capsys):
    """The peak is 1e-3 for 1024 images, the end."""
    options = ["--optim.lr=1e-3", "--optim.lr-images=1024", "--optim.lr-end=1e-3", f"--virtual-batch={images}"]
    pretrain("--optim.epochs=1", *options)
    said = "warning: the learning rate rises to --optim.lr-end 0.001 from a peak of 0.0005, that of 512 images per step"
    assert capsys.readouterr().out.count(said) == (images == 512)


def test_learning_rate_and_decay_groups():
    rates = [optim.learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1 and 0 < rates[-1] < 1e-3
    decayed, others = optim.parameter_groups(model.Network(config.Model(width=4), 1, 8), 0.1)
    assert {p.ndim for p in decayed["params"]} == {2, 4} and {p.ndim for p in others["params"]} == {1}
    assert others["weight_decay"] == 0


# Data, augmentation, evaluation


def test_augmentation_keeps_shape_and_range_and_is_seeded():
    images = torch.rand(6, 1, 8, 8)
    a, b, c = (views_of_digits.augment_digits(images, 1.0, torch.arange(6) + seed) for seed in (50, 50, 60))
    assert a.shape == images.shape and a.dtype == images.dtype
    assert ((a >= 0) & (a <= 1)).all()
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(views_of_digits.augment_digits(images, 0.0, torch.arange(6)), images)
    still = views_of_digits.affine(images, views_of_digits.Affine(0, 0), torch.rand(5, 6))
    assert (still - images).abs().max() <= 1e-6


def test_digits_views_are_view_major_and_depend_on_seed_and_epoch():
    options = config.Data(batch_size=64, views=3, augment=0.0)
    digits = make_images(options, config.Boxes(), torch.device("cpu"), 0, World())
    steps = [views for ((views,),) in digits.views(epoch=4)]
    assert len(steps) == digits.training // 64 and steps[0].shape == (192, 1, 8, 8)
    first, second, third = steps[0].unflatten(0, (3, 64))
    assert torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(steps[0], next(digits.views(epoch=4))[0][0])
    assert not torch.equal(steps[0], next(digits.views(epoch=5))[0][0])


def test_digits_of_another_size_are_resized_alike_for_training_and_evaluation():
    options = config.Data(size=12, augment=0.0, batch_size=64)
    digits = make_images(options, config.Boxes(), torch.device("cpu"), 0, World())
    source = Digits(options.held_out)
    expected = F.interpolate(source.images, size=(12, 12), mode="bilinear", antialias=True)
    ((images, labels),) = digits.held_out()
    assert torch.equal(images, expected[source.test]) and torch.equal(labels, source.labels[source.test])
    (of_labelled, _), *_ = Labels().load(config.Config(data=options), 12, torch.device("cpu"), World()).plain("test")
    assert torch.equal(of_labelled, images[:128])
    assert (next(digits.views(0))[0][0][:, None] == expected[source.train]).flatten(2).all(2).any(1).all()


def test_an_order_of_an_epoch_is_shared_without_remainder():
    """5 steps of 12 images; 2 of 62 are left out. Contiguous parts for ranks, or every third image."""
    whole = epoch_order(62, 12, 7, 3, World())
    assert whole.shape == (5, 12) and len(whole.unique()) == 60
    assert not torch.equal(whole, epoch_order(62, 12, 7, 4, World()))
    for rank in range(3):
        assert torch.equal(epoch_order(62, 12, 7, 3, World(rank, 3)), whole[:, 4 * rank : 4 * rank + 4])
        assert torch.equal(epoch_order(62, 12, 7, 3, World(rank, 3), interleaved=True), whole[:, rank::3])


def test_split_keeps_the_share_of_every_class():
    labels = torch.arange(1000) % 10
    train_part, test_part = split(labels, 0.25)
    assert torch.equal(torch.cat([train_part, test_part]).sort().values, torch.arange(1000))
    assert (labels[test_part].bincount() == 25).all()
    assert len(split(labels, 0.0)[1]) == 0


# Folders of images


FOLDER = ["--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4", "--optim.epochs=2"]


def test_folder_without_torchvision():
    write_images(Path("images"), 8)
    run = script(*FOLDER, "--data.root=images", without=EXTRA)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert [line.strip() for line in run.stderr.splitlines() if "install -e" in line] == ['pip install -e ".[driver]"']


@pytest.mark.slow
def test_folder_of_classes_resumes_bit_exactly():
    pytest.importorskip("torchvision")
    for label in ("cats", "dogs"):
        write_images(Path("pets") / label, 11, seed=len(label))
    options = [*FOLDER, "--data.root=pets", "--data.held-out=0.2", "--data.workers=1"]
    straight = train.pretrain(cli.parse(options))
    assert str(straight) == "runs/pets-001"
    first = train.pretrain(cli.parse([*options, "--run.stop-after=1", "--data.workers=0"]))
    train.pretrain(cli.parse([f"--run.resume={first}"]))
    assert same(content(first)["network"], content(straight)["network"])
    assert [row["epoch"] for row in rows(content(first), "evaluation")] == [0, 1, 2]


def test_flat_folder_with_a_timm_backbone(capsys):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    write_images(Path("flat"), 9)
    options = ["--data.root=flat", "--data.size=32", "--data.batch-size=8", "--data.workers=0", "--optim.epochs=1"]
    train.pretrain(cli.parse([*options, "--model.name=test_vit"]))
    assert "k-NN" not in capsys.readouterr().out
    (before, after) = rows(content(Path("runs/flat-001")), "evaluation")
    assert "knn" not in before and after["effective_rank"] > 1


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_image_is_named(workers, capsys):
    pytest.importorskip("torchvision")
    write_images(Path("flat"), 8)
    Path("flat/03.png").write_bytes(b"not a picture")
    options = [*FOLDER, "--data.root=flat", f"--data.workers={workers}", "--data.max-unreadable=0"]
    assert main(options) == 1
    shown = capsys.readouterr().err
    assert (
        "\nerror: flat/03.png: not a readable image (no format of images that is known; it starts with b'not" in shown
    )
    assert "Traceback" not in shown


def test_bad_folders():
    pytest.importorskip("torchvision")

    def stops(root: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            train.pretrain(cli.parse([*FOLDER, f"--data.root={root}"]))

    stops("nowhere", "nowhere: no such folder")
    Path("empty/sub").mkdir(parents=True)
    stops("empty", "empty: no images in it or in its subfolders")
    Path("file").touch()
    stops("file", "file: not a folder")
    write_images(Path("few"), 5)
    stops("few", "few: 5 images to train on, fewer than one batch of 8; give --data.batch-size 5 or less")
    write_images(Path("one"), 1)
    stops("one", "one: 1 images to train on.*at least 2 are needed")
