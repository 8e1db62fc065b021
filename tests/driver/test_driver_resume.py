"""What a resumed run keeps, what may change, and options that could have no effect."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from driver_runs import ROOT, content, pretrain, torchrun

from bam_kernels.whole_files import replacing
from driver import checkpoint, cli, config, linear, train
from driver import pretrain as program
from driver.config import UserError
from driver.data import inventory
from driver.data.labelled import Labels
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.weights import read

PHOTOGRAPHS = ["--data.root=pets", "--data.size=16", "--data.batch-size=4", "--data.workers=0", "--data.held-out=0.25"]
PHOTOGRAPHS += ["--model.name=convnet", "--model.width=4", "--model.head-width=8", "--model.head-dim=8"]
PHOTOGRAPHS += ["--optim.epochs=2", "--run.save-every=1", "--run.eval-every=0"]
NEW_RUN = "without --run.resume, --model.weights RUN_DIR starts a new run from its backbone"


def run_on_photographs(*options: str) -> Path:
    """Directory of a run that has done one of two epochs of 6 or, with --data.held-out=0, 8 photographs."""
    pytest.importorskip("torchvision")
    from photographs import write_classes

    write_classes(Path("pets"), 4)
    return train.pretrain(cli.parse([*PHOTOGRAPHS, "--run.stop-after=1", *options]))


def resume(directory: Path, *options: str) -> dict:
    """Content of the checkpoint after a resumed run."""
    return content(train.pretrain(cli.parse([f"--run.resume={directory}", *options])))


def rewrite(directory: Path, change) -> None:
    """Change the content of a run's checkpoint."""
    saved = content(directory)
    change(saved)
    with replacing(directory / checkpoint.FILE) as temporary:
        torch.save(saved, temporary)


# Images


def test_other_images_are_refused(capsys):
    """The checkpoint and the list of images stay as they were; the images back at their place are resumed."""
    directory = run_on_photographs()
    files = [directory / name for name in (checkpoint.FILE, inventory.FILE, config.FILE)]
    before = [file.read_bytes() for file in files]
    assert content(directory)["images"]["digests"] == inventory.read(directory).digests
    name = inventory.read(directory).training.splitlines()[0].split(b"\t")[2].decode()
    path = Path("pets") / name
    size = path.stat().st_size
    path.rename(path.with_name("99.png"))
    assert program.main([f"--run.resume={directory}"]) == 1
    said = capsys.readouterr().err
    assert f"training image 0 (from 0) was {name} of {size:,} bytes, is cats/0" in said
    assert f"Bring its images back, or {NEW_RUN}" in said
    assert [file.read_bytes() for file in files] == before
    path.with_name("99.png").rename(path)
    Path("pets").rename("moved")
    assert resume(directory, "--data.root=moved")["step"] == 2
    assert [file.read_bytes() for file in files[1:2]] == before[1:2]


def test_another_root_is_named_with_the_first_other_image():
    directory = run_on_photographs()
    shutil.copytree("pets", "other")
    for path in Path("other/dogs").iterdir():
        path.write_bytes(bytes(3))
    message = (
        r"was dogs/0..png of 1,\d+ bytes, is dogs/0..png of 3 bytes; 6 training images then, 6 now; --data.root /\S+/"
    )
    with pytest.raises(UserError, match=message):
        resume(directory, "--data.root=other")


def test_other_held_out_images():
    directory = run_on_photographs()
    name = inventory.read(directory).held_out.splitlines()[0].split(b"\t")[2].decode()
    (Path("pets") / name).write_bytes(bytes(3))
    with pytest.raises(UserError, match=rf"held-out image 0 \(from 0\) was {name} of .* bytes, is {name} of 3 bytes"):
        resume(directory)


def test_a_checkpoint_that_knows_no_images(capsys):
    """Checkpoints of the first commits have their number alone; the resumed run adds the digests."""
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1")
    digests = content(directory)["images"]["digests"]
    rewrite(directory, lambda saved: saved["images"].pop("digests"))
    (directory / inventory.FILE).unlink()
    assert resume(directory)["images"]["digests"] == digests == inventory.read(directory).digests
    assert "does not know its images: only their number was compared" in capsys.readouterr().out
    rewrite(directory, lambda saved: saved["images"].update(digests=None, training=1346))
    with pytest.raises(UserError, match="its run has 1346 training images, 512 per step; the options give 1347 train"):
        resume(directory)


@pytest.mark.slow
def test_every_rank_ends_over_other_images():
    directory = run_on_photographs("--data.batch-size=2", "--virtual-batch=4")
    assert torchrun(2, f"--run.resume={directory}", "--run.stop-after=2").returncode == 0
    Path("pets/cats/00.png").write_bytes(bytes(3))
    ended = torchrun(2, f"--run.resume={directory}", "--optim.epochs=3")
    assert (
        ended.returncode == 1 and ended.stderr.count("error: runs/pets-001/checkpoint.pt: its run has other ima") == 1
    )


# Options


@pytest.mark.parametrize(
    "option, kept",
    [
        ("--model.weights=/no/such.file", "weights"),
        ("--model.pretrained=True", "weights"),
        ("--model.name=resnet18", "networks"),
        ("--model.norm=layer", "networks"),
        ("--model.heads=2", "networks"),
        ("--model.positions=sincos", "networks"),
        ("--model.frozen-patches=True", "networks"),
        ("--model.activation=gelu", "networks"),
        ("--model.teacher-momentum=0", "teacher"),
        ("--optim.name=sgd", "optimiser's state"),
        ("--data.held-out=0.5", "training images"),
        ("--run.name=other", "directory"),
    ],
)
def test_what_only_a_new_run_can_take(option, kept, monkeypatch):
    """Refused before anything is loaded; the run's own value is not."""
    config.save(cli.parse(["--model.teacher-momentum=0.9"]), Path())
    name, value = option.split("=")
    with pytest.raises(UserError) as error:
        cli.parse(["--run.resume=.", option])
    assert re.fullmatch(
        rf"{name} {value}(\.0)? \(the run has .+\): a resumed run keeps its {kept}; leave the option out, or {NEW_RUN}",
        str(error.value),
    )
    part, field = name.strip("-").replace("-", "_").split(".")
    same = yaml.safe_load(Path(config.FILE).read_text())[part][field]
    cli.parse(["--run.resume=.", f"{name}={same}"])


def test_every_such_option_exists_and_is_on_the_page():
    plain = config.as_plain(config.Config())
    fixed = [option for options in checkpoint.FIXED.values() for option in options]
    for part, name in (option.split(".") for option in [*checkpoint.REPORT, *fixed]):
        assert name in plain[part]
    page = (ROOT / "docs/driver/machines.md").read_text()
    row = next(line for line in page.splitlines() if "refused unless" in line)
    named = re.findall(r"`(?:--(?:data|optim|run|model)\.)?([a-z-]+)`", row)
    assert sorted(named) == sorted(
        option.split(".")[1].replace("_", "-") for option in fixed if option != "model.teacher_momentum"
    )


def test_an_edited_file_of_options_is_checked_too():
    """A ViT with other heads has weights of the same shapes."""
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1")
    path = directory / config.FILE
    path.write_text(path.read_text().replace("activation: relu", "activation: gelu"))
    with pytest.raises(
        UserError, match=r"--model.activation gelu \(the run has relu\): a resumed run keeps its networks"
    ):
        resume(directory)


def test_a_network_for_another_size():
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1")
    message = r"does not fit --data.size 16 \(the run has 8\): Missing key\(s\) in state_dict: [^\n]+$"
    with pytest.raises(UserError, match=message):
        resume(directory, "--data.size=16")


def test_the_file_of_initial_weights_may_go():
    first = pretrain("--optim.epochs=1")
    shutil.copy(first / checkpoint.FILE, "weights.pt")
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1", "--model.weights=weights.pt")
    shutil.move("weights.pt", "moved.pt")
    assert resume(directory)["step"] == 4
    assert "weights.pt" in content(directory)["config"]["model"]["weights"]


def test_options_when_no_epoch_is_left():
    """Options that fit the report to a machine still count."""
    directory = pretrain("--optim.epochs=2")
    for option, message in {
        "--run.stop-after=1": "--run.stop-after 1 must be larger than the number of epochs that are done, 2",
        "--optim.epochs=1": "--optim.epochs 1 (the run has 2) does nothing: all epochs are done, 2 of 1; a larger ",
        "--loss.epsilon=0.5": "--loss.epsilon 0.5 (the run has 0.025) does nothing: all epochs are done, 2 of 2; ",
        "--run.save-every=3": "--run.save-every 3 (the run has 10) does nothing: all epochs are done, 2 of 2; ",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            resume(directory, option)
    assert resume(directory, "--run.device=cpu", "--loss.backend=reference")["step"] == 4


def test_a_teacher_that_comes_later_begins_as_the_student():
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1", "--optim.lr=0")
    before = content(directory)
    resumed = resume(directory, "--model.teacher-momentum=0.9", "--run.seed=9")  # new weights would be others
    assert before["teacher"] is None and resumed["step"] == 4
    weights = {name for name, value in before["network"].items() if name.endswith("weight") and value.ndim > 1}
    assert weights and all(torch.equal(resumed["teacher"][name], before["network"][name]) for name in weights)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.local-size=7"], "--data.local-size 7 does nothing where --data.local-views is 0"),
        (["--data.local-scale", "0.1", "0.2"], "--data.local-scale 0.1 0.2 does nothing where --data.local-views "),
        (["--data.blur=0.1"], "--data.blur 0.1 does nothing where --data.augmentation is digits"),
        (["--optim.momentum=0.5"], "--optim.momentum 0.5 does nothing where --optim.name is adamw"),
    ],
)
def test_options_that_others_make_idle(options, message):
    config.save(cli.parse([]), Path())
    for before in ([], ["--run.resume=."]):
        with pytest.raises(UserError, match=re.escape(message)):
            cli.parse([*before, *options])


def test_boxes_end_where_they_are_switched_off():
    directory = run_on_photographs("--boxes.every=1", "--run.stop-after=2", "--optim.epochs=3")
    assert content(directory)["boxes"] is not None
    assert resume(directory, "--boxes.every=0")["boxes"] is None


# Options that are newer than the run


def without(part: str, name: str, options: dict) -> dict:
    return {**options, part: {option: value for option, value in options[part].items() if option != name}}


def test_an_option_that_is_newer_than_the_run(capsys):
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1", "--optim.clip-norm=3")
    path = directory / config.FILE
    plain = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(without("data", "global_scale", without("optim", "clip_norm", plain))))
    with pytest.raises(UserError, match=r"damaged options .*: no data.global_scale in it; each checkpoint has a copy"):
        cli.parse([f"--run.resume={directory}"])
    rewrite(directory, lambda saved: saved.update(config=yaml.safe_load(path.read_text())))
    options = cli.parse([f"--run.resume={directory}"])
    assert (
        "note: the run is older than --data.global-scale --optim.clip-norm: the defaults hold"
        in capsys.readouterr().out
    )
    assert options.optim.clip_norm == 0 and options.data.global_scale == (0.2, 1.0) and options.model.width == 4
    assert resume(directory)["step"] == 4


# The linear evaluation


def test_linear_layers_of_another_origin():
    directory = pretrain("--optim.epochs=1", "--model.teacher-momentum=0.9")
    given = {"epochs": 2, "lr": (0.1, 0.3), "data": Labels(batch_size=512), "out": Path("out")}
    linear.main(linear.Options(Backbone(run=directory), **given), World())
    before = Path("out/linear.pt").read_bytes()
    for message, change in {
        "other --lr: [0.1, 0.3] then, [0.3, 0.1] now. --resume continues with what it had; an": {"lr": (0.3, 0.1)},
        "other --seed: 0 then, 1 now": {"seed": 1},
        "other --norm: False then, True now": {"norm": True},
        "other --blocks: 4 then, 2 now": {"blocks": 2},
        "other --backbone.size: 8 then, 10 now": {"backbone": Backbone(run=directory, size=10)},
        "other weights of the backbone: ": {"backbone": Backbone(run=directory, whose="student")},
        "--epochs 1: out/linear.pt has 2 epochs behind it": {"epochs": 1},
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            linear.main(
                linear.Options(**({"backbone": Backbone(run=directory)} | given | change), resume=True), World()
            )
    assert Path("out/linear.pt").read_bytes() == before


def test_linear_layers_over_other_images(capsys):
    """Refused; layers of the first commits do not know their images and go on with a note."""
    directory = run_on_photographs()
    options = {"epochs": 1, "lr": (0.1,), "out": Path("out"), "data": Labels(batch_size=4, workers=0)}
    linear.main(linear.Options(Backbone(run=directory), **options), World())
    saved = read(Path("out/linear.pt"))
    options |= {"epochs": 2, "resume": True}
    name = inventory.read(directory).training.splitlines()[-1].split(b"\t")[2].decode()
    (Path("pets") / name).write_bytes(bytes(3))
    with pytest.raises(UserError, match=r"out/linear.pt: other training images: "):
        linear.main(linear.Options(Backbone(run=directory), **options), World())
    del saved["origin"]
    torch.save(saved, "out/linear.pt")
    capsys.readouterr()
    linear.main(
        linear.Options(
            Backbone(run=directory),
            **options,
        ),
        World(),
    )
    assert "note: out/linear.pt is of an older version" in capsys.readouterr().out
