"""Reports of a run: history, warnings of collapse, dashboard, page, gallery and trackers."""

import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from driver_runs import content, pretrain
from matplotlib.figure import Figure
from photographs import write_classes, write_images

from driver import checkpoint, cli, config, history, log, report, train
from driver.config import UserError
from driver.distributed import World
from driver.evaluation import online
from driver.reporting import gallery, outputs, page, plots, summary, trackers

REAL_WRITE = outputs.write


def record(*gaps: float) -> history.History:
    """History of a run with one epoch of 10 steps and one log line for each gap; 0 stands for uniform attention."""
    rows = history.History()
    numbers = {"knn": 0.5, "knn_moved": 0.4, "linear": 0.6, "linear_moved": 0.5}
    rows.add("pixels", 0, 0, **numbers)
    for epoch, gap in enumerate(gaps):
        rows.add("evaluation", 10 * epoch, epoch, **numbers, feature_std=0.5, effective_rank=7.0)
        curves = {"loss": 5 - gap, "uniform_loss": 5.0, "target_entropy": 1.0, "source_entropy": 3.0 if gap else 5.0}
        rows.add(
            "train",
            10 * epoch + 10,
            epoch + 1,
            **curves,
            collapse_gap=gap,
            column_residual=0.1,
            lr=0.1,
            images_per_s=9.0,
            data_wait=0.01,
        )
    return rows


# History


def test_history_is_on_the_disk_at_each_line_and_resumes_from_the_checkpoint():
    path = Path("history.jsonl")
    rows = history.History()
    rows.sinks.append(history.File(Path(), []))
    needed = dict.fromkeys(history.NUMBERS["train"], 1.0)
    rows.add("train", 1, 0.5, loss=1.5, column_residual=float("nan"), **needed)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "train", "step": 1, "epoch": 0.5, "loss": 1.5, "column_residual": None} | needed
    ]
    rows.add("train", 2, 1.0, loss=1.25, **needed)
    rows.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    assert history.read(Path()).rows == rows.rows
    # A resumed run starts from the rows of its checkpoint, and the file keeps no others.
    resumed = history.History(rows.rows[:1])
    resumed.sinks.append(history.File(Path(), resumed.rows))
    resumed.add("train", 2, 1.0, loss=7.0, **needed)
    resumed.close()
    assert [row["loss"] for row in history.read(Path()).rows] == [1.5, 7.0]
    assert history.read(Path()).last("train")["loss"] == 7 and history.read(Path()).epoch == 1


def test_nothing_waits_for_the_device_between_log_lines(monkeypatch):
    """Log.add may neither read a tensor's value nor print."""
    state = checkpoint.State(torch.nn.Linear(1, 1), None, None)
    lines = log.Log(state, Path(), 10, 1, 0, 4, World())
    stats = types.SimpleNamespace(**dict.fromkeys(log.CURVES[1:], torch.tensor(1.0)))

    def forbidden(*_):
        raise AssertionError("the host has read a tensor")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for _ in range(3):
        lines.add(0.1, torch.tensor(2.0), stats)
    monkeypatch.undo()
    state.step = 3
    lines.line()
    lines.close()
    (row,) = state.history.rows
    assert row["loss"] == 2 and row["column_residual"] == 1 and row["step"] == 3 and row["images_per_s"] > 0


# Collapse


def test_collapse_is_said_once_and_when_it_happens(capsys):
    """A target that is nearly flat teaches nothing: epsilon 5 with a layer norm."""
    options = ["--loss.epsilon=5", "--model.norm=layer", "--optim.epochs=8", "--run.log-every=1", "--run.eval-every=0"]
    first = pretrain(*options, "--optim.warmup-epochs=1", "--optim.lr=0.02", "--run.stop-after=6")
    said = capsys.readouterr().err
    (row,) = history.read(first).of("collapse")
    assert said.count("warning: training collapsed by step") == 1 and f"step {row['step']} " in said
    assert row["step"] > 2 and "half the --loss.epsilon" in said
    train.pretrain(cli.parse([f"--run.resume={first}"]))
    assert "collapsed by step" not in capsys.readouterr().err
    assert len(history.read(first).of("collapse")) == 1


def test_collapse_is_five_lines_after_the_warm_up():
    """10 steps of warm-up, a log line every 5 steps; a line away from the ceiling starts the count again."""
    state = checkpoint.State(torch.nn.Linear(1, 1), None, None)
    lines = log.Log(state, Path(), 10, 1, 10, 4, World())
    for gap in (0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0):
        add_line(lines, gap, 5.0)
    assert not state.history.of("collapse")
    for _ in range(3):
        add_line(lines, 0.001, 4.995)
    lines.close()
    (row,) = state.history.of("collapse")
    assert row["step"] == 55 and not state.history.of("ceiling")


def add_line(lines: log.Log, gap: float, source_entropy: float) -> None:
    lines.state.step += 5
    lines.note("train", collapse_gap=gap, uniform_loss=5.0, source_entropy=source_entropy)
    lines.warn()


@pytest.mark.parametrize("gap, where", [(-0.3, "0.30 nats above"), (0.0, "at")])
def test_a_loss_at_its_ceiling_with_unlike_features_is_no_collapse(gap, where, capsys):
    """The attention is not uniform. Every rank records the warning, and rank 0 alone prints it."""
    for rank in range(2):
        state = checkpoint.State(torch.nn.Linear(1, 1), None, None)
        lines = log.Log(state, Path(), 10, 1, 0, 4, World(rank, 2))
        for _ in range(7):
            add_line(lines, gap, 4.0)
        lines.close()
        (row,) = state.history.of("ceiling")
        assert row["step"] == 25 and not state.history.of("collapse")
    said = capsys.readouterr().err
    assert said.count(f"warning: the loss is {where} its ceiling log(N - T) by step 25") == 1
    assert "collapsed" not in said and "--loss.temperature of 0.1 or more" in said


def test_a_flat_target_is_said_as_such_and_not_as_collapse(capsys):
    """Epsilon 0.2 with the recipe's head: the loss ends above its ceiling, and the features are not alike."""
    directory = train.pretrain(cli.parse(["--loss.epsilon=0.2", "--optim.epochs=6", "--run.log-every=2"]))
    said, record = capsys.readouterr(), history.read(directory)
    assert record.last("evaluation")["feature_std"] > 0.3 and record.last("evaluation")["knn"] > 0.9
    assert record.last("train")["collapse_gap"] < -0.1 and not record.of("collapse")
    assert said.err.count("above its ceiling log(N - T) by step") == 1 and "collapsed by" not in said.err
    assert "above the value of collapsed features: the target is flat" in said.out
    assert "has collapsed" not in said.out and "with a sharper target" in said.out


def test_verdicts():
    options = config.Config(optim=config.Optim(epochs=3))
    good = " ".join(summary.verdict(record(0.5, 1.0, 2.0), options, 450))
    assert "Finished: 3 of 3 epochs." in good and "2.00 nats below" in good and "classify 50.0%" in good
    bad = " ".join(summary.verdict(record(0.5, *[0.0] * 5), config.Config(optim=config.Optim(epochs=9)), 450))
    assert "Stopped after 6 of 9 epochs." in bad and "Training has collapsed" in bad
    flat = " ".join(summary.verdict(record(*[-0.3] * 5), options, None))
    assert "Of the held-out" in flat and "0.30 nats above the value of collapsed features: the target is flat" in flat
    above = " ".join(summary.verdict(record(0.5, 0.2, -0.25), options, 450))
    assert "ended 0.25 nats above the value of collapsed features" in above and "collapsed:" not in above
    why, line = summary.next_step(record(0.5), options, Path("runs/x y"))
    assert why.startswith("from the beginning") and line.endswith("--config 'runs/x y/config.yaml'")
    Path("runs/x y").mkdir(parents=True)
    Path("runs/x y/checkpoint.pt").touch()
    why, _ = summary.next_step(record(0.5, 1.0), options, Path("runs/x y"))
    assert why == "the last epoch" and summary.epochs(1) == "1 epoch"
    why, line = summary.next_step(record(0.5), options, Path("runs/x y"))
    assert why == "the other 2 epochs" and line == "python driver/pretrain.py --run.resume 'runs/x y'"
    images = config.Config(recipe="images", data=config.Data(source="folder", root=Path("a b")))
    _, line = summary.next_step(record(*[0.5] * 100), images, Path("runs/a"))
    assert line == "python driver/pretrain.py --config runs/a/config.yaml --optim.epochs 200"
    _, line = summary.next_step(record(*[0.0] * 5), images, Path("runs/a"))
    assert line == "python driver/pretrain.py --config runs/a/config.yaml --loss.epsilon 0.0125"


# Dashboard and page


class Outside(HTMLParser):
    """Parser that lists what a page would fetch and counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "data", "action") and not value.startswith("data:image/"):
                self.fetched.append((tag, value))
        self.images += tag == "img"


def test_report_of_a_run_is_one_page_without_outside_resources(monkeypatch):
    monkeypatch.setattr(outputs, "write", REAL_WRITE)
    directory = pretrain("--optim.epochs=1")
    text = (directory / "report.html").read_text()
    outside = Outside()
    outside.feed(text)
    assert outside.fetched == [] and "@import" not in text and "url(" not in text
    # 9 panels; 8 images of 2 views; 8 queries with 7 neighbours; 2 projections.
    assert outside.images == 9 + 16 + 64 + 2
    for part in ("digits-001", "Views", "Nearest neighbours", "Projection", "Configuration", "head_width", "To go on"):
        assert part in text
    assert f"{history.read(directory).last('evaluation')['knn']:.1%}" in text
    assert 'class="right" alt="same class"' in text
    before = (directory / "dashboard.png").read_bytes()
    assert before[:4] == b"\x89PNG" and len(text) < 3e6
    (directory / "report.html").unlink()
    report.main(report.Report(directory, device="cpu"), World())
    again = (directory / "report.html").read_text()
    pictures = re.findall(r'src="(data:image/png[^"]*)"', text)
    assert pictures and re.findall(r'src="(data:image/png[^"]*)"', again) == pictures


def test_page_escapes_and_says_collapse():
    rows = record(0.5, *[0.0] * 5)
    rows.add("collapse", 20, 2.0, collapse_gap=0.0)
    text = page.page("<run>", rows, config.Config(), "<none>", 450, Path("runs/<run>"))
    assert "<run>" not in text and "&lt;run&gt;" in text and "No pictures: &lt;none&gt;." in text
    assert 'class="warning"' in text and "Training collapsed by step 20" in text and "It recovered" not in text
    flat = record(*[-0.3] * 5)
    flat.add("ceiling", 50, 5.0, collapse_gap=-0.3)
    text = page.page("run", flat, config.Config(), "none", 450, Path())
    assert "<b>The loss is 0.30 nats above its ceiling" in text and "ollapsed by" not in text
    better = record(0.0, 1.0)
    better.add("collapse", 10, 1.0, collapse_gap=0.0)
    assert "It recovered" in page.page("run", better, config.Config(), "none", 450, Path())
    good = record(1.0)
    text = page.page("run", good, config.Config(), "none", 450, Path())
    assert 'class="warning"' not in text and "<p>Recipe <b>digits</b></p>" in text
    good.add("backend", 10, 1.0, way="cuda slab")
    named = "<p>Recipe <b>digits</b>; loss computed by <b>cuda slab</b></p>"
    assert named in page.page("run", good, config.Config(), "none", 450, Path())


@pytest.mark.slow
def test_report_without_checkpoint_or_images(monkeypatch, capsys):
    """A report without pictures says whether the images or the checkpoint are missing, and has all other parts."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(outputs, "write", REAL_WRITE)
    write_classes(Path("pets"), 8)
    options = ["--data.root=pets", "--data.size=16", "--data.batch-size=8", "--data.workers=0", "--model.name=convnet"]
    directory = train.pretrain(cli.parse([*options, "--model.width=4", "--optim.epochs=1"]))
    capsys.readouterr()

    def made_again() -> str:
        (directory / "report.html").unlink(missing_ok=True)
        report.main(report.Report(directory, device="cpu"), World())
        return (directory / "report.html").read_text()

    assert "Nearest neighbours" in made_again()
    Path("pets").rename("elsewhere")
    text = made_again()
    assert re.search(r"No pictures: --data.root \S*pets: no such folder\.", text)
    assert "Curves" in text and "Nearest" not in text and "Of the held-out images" in text
    assert "note: no pictures; --data.root" in capsys.readouterr().out
    (directory / "checkpoint.pt").unlink()
    assert f"No pictures: {directory}: no checkpoint.pt yet." in made_again()
    (directory / "history.jsonl").write_text("")
    with pytest.raises(UserError, match=r"pets-001/history.jsonl: no log line and no evaluation in it"):
        made_again()
    (directory / "history.jsonl").unlink()
    with pytest.raises(UserError, match=r"not the directory of a run \(history.jsonl: No such file"):
        made_again()
    with pytest.raises(UserError, match=r"^nowhere: not the directory of a run, no config.yaml there"):
        report.main(report.Report(Path("nowhere")), World())


def test_panels_follow_what_was_recorded():
    assert len(plots.panels_of(record(1.0))) == 9
    rows = record(1.0)
    for row in rows.rows:
        for name in ("knn", "linear", "column_residual"):
            row.pop(name, None)
    assert [name for name, _ in plots.panels_of(rows)] == [
        "loss",
        "source entropy",
        "effective rank",
        "images per s",
        "data wait",
        "lr",
    ]
    plots.dashboard(rows, Path("few.png"))
    assert Path("few.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in plots.svg(plots.loss, rows)


def test_a_run_of_one_log_line_shows_points():
    """A line through a single point has no length."""
    for rows, seen in ((record(1.0), True), (record(1.0, 2.0), False)):
        for panel in (plots.loss, plots.entropies):
            axis = Figure().subplots()
            plots.draw(axis, panel, rows)
            assert axis.lines and all((line.get_marker() == "o") == seen for line in axis.lines)


def test_neighbours_are_the_nearest_and_never_the_image_itself():
    features = torch.eye(12) + 0.5 * torch.eye(12).roll(1, 0)  # each row is most like the next and the last one
    thumbnails = list(torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 2, 2))
    bank = gallery.EmbeddedImages(features, features, thumbnails, torch.arange(12) // 2)
    rows = gallery.neighbours(bank, bank, with_classes=True)
    uris = [gallery.data_uri(thumbnail) for thumbnail in thumbnails]
    for row in rows:
        query = uris.index(row[0].uri)
        assert len(row) == 8 and row[0].right is None
        assert {uris.index(picture.uri) for picture in row[1:3]} == {(query + 1) % 12, (query - 1) % 12}
        assert [picture.right for picture in row[1:3]].count(True) == 1
        assert row[0].uri not in [picture.uri for picture in row[1:]]


def test_gallery_of_local_views_has_a_row_of_both_sizes():
    pytest.importorskip("torchvision")
    write_images(Path("flat"), 9)
    options = config.Data(
        source="folder", root=Path("flat"), size=16, local_size=8, views=2, local_views=3, batch_size=4, workers=0,
        augmentation="simclr",
    )  # fmt: skip
    from driver.data import make_images

    images = make_images(options, config.Boxes(), torch.device("cpu"), 0, World())
    made = gallery.gallery(online.pixels, images, 0, 4)
    assert [len(row) for row in made.views] == [5] * 4
    assert all(picture.right is None for row in made.neighbours for picture in row)
    assert made.features.points.shape == (9, 2)


# TensorBoard and W&B


def test_tensorboard_has_the_curves(monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = pretrain("--optim.epochs=2", "--run.stop-after=1", "--run.tensorboard=True")
    train.pretrain(cli.parse([f"--run.resume={directory}"]))
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    rows = history.read(directory).of("train")
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows] and len(losses) == 2
    assert [event.step for event in events.Scalars("evaluation/knn")] == [0, 2, 4]
    (way,) = events.Tensors("backend/way/text_summary")
    assert way.tensor_proto.string_val == [content(directory)["backend"].encode()]


class FakeWandb(types.ModuleType):
    """Stand-in for the package wandb that records what it gets."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=RuntimeError)
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_curves_and_goes_on_in_the_same_run(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1", "--run.wandb=project")
    train.pretrain(cli.parse([f"--run.resume={directory}"]))
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["project"] == "project" and first["resume"] == "allow"
    assert first["config"]["loss"]["epsilon"] == 0.025 and wandb.finished == 2
    assert [step for step, scalars in wandb.logged if "train/loss" in scalars] == [2, 4]
    ways = [(step, scalars["backend/way"]) for step, scalars in wandb.logged if "backend/way" in scalars]
    assert ways == [(0, content(directory)["backend"])]
    assert "project" not in (directory / "wandb-id.txt").read_text()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'--run.wandb p needs wandb(.|\n)*pip install -e "\.\[wandb\]"'):
        trackers.Wandb("p", Path(), config.Config())
