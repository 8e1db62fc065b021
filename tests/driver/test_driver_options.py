"""Options: from the command line, recipes and files; values out of bounds, unknown names, options without effect."""

import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest
from driver_runs import ROOT

from driver import cli, config, recipes, train
from driver.config import UserError
from driver.knn import Options as Knn


def test_every_option_is_read():
    """Each is an attribute of its part (`optim.lr`, `options.optim.lr`) in the driver's code; the files that define and
    check options do not count.
    """
    read = set()
    for path in (ROOT / "driver").rglob("*.py"):
        if path.name not in ("config.py", "cli.py", "recipes.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    of = node.value
                    read.add((of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", None), node.attr))
    options = {(name, field.name) for name, part in config.PARTS.items() for field in dataclasses.fields(part)}
    assert options <= read, options - read


@pytest.mark.parametrize(
    "options",
    [["--data.nonsense=1"], ["--optim.epochs=many"], ["--loss.backend=abacus"], ["--loss.top-k=1.5"], ["digits"]],
)
def test_unknown_or_mistyped_option(options, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(options)
    assert stop.value.code == 2
    assert options[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--optim.epochs=0"], "--optim.epochs must be from 1 to 1,000,000,000, got 0"),
        (["--data.held-out=1"], "--data.held-out must be at least 0 and below 1, got 1.0"),
        (["--optim.lr=nan"], "--optim.lr must be from 0 to 1,000,000,000, got nan"),
        (["--run.name=a/b"], "--run.name must be a plain name"),
        (["--run.stop-after=0"], "--run.stop-after must be from 1 to"),
        (["--run.resume=nowhere"], "nowhere: not the directory of a run"),
        (["--run.device=abacus"], "--run.device abacus"),
        (["--loss.epsilon=-1"], "--loss.epsilon must be from 1e-06 to 1,000,000,000, got -1.0"),
        (["--run.device=cpu", "--loss.backend=cuda"], '--loss: bam_loss: backend="cuda"'),
        (["--data.batch-size=5000"], "1347 images to train on, fewer than one batch of 5000"),
        (["--model.name=convent"], "--model.name convent"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train.pretrain(cli.parse(options))
    assert not Path("runs").exists()


def test_options_survive_the_file(tmp_path):
    options = cli.parse(["--data.root=some", "--optim.lr=1e-5", "--data.global-scale", "0.1", "0.5"])
    assert options.recipe == "images" and options.model.name == "resnet18" and options.run.name == "some"
    config.save(options, tmp_path)
    loaded = cli.parse([f"--config={tmp_path}/config.yaml", "--optim.epochs=7"])
    assert loaded.data.root == tmp_path / "some" and loaded.data.global_scale == (0.1, 0.5)
    assert loaded.optim == dataclasses.replace(options.optim, epochs=7) and loaded.model == options.model


def test_a_file_may_say_little(tmp_path):
    (tmp_path / "few.yaml").write_text("recipe: imagenet-vit-s\ndata: {root: some}\noptim: {lr: 1e-3}\n")
    options = cli.parse([f"--config={tmp_path}/few.yaml"])
    recipe = recipes.recipe("imagenet-vit-s")
    assert options.optim == dataclasses.replace(recipe.optim, lr=1e-3) and options.loss == recipe.loss


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name != "digits"])
def test_recipes_by_name(name):
    options = cli.parse([f"--recipe={name}", "--data.root=some", "--loss.epsilon=0.2"])
    recipe = recipes.recipe(name)
    assert options.loss == dataclasses.replace(recipe.loss, epsilon=0.2)
    assert (options.model, options.optim, options.run) == (recipe.model, recipe.optim, recipe.run)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--recipe=cifar-resnet18"], "--recipe cifar-resnet18: no such recipe; perhaps cifar10-resnet18"),
        (["--recipe=vit_b"], "no such recipe; perhaps imagenet-vit-b"),
        (["--recipe=resnet"], "no such recipe; perhaps cifar10-resnet18"),
        (["--recipe=photographs"], "no such recipe; there are digits, images, cifar10-resnet18, "),
        (["--recipe=digits", "--config=few.yaml"], "only one of them"),
        (["--config=nowhere.yaml"], "--config nowhere.yaml (nowhere.yaml: No such file or directory)"),
        (["--config=part.yaml"], "optimiser is not a part; perhaps optim"),
        (["--config=option.yaml"], "optim.learning is no option"),
        (["--config=broken.yaml"], "--config broken.yaml (broken.yaml: "),
        (["--recipe=imagenet-vit-s"], "--data.root is needed for --data.source folder (recipe imagenet-vit-s)"),
        (["--recipe=digits", "--data.root=some"], "--data.root some: the digits are embedded"),
        (["--data.local-views=2"], "--data.source digits has neither crops nor colours"),
        (["--config=resume.yaml"], "--config resume.yaml: run.resume some in it; --run.resume alone resumes a run"),
    ],
)
def test_bad_sources_of_options(args, message):
    files = {"few": "", "part": "optimiser: {lr: 1}", "option": "optim: {learning: 1}", "broken": "a: [1"}
    files["resume"] = "run: {resume: some}"
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        cli.parse(args)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.teacher-views=all"], "--model.teacher-views all does nothing where --model.teacher-momentum is 0"),
        (["--model.teacher-momentum-end=0.5"], "--model.teacher-momentum-end 0.5 does nothing"),
        (["--boxes.after=3"], "--boxes.after 3 does nothing where --boxes.every is 0"),
        (["--boxes.threshold=0.3"], "--boxes.threshold 0.3 does nothing"),
        (["--boxes.alpha=1"], "--boxes.alpha 1.0 does nothing"),
        (["--boxes.every=2", "--data.augment=0"], "--boxes.every 2 does nothing where --data.augment is 0"),
    ],
)
def test_options_that_would_do_nothing(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cli.parse(["--recipe=images", "--data.root=some", *options])


def test_what_a_recipe_has_may_do_nothing():
    """It is said where an option was given, not where another has made a recipe's or the usual value idle."""
    without = ["--model.teacher-momentum=0", "--boxes.every=0", "--data.augment=0"]
    options = cli.parse(["--recipe=imagenet-vit-s", "--data.root=some", *without, "--model.teacher-views=global"])
    assert options.boxes == dataclasses.replace(recipes.recipe("imagenet-vit-s").boxes, every=0)
    with pytest.raises(UserError, match=r"--boxes\.after 20 does nothing"):
        cli.parse(["--recipe=imagenet-vit-s", "--data.root=some", *without, "--boxes.after=20"])


def test_what_a_file_has_may_do_nothing(tmp_path):
    """A run that was begun with it can go on."""
    file = tmp_path / "own.yaml"
    file.write_text("boxes: {threshold: 0.3}")
    assert cli.parse([f"--config={file}"]).boxes.threshold == 0.3
    with pytest.raises(UserError, match=r"--boxes\.threshold 0\.4 does nothing"):
        cli.parse([f"--config={file}", "--boxes.threshold=0.4"])


@pytest.mark.parametrize("form", ["--{}=~/x", "--{} ~/x"])
def test_a_tilde_is_the_home_directory_in_every_path(form, monkeypatch, tmp_path):
    """Shells leave it where no space is before it."""
    monkeypatch.setenv("HOME", os.getcwd())

    def given(*options: str) -> list[str]:
        return [argument for option in options for argument in form.format(option).split()]

    options = cli.parse(given("data.root", "run.directory", "model.weights"))
    assert {options.data.root, options.run.directory, options.model.weights} == {Path.cwd() / "x"}
    Path("x").write_text("recipe: images\ndata: {root: ~/images=~}")
    assert cli.parse(given("config")).data.root == Path.cwd() / "images=~"
    with pytest.raises(UserError, match=f"--run.resume {Path.cwd()}/x: not the directory of a run"):
        cli.parse(given("run.resume"))
    scripts = []
    cli.run_script(Knn, lambda found, _: scripts.append(found), given("backbone.run"))
    assert scripts[0].backbone.run == Path.cwd() / "x"
