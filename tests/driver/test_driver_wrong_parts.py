"""Checkpoints with parts of a wrong type, shape or value, which no checksum shows: each is one error on resuming."""

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from driver_runs import content, pretrain

from driver import checkpoint, cli, history, linear, report, train, weights
from driver.config import UserError

NAN = float("nan")
FIRST = "backbone.1.0.weight"


def put(*keys: object):
    """Function that replaces a part of a checkpoint; the last argument is the new value."""
    *path, last, value = keys

    def change(saved: dict) -> None:
        for key in path:
            saved = saved[key]
        saved[last] = value

    return change


def drop(*keys: object):
    *path, last = keys

    def change(saved: dict) -> None:
        for key in path:
            saved = saved[key]
        del saved[last]

    return change


def moment(name: str, value: object):
    return put("optimizer", "state", 0, name, value)


def scaler(**values: object):
    return put("scaler", {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9} | values)


def quantise(saved: dict) -> None:
    with warnings.catch_warnings(action="ignore"):  # torch plans to drop them; files with them stay
        saved["network"][FIRST] = torch.quantize_per_tensor(saved["network"][FIRST], 1, 0, torch.qint8)


ROW = {"kind": "train", "step": 1, "epoch": 0.5, "collapse_gap": 1.0, "uniform_loss": 1.0, "source_entropy": 1.0}
CHANGES = [
    (put("config", 3), "its config must be a dict of options, got 3"),
    (drop("config", "optim"), "not a checkpoint of this driver: no 'optim' in it"),
    (put("config", "model", [1]), "its config.model must be a dict of options, got a list"),
    (put("config", "model", "width", torch.ones(2)), r"its config.model.width must be .* got a tensor \(2,\)"),
    (put("epoch", "1"), "its epoch must be a whole number of at least 0, got '1'"),
    (put("epoch", -1), "its epoch must be .* got -1"),
    (put("epoch", NAN), "its epoch must be .* got nan"),
    (put("epoch", True), "its epoch must be .* got True"),
    (put("epoch", torch.ones(3)), r"its epoch must be .* got a tensor \(3,\)"),
    (put("step", 10**600), r"its step must be .* got 10{39};"),
    (drop("step"), "no 'step' in it"),
    (put("backend", [3]), "its backend must be a str or None, got a list"),
    (put("history", 3), "its history must be a list of rows, got 3"),
    (put("history", {"kind": "train"}), "its history must be a list of rows, got a dict"),
    (put("history", [1]), "row 0 of its history must be values with names, got a int"),
    (put("history", [{}]), "row 0 of its history must have a kind"),
    (put("history", [ROW, ROW | {"step": "1"}]), "row 1 of its history must have a step"),
    (put("history", [ROW | {"epoch": NAN}]), "row 0 of its history must have a finite number or text as 'epoch'"),
    (put("history", [ROW | {"loss": [1]}]), "row 0 of its history must have a finite number or text as 'loss'"),
    (put("history", [ROW | {"epoch": None}]), "row 0 of its history of kind 'train' must have epoch"),
    (put("history", [ROW | {"collapse_gap": "1"}]), "row 0 of its history of kind 'train' must have collapse_gap"),
    (put("history", [{"kind": "backend", "step": 1, "epoch": 1}]), "of kind 'backend' must have way"),
    (put("history", [{"kind": "evaluation", "step": 1, "epoch": 1, "knn": 1}]), "must have knn_moved"),
    (put("history", [{1: 2}]), "row 0 of its history must have names that are text, got int"),
    (put("images", [1]), "its images must be a dict, got a list"),
    (put("images", "digests", 3), "its images.digests must be a dict, got 3"),
    (put("images", "digests", {}), "no 'training' in it"),
    (put("images", "digests", "held_out", 3), "its images.digests.held_out must be text, got 3"),
    (put("images", "training", "a"), "its images.training must be .* got 'a'"),
    (put("network", None), "its network must be a dict of tensors, got None"),
    (put("network", [1]), "its network must be a dict of tensors, got a list"),
    (put("network", FIRST, "s"), f"its network.{FIRST} must be a plain tensor of floats, got 's'"),
    (put("network", 3, torch.ones(1)), "its names in network must be text, got 3"),
    (put("network", FIRST, torch.ones(3, 3).to_sparse()), "must be a plain tensor of floats, got .*sparse_coo"),
    (put("network", FIRST, torch.ones(4, 1, 3, 3, device="meta")), "must be a plain tensor of floats, got .*meta"),
    (
        put("network", FIRST, torch.ones(4, 1, 3, 3).to(torch.complex64)),
        "must be a plain tensor of floats, got .*complex",
    ),
    (quantise, "must be a plain tensor of floats, got .*qint8"),
    (put("network", FIRST, torch.ones(3)), f"does not fit .*size mismatch for {FIRST}"),
    (drop("network", FIRST), f'does not fit .*Missing key.* "{FIRST}"'),
    (put("teacher", 3), "its teacher must be a dict or None, got 3"),
    (put("optimizer", 3), "its optimizer must be a dict, got 3"),
    (put("optimizer", {}), "no 'state' in it"),
    (drop("optimizer", "param_groups"), "no 'param_groups' in it"),
    (put("optimizer", "param_groups", "ab"), "its optimizer.param_groups must be a list of dicts, got 'ab'"),
    (put("optimizer", "param_groups", []), r"its optimizer.param_groups must be for groups of \[\d+, \d+\] weights"),
    (put("optimizer", "param_groups", 0, "params", "ab"), "its optimizer.param_groups.params must be a list, got 'ab'"),
    (
        put("optimizer", "param_groups", 0, "params", 0, 1),
        "param_groups.params must be different numbers",
    ),
    (put("optimizer", "param_groups", 0, "params", 0, NAN), "params must be whole numbers, got nan"),
    (put("optimizer", "param_groups", 0, "step", "x"), "its optimizer.param_groups.step must be .* got 'x'"),
    (put("optimizer", "state", [1]), "its optimizer.state must be a dict, got a list"),
    (put("optimizer", "state", 99, {}), r"its optimizer.state must be of \d+ weights alone, got 99"),
    (put("optimizer", "state", 0, 3), "its optimizer.state.0 must be a dict, got 3"),
    (drop("optimizer", "state", 0, "exp_avg"), "its optimizer.state.0 lacks exp_avg"),
    (moment("exp_avg", torch.zeros(3)), r"state.0.exp_avg must be a plain tensor \(4, 1, 3, 3\) of floats, .*\(3,\)"),
    (moment("exp_avg_sq", torch.zeros(4, 1, 3, 3).to_sparse()), "state.0.exp_avg_sq must be .* got .*sparse"),
    (moment("exp_avg", "x"), "state.0.exp_avg must be .* got 'x'"),
    (moment("step", torch.tensor(NAN)), "state.0.step must be a finite number of at least 0"),
    (moment("step", torch.ones(2)), "state.0.step must be a finite number of at least 0"),
    (put("scaler", [1]), "its scaler must be a dict or None, got a list"),
    (put("boxes", "x"), "its boxes must be a Tensor or None, got 'x'"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[dict, bytes]:
    """Content of a run's checkpoint, and its options as a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(train.outputs, "write", lambda *_: None)
        run = pretrain("--optim.epochs=1", "--run.eval-every=0")
        return content(run), (run / "config.yaml").read_bytes()


def write(saved: tuple[dict, bytes], change) -> Path:
    """Directory of a run whose checkpoint was changed, and then given right checksums."""
    run = Path("runs/digits-001")
    run.mkdir(parents=True)
    (run / "config.yaml").write_bytes(saved[1])
    changed = copy.deepcopy(saved[0])
    change(changed)
    weights.save(changed, run / checkpoint.FILE)
    return run


@pytest.mark.parametrize("change, words", CHANGES, ids=[words[:40] for _, words in CHANGES])
def test_resuming_from_wrong_parts(change, words, saved):
    run = write(saved, change)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=f"^runs/digits-001/checkpoint.pt: .*{words}") as error:
        train.pretrain(cli.parse([f"--run.resume={run}", "--optim.epochs=2"]))
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_checkpoint_of_the_table_is_resumed(saved):
    run = write(saved, lambda _: None)
    assert content(train.pretrain(cli.parse([f"--run.resume={run}", "--optim.epochs=2"])))["epoch"] == 2


def test_the_way_back_from_wrong_parts(saved):
    run = write(saved, put("epoch", "x"))
    weights.save(saved[0], run / "epoch-0001.pt")
    os.utime(run / "epoch-0001.pt", (1, 1))
    os.link(run / checkpoint.FILE, run / "step-000000002.pt")  # newer, but as wrong
    with pytest.raises(UserError, match=f"got 'x'; .* that is whole is {run}/epoch-0001.pt: --run.resume {run}/"):
        train.pretrain(cli.parse([f"--run.resume={run}", "--optim.epochs=2"]))


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, "no '_growth_tracker' in it"),
        ({"_growth_tracker": "x"}, "its scaler._growth_tracker must be .* got 'x'"),
        ({"_growth_tracker": 0, "scale": NAN}, "its scaler.scale must be a positive, finite number, got nan"),
        ({"_growth_tracker": 0, "growth_interval": torch.ones(2)}, "its scaler.growth_interval must be"),
    ],
)
def test_a_scaler_that_is_wrong(values, words, saved):
    run = write(saved, scaler(**values))
    with pytest.raises(UserError, match=words):
        train.pretrain(cli.parse([f"--run.resume={run}", "--optim.epochs=2", "--run.dtype=float16"]))


@pytest.mark.parametrize("boxes", [torch.ones(3, 4), torch.full((7, 4), NAN), torch.ones(7, 4).int(), torch.ones(7)])
def test_boxes_that_are_wrong(boxes):
    with pytest.raises(ValueError, match=r"its boxes must be a plain tensor \(7, 4\) of finite floats"):
        weights.run_contents.check_boxes(boxes, 7)
    weights.run_contents.check_boxes(torch.ones(7, 4), 7)


@pytest.mark.parametrize(
    "change, words",
    [
        (put("network", [1]), "no backbone in it"),
        (put("config", "model", "heads", torch.ones(2)), "its config.model.heads must be a whole number"),
        (put("network", FIRST, torch.ones(4, 1, 3, 3).to_sparse()), "tensors that are not plain numbers .*sparse_coo"),
        (put("network", FIRST, torch.ones(4, 1, 3, 3).to(torch.complex64)), "0.weight is torch.complex64"),
        (
            quantise,
            "not plain numbers .*qint8",
        ),
    ],
)
def test_weights_from_wrong_parts(change, words, saved):
    run = write(saved, change)
    with pytest.raises(UserError, match=f"^{run}/checkpoint.pt: .*{words}"):
        pretrain(f"--model.weights={run / checkpoint.FILE}")


def test_a_pretrained_model_that_nobody_knows(saved):
    """Colours of an unknown model are not compared; its weights are loaded."""

    def change(found: dict) -> None:
        found["config"]["model"] |= {"pretrained": True, "name": "nobody_knows"}

    run = write(saved, change)
    assert content(pretrain(f"--model.weights={run / checkpoint.FILE}", "--optim.epochs=1"))["epoch"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (put("epoch", "1"), "its epoch must be a whole number of at least 0, got '1'; another --out"),
        (put("origin", [1]), "its origin must be a dict, got a list"),
        (put("origin", {"a": torch.ones(2)}), "its origin must be a dict of numbers, text and lists"),
        (put("origin", {"a": 1}), "does not fit these options: 'a'"),
        (put("heads", 3), "its heads must be a dict of tensors, got 3"),
        (put("heads", "layers.0.weight", "s"), "its heads.layers.0.weight must be a plain tensor of floats"),
        (
            moment("momentum_buffer", torch.ones(9)),
            r"momentum_buffer must be a plain tensor \(2, 2\) of floats",
        ),
    ],
)
def test_layers_of_linear_evaluation(change, words):
    heads = linear.Heads(2, 2, 1, False, train.World())
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    heads(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = {"heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1, "origin": {}}
    change(found)
    weights.save(found, Path(linear.LAYERS))
    with pytest.raises(UserError, match=f"^linear.pt: .*{words}"):
        linear.load(linear.Options(out=Path()), heads, optimizer, {})


@pytest.mark.parametrize("line", ["{", "3", "[1]", "null", '{"kind": 3}', '{"kind": "train", "step": 1, "epoch": NaN}'])
def test_a_history_with_a_damaged_line(line, saved):
    """A last line that was cut short is left out; others are not."""
    run = write(saved, lambda _: None)
    path = run / history.FILE
    path.write_text("".join(f"{text}\n" for text in (json.dumps(ROW), line, json.dumps(ROW))))
    with pytest.raises(UserError, match=rf"^{path}: line 2 .*--run.resume {run} writes again"):
        report.main(report.Report(run), train.World())
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(UserError, match=rf"^{path}: line 2 "):
        history.read(run)
    path.write_text(f"{json.dumps(ROW)}\n{line}")
    assert history.read(run).rows == [ROW]
