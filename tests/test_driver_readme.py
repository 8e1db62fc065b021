"""driver/README.md: its commands parse, its options exist, its Python runs where its packages are installed."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from driver_runs import ROOT, elsewhere, pretrain  # noqa: F401

from driver import cli, config, exits, knn, linear, recipes, report, segment_video
from driver.evaluation import frozen

TEXT = (ROOT / "driver" / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = "\n".join(text for language, text in BLOCKS if language == "")
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines() if "driver/" in line]
SCRIPTS = {"knn.py": knn.Options, "linear.py": linear.Options, "segment_video.py": segment_video.Options}


def block(word: str) -> str:
    """The one example with this word."""
    (found,) = [code for code in PYTHON if word in code]
    return found


def test_the_examples_are_there():
    assert len(PYTHON) == 5 and len(COMMANDS) >= 12


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    """Those of torchrun by what follows the script's name. PATH, RUN_DIR and FILE need not be there to parse."""
    script, *args = shlex.split(line[line.index("driver/") :])
    name = script.removeprefix("driver/")
    if "--run.resume" in args:
        resumed = Path(args[args.index("--run.resume") + 1])
        resumed.mkdir(parents=True)
        config.save(config.Config(), resumed)
    if name == "pretrain.py":
        assert isinstance(cli.parse(args), config.Config)
    elif name in SCRIPTS:
        assert tyro.cli(SCRIPTS[name], args=args, config=frozen.PLAIN)
    else:
        assert name == "export.py" and args == ["RUN_DIR"]


def test_the_slurm_script_parses():
    (text,) = [text for language, text in BLOCKS if language == "bash"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert f"-eq {exits.STOPPED} " in text
    (given,) = re.findall(r"what=\((--recipe .*?)\)", text)
    assert cli.parse([*given.split(), "--run.save-steps", "200"]).recipe == "imagenet-vit-s"


def test_options_exist():
    known = {f"--{part}.{field.name}" for part, cls in config.PARTS.items() for field in dataclasses.fields(cls)}
    known |= {"--virtual-batch", "--recipe", "--config", "--help"}
    scripts = (
        "--epochs --norm --blocks --average --lr --davis --out --last-frames --radius --top-k --temperature".split()
    )
    known |= {option.replace("-", "_").replace("__", "--") for option in scripts}
    prose = re.sub(r"^```\w*\n.*?^```$", "", TEXT, flags=re.M | re.S)
    named = {option.replace("-", "_").replace("__", "--") for option in re.findall(r"`(--[a-z.-]+)", prose)}
    known = {option.replace("-", "_").replace("__", "--") for option in known}
    backbones = {"--backbone.run", "--backbone.name", "--backbone.weights", "--backbone.whose"}
    assert named - known - backbones == set()
    assert len(named) > 50


def test_the_table_of_recipes():
    """Its head has every recipe, and a few of its rows are what the recipes say."""
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


def test_history_of_a_run():
    pretrain("--optim.epochs=1")
    names: dict = {}
    exec(block("history.jsonl"), names)
    assert names["losses"][0][0] == 2 and [epoch for epoch, _ in names["accuracy"]] == [0, 1]


def test_fine_tuning():
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), "backbone.safetensors")
    names: dict = {}
    exec(block("reset_classifier"), names)
    assert names["model"].eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def backbone() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 512))


def test_lightly():
    pytest.importorskip("lightly")
    from photographs import write_classes

    write_classes(Path("images"), 8, side=40)
    names = {"backbone": backbone()}
    before = names["backbone"][2].weight.clone()
    exec(block("lightly"), names)
    assert names["loss"].isfinite() and not torch.equal(before, names["backbone"][2].weight)


def test_lightning():
    pytest.importorskip("lightning")
    network = backbone()
    before = network[2].weight.clone()
    pairs = [(torch.rand(3, 32, 32), torch.rand(3, 32, 32)) for _ in range(16)]
    exec(block("LightningModule"), {"network": network, "views": torch.utils.data.DataLoader(pairs, batch_size=8)})
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
    exec(block("BaseMethod"), names)
    model = names["BAM"](options)
    before = model.projector[0].weight.clone()
    items = [(i, [torch.rand(3, 32, 32), torch.rand(3, 32, 32)], i % 2) for i in range(8)]
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, torch.utils.data.DataLoader(items, batch_size=4))
    assert not torch.equal(before, model.projector[0].weight)


def test_report_is_a_script_of_the_page():
    assert "python driver/report.py RUN_DIR" in TEXT
    assert tyro.cli(report.Report, args=["RUN_DIR"]).run == Path("RUN_DIR")
    assert sys.modules["driver.reporting.outputs"].PAGE in TEXT
