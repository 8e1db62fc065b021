"""The driver on several ranks (real processes over gloo, started by torchrun) and with virtual batches."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import driver_ranks
import pytest
import torch
from driver_runs import ROOT, torchrun
from photographs import write_images

from driver import checkpoint, cli, config, data, exits, history, train, verify_resume
from driver.config import UserError
from driver.distributed import World
from driver.evaluation import online

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")

# 42 steps an epoch of 32 digits. Nothing but the loss mixes images, so the split of a step must not matter.
STEP, EPOCHS = 32, 3
RUN = ["--model.norm=layer", "--model.width=8", f"--optim.epochs={EPOCHS}", "--optim.warmup-epochs=1"]
RUN += ["--loss.epsilon=0.01", "--run.log-every=1", "--run.eval-every=0", "--run.device=cpu"]
FLOAT64_SGD = [*RUN, "--run.dtype=float64", "--optim.name=sgd", "--optim.lr=0.01"]
CURVES = ("loss", "target_entropy", "source_entropy", "uniform_loss", "lr")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, threads):
    """Runs are written under the current directory. One thread, as torchrun gives to each rank."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def alone(*options: str) -> Path:
    return train.pretrain(cli.parse(list(options)))


def difference(a: Path, b: Path) -> float:
    """The largest of the curves', over all steps. Both have every step once."""
    logs = [history.read(directory).of("train") for directory in (a, b)]
    assert [[entry["step"] for entry in log] for log in logs] == [list(range(1, len(logs[0]) + 1))] * 2
    return max(abs(x[name] - y[name]) for x, y in zip(*logs, strict=True) for name in CURVES)


# The objective does not depend on the split


CROPS = [*FLOAT64_SGD, "--data.size=16", "--data.local-views=2", "--data.local-size=8"]
CROPS += ["--data.augmentation=dino", "--data.workers=1", "--model.name=convnet", "--optim.epochs=4"]
CROPS += ["--boxes.every=2", "--model.teacher-momentum=0.9", "--model.teacher-views=all"]
BOXES = ["--data.size=32", "--data.batch-size=2", "--data.workers=0", "--run.eval-every=0"]
BOXES += ["--model.name=convnet", "--model.width=4", "--boxes.every=1", "--boxes.after=3", "--optim.epochs=4"]
BOXES += ["--run.deterministic=True", "--boxes.threshold=0.5"]


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """In this current directory and with one thread, for fixtures of the whole module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with chdir(folder):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    """126 steps on one rank, in one batch each."""
    with in_folder(tmp_path_factory.mktemp("one")):
        directory = alone(*FLOAT64_SGD, f"--data.batch-size={STEP}").absolute()
    log = history.read(directory).of("train")
    assert len(log) == 126 > 100 and log[-1]["collapse_gap"] > log[0]["collapse_gap"] + 0.3  # it learns
    return directory


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Path]:
    """Directories of runs of two ranks on the digits, made by the same processes; "resumed" was begun on one rank."""
    with in_folder(tmp_path_factory.mktemp("two")):
        resumed = alone(*FLOAT64_SGD, f"--data.batch-size={STEP}", "--run.stop-after=1")
        runs = {
            "resumed": [f"--run.resume={resumed}", "--data.batch-size=8", "--run.stop-after=2"],
            "plain": [*FLOAT64_SGD, "--data.batch-size=16"],
            "batch norms": [*RUN, "--model.norm=batch", "--optim.epochs=1", "--optim.warmup-epochs=0"],
        }
        printed = driver_ranks.in_turn(2, *runs.values())
        assert printed.count("written: ") == len(runs)
        return {name: Path(f"runs/digits-{number:03d}").absolute() for number, name in enumerate(runs, start=1)}


@pytest.fixture(scope="module")
def two_ranks_on_images(tmp_path_factory) -> dict[str, Path]:
    """Directories of runs of two ranks on a folder, made by the same processes; "broken" is resumed for its end."""
    pytest.importorskip("torchvision")
    with in_folder(tmp_path_factory.mktemp("images")):
        write_images(Path("few/flat"), 19)
        write_images(Path("more/flat"), 24)
        boxes = [*BOXES, "--data.root=more/flat"]
        runs = [
            [*CROPS, "--data.root=few/flat", "--data.batch-size=4", "--run.name=crops"],
            [*boxes, "--run.name=unbroken"],
            [*boxes, "--run.name=broken", "--run.stop-after=3"],
            ["--run.resume=runs/broken-001", "--run.stop-after=4"],
        ]
        printed = driver_ranks.in_turn(2, *runs)
        assert printed.count("written: ") == len(runs)
        return {name: Path(f"runs/{name}-001").absolute() for name in ("crops", "unbroken", "broken")}


def equal_runs(a: Path, b: Path) -> None:
    assert difference(a, b) <= 1e-9
    first, second = (torch.load(directory / checkpoint.FILE, weights_only=True) for directory in (a, b))
    assert first.keys() == second.keys() and first["step"] == second["step"]
    for name, value in first["network"].items():
        assert value.dtype == torch.float64 and ((value - second["network"][name]).abs() <= 1e-9).all(), name
    tests = [history.read(directory).last("evaluation") for directory in (a, b)]
    assert tests[0].keys() == tests[1].keys() >= {"knn", "knn_moved", "linear", "linear_moved", "effective_rank"}
    for name, value in tests[0].items():
        assert value == tests[1][name] or abs(value - tests[1][name]) <= 1e-6, name
    for content in (first, second):
        content["config"]["data"].pop("batch_size")  # the virtual batch is kept, and the same
    assert first["config"] == second["config"]


def test_micro_batches_give_the_same_curve(one_rank):
    equal_runs(alone(*FLOAT64_SGD, "--data.batch-size=16", "--virtual-batch=32"), one_rank)


def test_two_ranks_give_the_same_curve(one_rank, two_ranks):
    equal_runs(two_ranks["plain"], one_rank)


def test_resumed_on_two_ranks_in_micro_batches(one_rank, two_ranks):
    """One epoch on one rank, the others on two ranks with two micro-batches each; then it is one rank's again."""
    alone(f"--run.resume={two_ranks['resumed']}", f"--data.batch-size={STEP}")
    equal_runs(two_ranks["resumed"], one_rank)


ENDING = f"""
import sys, weakref
sys.path.insert(0, {str(ROOT)!r})
from torch.distributed import group
from driver.pretrain import main
from driver.distributed import World
def end_and_see(self):
    held = weakref.ref(group.WORLD)
    end(self)
    assert held() is None
    print("the group has gone")
end, World.end = World.end, end_and_see
sys.exit(main())
"""


@pytest.mark.slow
def test_nothing_holds_the_group_at_the_end():
    """Threads of gloo that are still there when Python ends may abort the process."""
    Path("ending.py").write_text(ENDING)
    run = torchrun(2, *RUN, "--optim.epochs=1", "--optim.warmup-epochs=0", script=Path("ending.py"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the group has gone") == 1


FULL = f"""
import atexit, errno, os, sys
sys.path.insert(0, {str(ROOT)!r})
from driver import checkpoint
from driver.pretrain import main
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "last.pt")
checkpoint.save = full
atexit.register(os.abort)  # as gloo's threads sometimes do while the interpreter shuts down
sys.exit(main())
"""


@pytest.mark.slow
def test_a_full_disk_ends_both_ranks():
    """The first rank alone writes; the other is in the midst of training then."""
    Path("full.py").write_text(FULL)
    run = torchrun(2, *RUN, "--run.save-steps=2", script=Path("full.py"))
    assert run.returncode == 1 and run.stderr.count("the disk is full") == 1, run.stderr
    assert "SIGABRT" not in run.stderr, run.stderr


@pytest.mark.slow
def test_with_a_teacher_and_three_views():
    options = [*FLOAT64_SGD, "--model.teacher-momentum=0.9", "--data.views=3", "--optim.epochs=1"]
    equal_runs(
        alone(*options, "--data.batch-size=8", "--virtual-batch=32"), alone(*options, f"--data.batch-size={STEP}")
    )


@pytest.mark.slow
def test_crops_of_two_sizes_around_boxes_on_two_ranks(two_ranks_on_images):
    """Boxes come from both ranks' shares of the images; the run is one rank's."""
    write_images(Path("flat"), 19)
    one, two = alone(*CROPS, "--data.root=flat", "--data.batch-size=8"), two_ranks_on_images["crops"]
    equal = [torch.load(directory / checkpoint.FILE, weights_only=True) for directory in (one, two)]
    assert difference(one, two) <= 1e-9 and equal[0]["boxes"].unique(dim=0).shape[0] > 1
    assert torch.equal(equal[0]["boxes"], equal[1]["boxes"])


@pytest.mark.slow
def test_a_broken_run_of_two_ranks_goes_on_bit_for_bit(capsys):
    options = "--model.width=4 --optim.epochs=4 --run.eval-every=0"
    assert verify_resume.verify(verify_resume.Verify(options, breaks=1, save_steps=1, ranks=2)) == 0
    assert "equal bit for bit after SIGKILL at steps" in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_between_epochs_on_two_ranks_bit_for_bit(two_ranks_on_images):
    """With batch norms, whose statistics are each rank's own, and boxes around what the network sees with them."""
    directories = (two_ranks_on_images[name] for name in ("unbroken", "broken"))
    first, second = (torch.load(directory / checkpoint.FILE, weights_only=True) for directory in directories)
    for part in verify_resume.PARTS:
        assert verify_resume.same(first[part], second[part]), part


def test_evaluation_on_two_ranks_is_that_of_the_checkpoint(two_ranks):
    """Batch norms have the first rank's statistics then, on every rank."""
    directory = two_ranks["batch norms"]
    saved = history.read(directory).last("evaluation")
    run = train.Training(cli.parse([f"--run.resume={directory}"]), torch.device("cpu"), World(0, 1))
    found = online.evaluate(
        online.features(run.network.backbone), run.images, online.Vote(run.options.run.neighbours), run.world
    )
    for name, value in found.items():
        rounding = {"abs": 0.01} if name.startswith("linear") else {"rel": 1e-4}
        assert saved[name] == pytest.approx(value, **rounding), name


def test_float32_adamw_stays_close():
    """Rounding grows along a run; the largest difference of the curves over these 42 steps is about 5e-7."""
    options = [*RUN, "--optim.lr=1e-3", "--optim.epochs=1"]
    one = alone(*options, f"--data.batch-size={STEP}")
    assert 0 < difference(alone(*options, "--data.batch-size=16", "--virtual-batch=32"), one) < 1e-4


def steps(images, epoch: int) -> list[list[torch.Tensor]]:
    return [[part.unflatten(0, (2, -1)) for (part,) in parts] for parts in images.views(epoch)]


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_images_of_a_step_do_not_depend_on_the_split(kind):
    """Joined over micro-batches, then ranks: the same images in the same order with the same augmentation."""
    if kind == "folder":
        pytest.importorskip("torchvision")
        write_images(Path("flat"), 27)

    def joined(W: int, batch_size: int) -> list[torch.Tensor]:
        options = config.Data(batch_size=batch_size, virtual_batch=8, workers=0)
        if kind == "folder":
            options = dataclasses.replace(options, source="folder", augmentation="simclr", root=Path("flat"), size=16)
        ranks = []
        for rank in range(W):
            images = data.make_images(options, config.Boxes(), torch.device("cpu"), 3, World(rank, W))
            ranks.append([torch.cat(parts, dim=1) for parts in steps(images, epoch=2)])
            assert all(len(parts) == 8 // W // batch_size for parts in images.views(2))
        return [torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True)]

    whole = joined(1, 8)
    assert len(whole) == (27 if kind == "folder" else 1347) // 8 and whole[0].shape[:2] == (2, 8)
    assert not torch.equal(whole[0][0], whole[0][1]) and not torch.equal(whole[0], whole[1])
    for W, batch_size in ((1, 4), (2, 4), (2, 2), (4, 2)):
        assert all(map(torch.equal, joined(W, batch_size), whole)), (W, batch_size)


# What is said, and once


def test_virtual_batch_that_does_not_divide():
    message = "--data.virtual-batch must be a multiple of batch_size times ranks, 128 x 1 = 128, got 100"
    with pytest.raises(UserError, match=message):
        alone("--virtual-batch=100")
    with pytest.raises(
        UserError, match="1347 images to train on, fewer than one batch of 2048; a smaller --virtual-batch"
    ):
        alone("--virtual-batch=2048")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, code, message",
    [
        (
            ["--virtual-batch=40"],
            1,
            "error: --data.virtual-batch must be a multiple of batch_size times ranks, 128 x 2 = 256",
        ),
        (["--data.nonsense=1"], 1, "--data.nonsense"),
        (["--optim.lr=1e9", "--model.width=4", "--data.batch-size=64"], 1, "error: stopped at step "),
        (["--help"], 0, "Images per optimiser step, over all ranks and micro-batches"),
    ],
)
def test_errors_and_help_are_said_once(options, code, message):
    run = torchrun(2, *options)
    said = " ".join((run.stdout + run.stderr).replace("│", " ").split())
    assert run.returncode == code and said.count(message) == 1, said
    assert 'pretrain.py", line' not in said  # no rank's traceback


@pytest.mark.slow
def test_error_of_one_rank_ends_both():
    """The file is in one rank's half of the batch; the other rank, which loses its partner, says nothing."""
    pytest.importorskip("torchvision")
    write_images(Path("flat"), 8)
    Path("flat/03.png").write_bytes(b"not a picture")
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=4", "--model.name=convnet", "--model.width=4"]
    run = torchrun(2, *options, "--data.workers=0", "--data.max-unreadable=0")
    assert run.returncode == 1
    assert run.stderr.count("error: flat/03.png: not a readable image") == 1
    assert 'pretrain.py", line' not in run.stderr


GLOO = "[/pytorch/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:57258: Connection reset by peer. GLHF!"


class Gone:
    """Store that has ended with rank 0, or one that counts."""

    def __init__(self, failures: int | None) -> None:
        self.failures = failures

    def add(self, _: str, more: int) -> int:
        if self.failures is None:
            raise torch.distributed.DistNetworkError("Broken pipe")
        self.failures += more
        return self.failures


@pytest.mark.parametrize("failures, lines", [(0, 1), (None, 1), (1, 0)])
def test_a_rank_that_was_killed_is_one_line_on_the_others(failures, lines, monkeypatch, capsys):
    """Unless the rank that has ended could say why: then it has."""
    world = World(1, 2, 1, Gone(failures))
    monkeypatch.setattr(exits.World, "from_environment", lambda: world)

    def run(_: World) -> int:
        raise RuntimeError(GLOO)

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert exits.exit_code(run) == 1
    said = capsys.readouterr().err.strip()
    assert said.count("another rank has ended.") == lines == len(said.splitlines())


def test_an_error_of_our_own_on_a_rank_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(exits.World, "from_environment", lambda: World(0, 2, 0, Gone(0)))

    def run(_: World) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        exits.exit_code(run)
