"""Evaluation of frozen features: k-NN, linear, spread, and their scripts."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from driver_runs import ROOT, pretrain
from sklearn.linear_model import LogisticRegression

from driver import cli, config, history, knn, linear, model, segment_video
from driver.config import UserError
from driver.data import labelled, make_images
from driver.data.images import Images
from driver.distributed import World
from driver.evaluation import frozen, online
from driver.evaluation.online import Bank, Vote
from driver.verify_resume import same

CPU = torch.device("cpu")


def digits(world: World = World()) -> Images:  # noqa: B008
    return make_images(config.Data(batch_size=64), config.Boxes(), CPU, 0, world)


# k-NN


@pytest.mark.parametrize("neighbours", [1, 7, 200])  # 200: more than there are
def test_knn_equals_brute_force(neighbours, monkeypatch):
    monkeypatch.setattr(online, "QUERY_CHUNK", 32)  # 70 queries: two chunks and a tail
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (70, 90))
    labels = torch.randint(4, (90,), generator=generator)
    found = online.knn(queries, Bank(keys, labels), Vote(neighbours, 0.2), World())
    for i, query in enumerate(queries):
        cosines = [float(query @ key / query.norm() / key.norm()) for key in keys]
        votes = [0.0] * 4
        for j in sorted(range(90), key=lambda j: -cosines[j])[:neighbours]:
            votes[labels[j]] += np.exp(cosines[j] / 0.2)
        assert found[i] == int(np.argmax(votes))


RANKS = """
import sys, weakref
sys.path.insert(0, sys.argv[1])
import torch
from driver.evaluation import online
from driver.data import make_images
from driver import config
from driver.evaluation.online import Bank, Vote
from driver.distributed import World

world = World.from_environment()
world.start(torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
queries, keys = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (71, 90))
labels = torch.randint(4, (90,), generator=generator)
own = slice(world.rank, None, world.size)
for neighbours in (1, 7, 200):
    bank = Bank(keys[own], labels[own])
    found = online.knn(queries[own], bank, Vote(neighbours, 0.2), world)
    whole = online.knn(queries, Bank(keys, labels), Vote(neighbours, 0.2), World())
    assert torch.equal(found, whole[own]), neighbours

data, cpu = (config.Data(batch_size=64), config.Boxes()), torch.device("cpu")
one = online.evaluate(online.pixels, make_images(*data, cpu, 0, World()), Vote(10), World())
all = online.evaluate(online.pixels, make_images(*data, cpu, 0, world), Vote(10), world)
assert one.keys() == all.keys() and len(one) == 6
for name, value in one.items():
    assert abs(value - all[name]) <= (1e-6 if name.startswith(("e", "f")) else 3e-3), (name, value, all[name])
assert one["knn"] == all["knn"] and one["knn_moved"] == all["knn_moved"]
group = weakref.ref(torch.distributed.group.WORLD)
world.end()
assert group() is None
"""


def on_ranks(W: int, *command: str) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={W}", *command)
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_ranks_share_the_features_and_find_the_same():
    """Three ranks, whose shares differ in size; 30 features a rank are fewer than the 200 neighbours."""
    Path("ranks.py").write_text(RANKS)
    on_ranks(3, "ranks.py", str(ROOT))


def test_evaluation_leaves_the_network_as_it_was():
    network = model.Network(config.Model(width=4), 1, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    first = online.evaluate(online.features(network.backbone), digits(), Vote(10), World())
    assert first == online.evaluate(online.features(network.backbone), digits(), Vote(10), World())
    assert network.training and same(before, dict(network.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)


# Linear probe and spread


def test_linear_probe_is_logistic_regression():
    """Against scikit-learn's, whose loss is the sum: C = 1 / (n DECAY)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 5, 0.1, 1, 2, 1]) + 3
    labels = (x[:, 0] + x[:, 1] / 5 + torch.randn(300, generator=generator) > 6).long() + 2 * (x[:, 5] > 4).long()
    ours = online.LinearProbe(x, labels, 4, World())
    z = (x - x.mean(0)) / x.std(0, correction=0)
    theirs = LogisticRegression(C=1 / (300 * online.DECAY), tol=1e-8, max_iter=1000).fit(z.numpy(), labels.numpy())
    logits = torch.from_numpy(theirs.decision_function(z.numpy()))
    found = ours.logits(ours.standardize(x)).detach()
    assert ((found - found.mean(1, keepdim=True) - logits + logits.mean(1, keepdim=True)).abs() <= 0.02).all()
    assert (ours.classify(x) == labels).float().mean() > 0.8


def test_linear_probe_of_constant_features():
    labels = torch.tensor([0, 1, 1] * 10)
    assert (online.LinearProbe(torch.ones(30, 4), labels, 2, World()).classify(torch.ones(5, 4)) == 1).all()


def test_spread_in_closed_form():
    """Orthogonal directions, equally frequent: k - 1 equal singular values after centring. Equal features: nothing."""
    for k, D in ((4, 4), (4, 16), (9, 16)):
        features = 7 * torch.eye(D)[:k].repeat(5, 1)
        found = online.spread(features, World())
        assert found["effective_rank"] == pytest.approx(k - 1, rel=1e-5)
        deviation = (k * np.sqrt(1 / k * (1 - 1 / k))) / D * np.sqrt(D)
        assert found["feature_std"] == pytest.approx(deviation, rel=1e-5)
    collapsed = online.spread(torch.ones(50, 8), World())
    assert collapsed["feature_std"] < 1e-6 and collapsed["effective_rank"] == pytest.approx(1, abs=1e-6)
    sphere = online.spread(torch.randn(20000, 8, generator=torch.Generator().manual_seed(0)), World())
    assert sphere["feature_std"] == pytest.approx(1, rel=0.01) and sphere["effective_rank"] == pytest.approx(
        8, rel=0.01
    )


# The scripts


def test_scripts_on_a_run_of_digits(capsys):
    directory = pretrain("--optim.epochs=1", "--model.teacher-momentum=0.9")
    of_run = frozen.Backbone(run=directory)
    found = knn.main(knn.Options(of_run, k=(1, 10)), World())
    assert set(found) == {1, 10} and all(0.5 < share <= 1 for share in found.values())
    assert "1-NN" in capsys.readouterr().out
    student = knn.main(knn.Options(frozen.Backbone(run=directory, whose="student"), k=(10,)), World())
    assert student[10] == history.read(directory).last("evaluation")["knn"] and student[10] != found[10]

    options = linear.Options(of_run, epochs=4, lr=(0.001, 0.3), test_every=2, norm=True, out=Path("out"))
    accuracy = linear.main(options, World())
    assert accuracy[0.3] > 0.5 > accuracy[0.001] > 0.1
    first, last = map(json.loads, Path("out/linear.jsonl").read_text().splitlines())
    assert first["epoch"] == 2 and last["top1"][1] <= last["top5"][1] <= 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_linear_on_ranks_is_that_of_one():
    """The batch norm's statistics are those of the whole batch, and so are the gradients."""
    directory = pretrain("--optim.epochs=1")
    options = {"epochs": 2, "lr": (0.3,), "norm": True}
    of_run, labels = frozen.Backbone(run=directory, device="cpu"), labelled.Labels(batch_size=64)
    linear.main(linear.Options(of_run, labels, out=Path("one"), **options), World())
    more = ["--backbone.device=cpu", "--data.batch-size=32", "--epochs=2", "--lr=0.3", "--norm=True", "--out=two"]
    on_ranks(2, str(ROOT / "driver/linear.py"), f"--backbone.run={directory}", *more)
    one, two = (torch.load(f"{out}/linear.pt", weights_only=True)["heads"] for out in ("one", "two"))
    assert one.keys() == two.keys() >= {"norm.running_mean", "norm.running_var", "layers.0.weight"}
    for name, value in one.items():
        assert ((two[name] - value).abs() <= 1e-4 * value.abs().max()).all(), name


def test_linear_resumes_bit_exactly():
    directory = pretrain("--optim.epochs=1")
    of_run = frozen.Backbone(run=directory)
    options = {"epochs": 4, "lr": (0.1,), "test_every": 2, "norm": True}
    linear.main(linear.Options(of_run, out=Path("straight"), **options), World())
    first = torch.load("straight/linear.pt", weights_only=True)
    real, seen = linear.train, []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    linear.train = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            linear.main(linear.Options(of_run, out=Path("broken"), **options), World())
    finally:
        linear.train = real
    linear.main(linear.Options(of_run, out=Path("broken"), resume=True, **options), World())
    assert same(first, torch.load("broken/linear.pt", weights_only=True))


def test_scripts_on_photographs_with_a_vit(capsys):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    from photographs import write_classes

    write_classes(Path("pets/train"), 6)
    write_classes(Path("pets/val"), 3)
    backbone = frozen.Backbone(name="test_vit", size=32)
    labels = labelled.Labels(root=Path("pets"), batch_size=4, workers=0)
    assert 0 <= knn.main(knn.Options(backbone, labels, k=(3, 13)), World())[3] <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("%  all 12 training images vote") and lines[-2].endswith("%")
    options = linear.Options(backbone, labels, epochs=1, blocks=2, average=True, lr=(0.1,), out=Path("out"))
    assert 0 <= linear.main(options, World())[0.1] <= 1
    (row,) = map(json.loads, Path("out/linear.jsonl").read_text().splitlines())
    assert row["top5"] is None and len(row["top1"]) == 1  # the true class is always among the first 5 of 2
    vit = backbone.load()
    images = torch.rand(2, 3, 64, 32)
    width = vit.features(torch.rand(1, 3, 32, 32)).shape[1]
    assert vit.for_linear(torch.rand(2, 3, 32, 32), 2, True).shape == (2, 3 * width)
    assert vit.patches(images).shape == (2, width, 4, 2)
    cnn = frozen.Backbone(name="resnet18", size=32).load()
    assert cnn.patches(images).shape == (2, 512, 2, 1)
    assert torch.equal(cnn.for_linear(images, 4, True), cnn.features(images))
    one_token = frozen.Backbone(name="xcit_nano_12_p16_224", size=32).load()  # DINO takes XCiT's features too
    assert torch.equal(one_token.for_linear(images, 4, True), one_token.features(images))
    with pytest.raises(UserError, match="--blocks 50: the backbone has 6"):
        linear.main(linear.Options(backbone, labels, blocks=50), World())


def test_crops_are_the_published_ones():
    """DINO's linear evaluation tests on Resize(256, bicubic) and CenterCrop(224); its training crops are bilinear."""
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    from driver.data import views

    test, train = (crop(224).transforms for crop in (views.published_crop, views.published_random_crop))
    assert test[2].size == [256] and test[2].interpolation is InterpolationMode.BICUBIC and test[3].size == (224, 224)
    theirs = RandomResizedCrop(224)
    assert train[1].antialias is True  # as Pillow does it
    for name in ("size", "scale", "ratio"):
        assert getattr(train[1], name) == getattr(theirs, name)
    assert InterpolationMode(train[1].interpolation) is theirs.interpolation
    assert train[2].p == 0.5


def test_augmented_crops_differ_by_epoch_and_not_by_rank():
    pytest.importorskip("torchvision")
    from photographs import write_classes

    write_classes(Path("pets/train"), 8)
    write_classes(Path("pets/val"), 2)
    labels = labelled.Labels(root=Path("pets"), batch_size=4, workers=0)

    def images(epoch: int, world: World) -> torch.Tensor:
        made = labels.load(config.Config(data=config.Data(source="folder")), 16, CPU, world)
        return torch.cat([batch for batch, _ in made.augmented(0, epoch)])

    whole = images(0, World())
    assert len(whole) == 16 and not torch.equal(whole, images(1, World()))
    assert torch.equal(torch.stack([images(0, World(rank, 2)) for rank in (0, 1)], dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize(
    "main, options, message",
    [
        (knn.main, knn.Options(), "give one of --backbone.run and --backbone.name"),
        (knn.main, knn.Options(frozen.Backbone(run=Path("no"))), "not the directory of a run"),
        (knn.main, knn.Options(frozen.Backbone(run=Path("no"), name="test_vit")), "give one of --backbone.run and"),
        (knn.main, knn.Options(frozen.Backbone(run=Path("no"), weights=Path("a.pt"))), "--backbone.weights a.pt: "),
        (
            linear.main,
            linear.Options(frozen.Backbone(run=Path("no"), heads=3)),
            "--backbone.heads 3: --backbone.run has",
        ),
        (linear.main, linear.Options(resume=True), "--resume needs --out"),
    ],
)
def test_bad_options(main, options, message):
    with pytest.raises(UserError, match=message):
        main(options, World())


@pytest.mark.parametrize(
    "script, args, message",
    [
        (knn, ["--k", "0"], "--k must be one or more numbers, each from 1 to 1,000,000,000, got 0"),
        (linear, ["--lr", "0.0"], "--lr must be one or more numbers, each above 0 and at most 1,000,000,000, got 0.0"),
        (linear, ["--epochs=0"], "--epochs must be from 1 to"),
        (knn, ["--data.batch-size=0"], "--data.batch-size must be from 1 to 1,000,000,000, got 0"),
        (linear, ["--data.workers=-1"], "--data.workers must be from 0 to 1,024, got -1"),
        (knn, ["--backbone.size=0"], "--backbone.size must be from 1 to 16,384, got 0"),
        (knn, ["--backbone.heads=-1"], "--backbone.heads must be from 0 to 65,536, got -1"),
        (segment_video, ["--davis=no", "--radius=-1"], "--radius must be from 0 to 1,000,000,000, got -1"),
        (segment_video, ["--davis=no", "--temperature=0"], "--temperature must be from 1e-06 to"),
    ],
)
def test_values_out_of_bounds(script, args, message, capsys):
    """Each script is started as its own command starts it."""
    assert cli.run_script(script.Options, script.main, args) == 1
    assert message in capsys.readouterr().err


def test_digits_have_no_backbone_for_photographs():
    with pytest.raises(UserError, match=r"--data.root pets: the backbone was trained on digits"):
        labelled.Labels(root=Path("pets")).load(config.Config(), 8, CPU, World())


def test_script_says_errors_once():
    command = [sys.executable, str(ROOT / "driver/knn.py"), "--backbone.run", "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "nowhere: not the directory of a run" in run.stderr and "Traceback" not in run.stderr


def test_an_error_does_not_command_the_terminal(capsys):
    """A name in it may come from anybody; the lines of a command to type stay lines."""

    def main(options: knn.Options, world: World) -> None:
        raise UserError("\x1b]0;title\x07.jpg: a fault\x9b31m. Type:\n\n    command")

    assert cli.run_script(knn.Options, main, []) == 1
    assert capsys.readouterr().err == "\nerror: \\x1b]0;title\\x07.jpg: a fault\\x9b31m. Type:\n\n    command\n"


def test_an_interrupted_script_says_so(capsys):
    def main(options: knn.Options, world: World) -> None:
        raise KeyboardInterrupt

    assert cli.run_script(knn.Options, main, []) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_error_is_written_in_one_piece(monkeypatch):
    """Several ranks write to one terminal: a line in two writes may have another rank's line in its middle."""
    pieces = []

    class Terminal(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            pieces.append(bytes(data))
            return len(data)

    def main(options: knn.Options, world: World) -> None:
        raise UserError("no such thing")

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Terminal()), line_buffering=True))
    assert cli.run_script(knn.Options, main, []) == 1
    assert pieces == [b"\nerror: no such thing\n"]
