"""The pages of docs/driver/: commands parse, options exist, Python runs where its packages are installed."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import tyro
from driver_runs import TINY
from pages import ROOT, block, blocks, commands, prose, text

from driver import config, export, knn, linear, pretrain, recipes, report, segment_video, verify_resume
from driver.evaluation.frozen import Backbone

PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs" / "driver").glob("*.md"))}
TEXT = "\n".join(PAGES.values())
COMMANDS = [line for line in commands(TEXT) if "driver/" in line]
SCRIPTS = {
    "knn.py": knn.Options,
    "linear.py": linear.Options,
    "segment_video.py": segment_video.Options,
    "export.py": export.Export,
    "verify_resume.py": verify_resume.Verify,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, threads):
    """Runs are written under the current directory; one thread, since the networks are too small to share."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def test_the_examples_are_there():
    assert len(blocks(TEXT, "python")) == 5 and len(COMMANDS) >= 22


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    """Options behind a script's name parse, also in commands of torchrun. PATH, RUN_DIR and FILE need not exist."""
    script, *args = shlex.split(line[line.index("driver/") :])
    name = script.removeprefix("driver/")
    for option in ("--run.resume", "--config"):
        if option in args:
            path = Path(args[args.index(option) + 1])
            folder = path.parent if path.suffix else path
            folder.mkdir(parents=True)
            config.save(config.Config(), folder)
    if name == "pretrain.py":
        assert isinstance(pretrain.parse(args), config.Config)
    else:
        assert tyro.cli(SCRIPTS[name], args=args, config=(tyro.conf.FlagConversionOff,))


def test_the_slurm_script_parses():
    (script,) = blocks(TEXT, "bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert f"-eq {pretrain.STOPPED} " in script
    (given,) = re.findall(r"what=\((--recipe .*?)\)", script)
    assert pretrain.parse([*given.split(), "--run.save-steps", "200"]).recipe == "imagenet-vit-s"


def test_options_exist():
    parts = {"--": [linear.Options, segment_video.Options], "--backbone.": [Backbone]}
    parts |= {f"--{part}.": [options] for part, options in config.PARTS.items()}
    fields = {
        before + field.name for before, classes in parts.items() for of in classes for field in dataclasses.fields(of)
    }
    known = {option.replace("_", "-") for option in fields} | {"--virtual-batch", "--recipe", "--config", "--help"}
    named = set(re.findall(r"`(--[a-z.-]+)", prose(TEXT)))
    assert named - known == set()
    assert len(named) > 50


def test_the_table_of_recipes():
    """The first line names every recipe; images per step are those of the recipes."""
    head, row = (
        next(line for line in TEXT.splitlines() if line.startswith(start)) for start in ("| | `", "| images per")
    )
    names = re.findall(r"`([\w-]+)`", head)
    full = [f"imagenet{name}" if name.startswith("-") else name for name in names]
    assert sorted(full) == sorted(recipes.RECIPES)
    steps = [int(cell) for cell in row.split("|")[2:-1]]
    for name, step in zip(full, [*steps[:4], *[steps[4]] * 3], strict=True):
        data = recipes.RECIPES[name].data
        assert step == (data.virtual_batch or data.batch_size), name


def test_what_a_run_leaves():
    """The table names the files that a run leaves, and the example reads the history."""
    assert pretrain.main([*TINY, "--optim.epochs=1"]) == 0
    table = re.search(r"^\| file in .*?\n\n", PAGES["evaluation.md"], re.M | re.S)[0]
    named = {name for line in table.strip().splitlines()[2:] for name in re.findall(r"`([\w.]+)`", line.split("|")[1])}
    assert named == {path.name for path in Path("runs/digits-001").iterdir()}
    names: dict = {}
    exec(block(TEXT, "history.jsonl"), names)
    assert names["losses"][0][0] == 2 and [epoch for epoch, _ in names["accuracy"]] == [0, 1]


def test_fine_tuning():
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), "backbone.safetensors")
    names: dict = {}
    exec(block(TEXT, "reset_classifier"), names)
    assert names["model"].eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def backbone() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 512))


def test_lightly():
    pytest.importorskip("lightly")
    from photographs import write_classes

    write_classes(Path("images"), 8, side=40)
    names = {"backbone": backbone()}
    before = names["backbone"][2].weight.clone()
    exec(block(TEXT, "lightly"), names)
    assert names["loss"].isfinite() and not torch.equal(before, names["backbone"][2].weight)


def test_lightning():
    pytest.importorskip("lightning")
    network = backbone()
    before = network[2].weight.clone()
    pairs = [(torch.rand(3, 32, 32), torch.rand(3, 32, 32)) for _ in range(16)]
    names = {"network": network, "views": torch.utils.data.DataLoader(pairs, batch_size=8)}
    exec(block(TEXT, "LightningModule"), names)
    assert network[2].weight.isfinite().all() and not torch.equal(before, network[2].weight)


def test_solo_learn():
    pytest.importorskip("solo.methods.base")
    from lightning.pytorch import Trainer
    from omegaconf import OmegaConf

    options = OmegaConf.create(
        {
            "method": "bam",
            "backbone": {"name": "resnet18"},
            "data": {"dataset": "custom", "num_large_crops": 2, "num_small_crops": 0, "num_classes": 2},
            "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 0.0},
            "scheduler": {"name": "none"},
            "max_epochs": 1,
        }
    )
    names: dict = {}
    exec(block(TEXT, "BaseMethod"), names)
    model = names["BAM"](options)
    before = model.projector[0].weight.clone()
    items = [(i, [torch.rand(3, 32, 32), torch.rand(3, 32, 32)], i % 2) for i in range(8)]
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, torch.utils.data.DataLoader(items, batch_size=4))
    assert not torch.equal(before, model.projector[0].weight)


def test_report_is_a_script_of_the_page():
    assert "python driver/report.py RUN_DIR" in text("docs/driver/evaluation.md")
    assert tyro.cli(report.Report, args=["RUN_DIR"]).run == Path("RUN_DIR")
