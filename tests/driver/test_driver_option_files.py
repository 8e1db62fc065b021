"""Files of options that anybody may have written: no growth, no code, no value that becomes another one."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from driver import cli, config, export, recipes
from driver.config import UserError
from driver.option_files.checked_yaml import MOST_BYTES

RECIPES = recipes.RECIPES.values()
LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))


def parsed(text: str | bytes, *more: str) -> config.Config:
    Path("own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return cli.parse(["--config=own.yaml", *more])


def test_files_of_this_project_are_read_as_they_were_written(tmp_path):
    """Also texts that YAML would take for a number, a date, a truth value, nothing or an option of the command line."""
    names = [
        "1e3",
        "010",
        "1:30",
        "2001-01-01",
        "yes",
        "null",
        "~",
        "None",
        "true",
        "-x",
        "--help",
        "*a",
        "&a",
        "!!set",
        "=",
        " ",
    ]
    for recipe, name in [*((recipes.recipe("digits"), name) for name in names), *zip(RECIPES, names, strict=False)]:
        data = replace(recipe.data, root=None if recipe.recipe == "digits" else tmp_path / name)
        own = replace(recipe, data=data, run=replace(recipe.run, name=name, wandb=f"{name}.", device=name))
        config.save(own, tmp_path)
        assert cli.parse([f"--config={tmp_path}/config.yaml"]) == replace(own, config=tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "text, part, option, value",
    [
        ("optim: {lr: 1e-3}", "optim", "lr", 1e-3),
        ("optim: {lr: 1e3}", "optim", "lr", 1e3),
        ("optim: {lr: '.5'}", "optim", "lr", 0.5),
        ("run: {name: 001}", "run", "name", "001"),
        ("run: {name: 2001-01-01}", "run", "name", "2001-01-01"),
        ("run: {name: yes}", "run", "name", "yes"),
        ("run: {name: --run.directory=x.y}", "run", "name", "--run.directory=x.y"),
        ("run: {name: None}", "run", "name", "None"),
        ("run: {wandb: null}", "run", "wandb", None),
        ("run: {wandb: None}", "run", "wandb", None),
        ("run: {wandb: 'null'}", "run", "wandb", "null"),
        ("run: {stop_after: }", "run", "stop_after", None),
        ("data: {exif: False}", "data", "exif", False),
        ("data: {global_scale: [0.1, 1]}", "data", "global_scale", (0.1, 1.0)),
        ("data: {pixel_range: [-1000, 3000]}", "data", "pixel_range", (-1000.0, 3000.0)),
        ("\ufeffoptim: {epochs: 7}", "optim", "epochs", 7),
    ],
)
def test_a_value_is_read_as_the_kind_of_its_option(text, part, option, value):
    assert getattr(getattr(parsed(text), part), option) == value


@pytest.mark.parametrize(
    "text",
    [
        "run: {name: --run.directory=elsewhere}",
        "run: {name: [a, --run.directory=elsewhere]}",
        "run: {name: 'a --run.directory=elsewhere'}",
        'run: {name: "a\\n--run.directory=elsewhere"}',
        "run: {device: --run.directory=elsewhere}",
        "data: {local_scale: ['0.1', '0.2', '--run.directory=elsewhere']}",
        "data: {local_scale: ['0.1', '--run.directory=elsewhere']}",
        "data: {exif: '--run.directory=elsewhere'}",
        "optim: {epochs: '1 --run.directory=elsewhere'}",
        "model: {weights: [a, --run.directory, elsewhere]}",
        "recipe: --run.directory=elsewhere",
        "recipe: [digits, --run.directory=elsewhere]",
    ],
)
def test_no_value_becomes_an_option_of_the_command_line(text):
    with suppress(UserError):
        assert parsed(text).run.directory == Path("runs")


@pytest.mark.parametrize(
    "text, message",
    [
        ("l0: &l0 [x, x]\n" + LAUGHS, "aliases and anchors, * and &, are not allowed, line 1"),
        ("data: {root: &a x}\nmodel: {weights: *a}", "aliases and anchors, * and &, are not allowed, line 1"),
        ("data: {root: *a}", "aliases and anchors"),
        ("data: {root: " + "[" * 9000 + "]" * 9000 + "}", "nested too deeply, line 1"),
        ("{a: " * 9000 + "}" * 9000, "nested too deeply, line 1"),
        ("- " * 9000, "nested too deeply, line 1"),
        ("? " * 9000, "nested too deeply, line 1"),
        ("run: {name: !!python/object/apply:os.mkdir [made]}", "tags such as tag:yaml.org,2002:python/object/apply..."),
        ("run: {name: !!binary aGVsbG8=}", "tags such as tag:yaml.org,2002:binary are not allowed, line 1"),
        ("run: {name: !!timestamp 2001-01-01}", "tags such as"),
        ("run: !!set {name}", "tags such as tag:yaml.org,2002:set are"),
        ("run: {name: !own x}", "tags such as !own are not allowed"),
        ("optim: {lr: 1e-3,\n lr: 5}", "lr stands twice in optim, line 2"),
        ("optim: {lr: 1}\noptim: {epochs: 3}", "optim stands twice in the file, line 2"),
        ("recipe: images\nrecipe: digits", "recipe stands twice in the file, line 2"),
        ("optim: {<<: {lr: 1}}", "optim.<< is no option"),
        ("1: {a: 2}", "1 is not a part"),
        ("optim: {1: 2}", "optim.1 is no option"),
        ("optim: {null: 2}", "optim.null is no option"),
        ("optim: {[1, 2]: 2}", "a key in optim is a list, line 1"),
        ("? {a: b}\n: 2", "a key in the file is a mapping, line 1"),
        ("optim: {lr: [1, 2]}", "optim.lr must be a number, got a list, line 1"),
        ("optim: {lr: {a: 1}}", "optim.lr must be a number, got a mapping"),
        ("optim: {lr: null}", "optim.lr must be a number, got null"),
        ("optim: {lr: yes}", "optim.lr must be a number, got yes"),
        ("optim: {lr: .nan}", "optim.lr must be a number, got .nan"),
        ("optim: {lr: inf}", "optim.lr must be a number, got inf"),
        ("optim: {lr: 1e999}", "--optim.lr must be from 0 to 1,000,000,000, got inf"),
        ("optim: {lr: 1_000}", "optim.lr must be a number, got 1_000"),
        ("optim: {lr: ١}", "optim.lr must be a number, got ١"),
        ("optim: {epochs: 1.0}", "optim.epochs must be a whole number, got 1.0"),
        ("optim: {epochs: 1_000}", "optim.epochs must be a whole number, got 1_000"),
        ("optim: {epochs: 010}", "optim.epochs must be a whole number, got 010"),
        ("optim: {epochs: 1:30}", "optim.epochs must be a whole number, got 1:30"),
        ("optim: {epochs: 0x10}", "optim.epochs must be a whole number, got 0x10"),
        ("optim: {epochs: true}", "optim.epochs must be a whole number, got true"),
        ("optim:\n  epochs: " + "9" * 6000, "optim.epochs must be a whole number, got " + "9" * 37 + "..., line 2"),
        ("optim: {epochs: " + "9" * 4000 + "}", "--optim.epochs must be from 1 to 1,000,000,000, got 9"),
        ("data: {exif: yes}", "data.exif must be true or false, got yes"),
        ("data: {exif: on}", "data.exif must be true or false, got on"),
        ("data: {exif: 1}", "data.exif must be true or false, got 1"),
        ("data: {source: cifar}", "data.source must be one of digits, cifar10, folder, webdataset, got cifar"),
        ("data: {source: null}", "data.source must be one of"),
        ("data: {global_scale: [0.1]}", "data.global_scale must be a list of 2 numbers, got a list"),
        ("data: {global_scale: [0.1, [0.2]]}", "nested too deeply, line 1"),
        ("data: {global_scale: 0.1 0.5}", "data.global_scale must be a list of 2 numbers, got 0.1 0.5"),
        ("data: {pixel_range: 3}", "data.pixel_range must be a list of 2 numbers or null, got 3"),
        ("run: {name: null}", "run.name must be text, got null"),
        ("run: {name: {a: 1}}", "run.name must be text, got a mapping"),
        ('run: {name: "a\\0b"}', "run.name must be text, got a\\x00b"),
        ('run: {name: "a\\ud800b"}', "run.name must be text, got a\\ud800b"),
        ('run: {name: "a\\nb/c"}', "--run.name must be a plain name without slashes, got 'a\\nb/c'"),
        ("model: {weights: [a]}", "model.weights must be a path or null, got a list"),
        ("recipe: 5", "--recipe 5: no such recipe"),
        ("recipe: [a]", "recipe must be text, got a list"),
        ("recipe: {a: 1}", "recipe must be text, got a mapping"),
        ("recipe: null", "recipe must be text, got null"),
        ("recipe: images", "--data.root is needed for --data.source folder (recipe images)"),
        ("data:", "data must be a mapping of options, got nothing"),
        ("data: [1]", "data must be a mapping of options, got a list"),
        ("hello", "the file must be a mapping of parts to options, got hello"),
        ("0", "the file must be a mapping of parts to options, got 0"),
        ("[]", "the file must be a mapping of parts to options, got a list"),
        ("optim: {lr: 1}\n---\noptim: {lr: 2}\n", "found another document, line 2"),
        ("optim:\n\tlr: 1\n", "found character '\\t' that cannot start any token, line 2"),
        ("run: {name: a\0b}", "unacceptable character #x0000"),
        ("run: {name: 'a", "found unexpected end of stream, line 1"),
        (b"run: {name: caf\xe9}", "'utf-8' codec can't decode byte 0xe9 in position 15"),
        ("optim: {lr: 1}\n".encode("utf-16"), "'utf-8' codec can't decode byte 0xff in position 0"),
        (b"#" * (MOST_BYTES + 1), f"not a plain file of at most {MOST_BYTES} bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes",
)
def test_what_is_no_plain_set_of_options_is_named(text, message):
    with pytest.raises(UserError) as raised:
        parsed(text)
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert os.listdir() == ["own.yaml"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself", "null byte", "surrogate"])
def test_what_is_no_file(kind):
    path = {"device": "/dev/zero", "null byte": "a\0b", "surrogate": "a\ud800b"}.get(kind, "own.yaml")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "link to itself":
        os.symlink(path, path)
    with pytest.raises(UserError, match=f"^--config {re.escape(path)} ") as raised:
        cli.parse([f"--config={path}"])
    assert ("not a plain file of at most" in str(raised.value)) == (kind in ("pipe", "folder", "device"))


@pytest.mark.parametrize("door", ["--run.resume", "export", "evaluation"])
def test_the_file_of_a_run_is_read_alike(door, capsys):
    """A run's config.yaml comes with its checkpoint, from wherever that was copied."""
    os.mkdir("run")
    Path("run/config.yaml").write_text("run: {name: [a, --run.directory=elsewhere]}")
    Path("run/checkpoint.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.yaml: run\.name must be text, got a list, line 1\)"):
        if door == "--run.resume":
            cli.parse(["--run.resume=run"])
        elif door == "export":
            export.export(export.Export(Path("run")))
        else:
            from driver.evaluation.frozen import Backbone

            Backbone(run=Path("run")).options()
    assert sorted(os.listdir()) == ["run"]


def test_help_shows_the_values_of_the_file(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("optim: {epochs: 77}", "--help")
    assert stop.value.code == 0 and "(default: 77)" in " ".join(capsys.readouterr().out.split())
