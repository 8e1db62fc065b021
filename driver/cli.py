"""The command line as a checked Config: a recipe, a YAML file over it, options over both."""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tyro
import yaml

from .config import FILE, PARTS, Config, UserError
from .recipes import nearest, recipe


def parse(args: list[str] | None = None) -> Config:
    """With --run.resume, the options saved with the run stand in the place of --config. Raises: UserError."""
    args = sys.argv[1:] if args is None else args
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--config", "--run.resume", "--data.root"):
        sources.add_argument(name)
    given = vars(sources.parse_known_args(args)[0])
    resume, file, name = given["run.resume"], given["config"], given["recipe"]
    if sum(source is not None for source in (resume, file, name)) > 1:
        raise UserError("--recipe, --config and --run.resume each give every option: only one of them")
    saved: dict[str, Any] = {}
    if file is not None:
        saved = read(Path(file), f"--config {file}")
    elif resume is not None:
        saved = of_run(resume)
    base = recipe(name or saved.pop("recipe", "digits" if given["data.root"] is None else "images"))
    if name is None and not saved and base.recipe == "images":
        base = replace(base, run=replace(base.run, name=os.path.basename(os.path.abspath(given["data.root"]))))
    of_file, config = (
        tyro.cli(Config, args=[*as_args(saved), *more], default=base, config=(tyro.conf.FlagConversionOff,))
        for more in ([], args)
    )
    if resume is None and config.run.resume is not None:
        raise UserError(f"--config {file}: run.resume {config.run.resume} in it; --run.resume alone resumes a run")
    check(config, of_file)
    return config


def of_run(resume: str) -> dict[str, Any]:
    """All options of the run that is resumed. Raises: UserError."""
    path = (Path(resume).parent if resume.endswith(".pt") else Path(resume)) / FILE
    if not path.is_file():
        raise UserError(f"--run.resume {resume}: not the directory of a run (no {path})")
    what = f"--run.resume {resume}: damaged options"
    plain = read(path, what)
    for part, options in PARTS.items():
        for option in fields(options):
            if option.name not in plain.get(part, {}):
                raise UserError(f"{what} ({path}: no {part}.{option.name} in it; each checkpoint has a copy, `config`)")
    return plain


def read(path: Path, what: str) -> dict[str, Any]:
    """The options in a YAML file, all of names that exist. Raises: UserError."""
    try:
        plain = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{what} ({path}: {getattr(error, 'strerror', error)})") from error
    if not isinstance(plain, dict):
        raise UserError(f"{what} ({path}: not a mapping of parts to options)")
    for part, options in plain.items():
        if part == "recipe":
            continue
        if part not in PARTS:
            raise UserError(f"{what} ({path}: {part} is not a part; {nearest(str(part), ['recipe', *PARTS])})")
        if not isinstance(options, dict):
            raise UserError(f"{what} ({path}: {part} must hold options, got {options})")
        known = [field.name for field in fields(PARTS[part])]
        for option in options:
            if option not in known:
                raise UserError(f"{what} ({path}: {part}.{option} is no option; {nearest(str(option), known)})")
    return plain


def as_args(plain: dict[str, Any]) -> list[str]:
    """The same as a command line, which tyro then checks."""
    args = []
    for part, options in plain.items():
        for name, value in options.items():
            args += [f"--{part}.{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return args


LEAST = {
    "data.size": 1,
    "data.batch_size": 2,
    "data.virtual_batch": 0,
    "data.views": 2,
    "data.local_views": 0,
    "data.local_size": 1,
    "data.augment": 0,
    "data.workers": 0,
    "boxes.every": 0,
    "boxes.after": 0,
    "model.width": 1,
    "model.heads": 0,
    "model.head_layers": 1,
    "model.head_width": 1,
    "model.head_dim": 1,
    "optim.epochs": 1,
    "optim.lr": 0,
    "optim.lr_end": 0,
    "optim.lr_images": 0,
    "optim.warmup_epochs": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.save_every": 1,
    "run.save_steps": 0,
    "run.keep_last": 1,
    "run.keep_every": 0,
    "run.neighbours": 1,
}
SHARES = ("data.blur", "data.max_unreadable", "model.teacher_momentum_end")
SHARES_BELOW_1 = ("data.held_out", "boxes.threshold", "model.teacher_momentum", "model.drop_path", "optim.momentum")
# Options that do nothing where the other is 0: given there they are errors, but for the value that they have anyway.
NEEDS = {
    "model.teacher_momentum_end": "model.teacher_momentum",
    "model.teacher_views": "model.teacher_momentum",
    "boxes.after": "boxes.every",
    "boxes.threshold": "boxes.every",
    "boxes.alpha": "boxes.every",
    "boxes.every": "data.augment",
}


def check(config: Config, usual: Config) -> None:
    """Numbers within their bounds, and options that fit each other. usual: what the user has not given just now.

    Raises: UserError.
    """

    def value_of(option: str, of: Config = config) -> Any:
        part, name = option.split(".")
        return getattr(getattr(of, part), name)

    for option, low in LEAST.items():
        if not value_of(option) >= low:
            raise UserError(f"--{option} must be at least {low}, got {value_of(option)}")
    for option in SHARES:
        if not 0 <= value_of(option) <= 1:
            raise UserError(f"--{option} must be from 0 to 1, got {value_of(option)}")
    for option in SHARES_BELOW_1:
        if not 0 <= value_of(option) < 1:
            raise UserError(f"--{option} must be at least 0 and below 1, got {value_of(option)}")
    for option in ("data.global_scale", "data.local_scale"):
        low, high = value_of(option)
        if not 0 < low <= high <= 1:
            raise UserError(f"--{option} must rise within 0 and 1, got {low} {high}")
    if not config.boxes.alpha > 0:
        raise UserError(f"--boxes.alpha must be positive, got {config.boxes.alpha}")
    end = config.optim.weight_decay_end
    if end is not None and not end >= 0:
        raise UserError(f"--optim.weight_decay_end must be at least 0, got {end}")
    if config.run.stop_after is not None and config.run.stop_after < 1:
        raise UserError(f"--run.stop_after must be at least 1, got {config.run.stop_after}")
    if not config.run.name or os.path.basename(config.run.name) != config.run.name:
        raise UserError(f"--run.name must be a plain name without slashes, got {config.run.name!r}")
    for option, needed in NEEDS.items():
        if not value_of(needed) and value_of(option) not in (value_of(option, Config()), value_of(option, usual)):
            raise UserError(f"--{option} {value_of(option)} does nothing where --{needed} is 0")
    check_source(config)


def check_source(config: Config) -> None:
    """Each source with what it needs. Raises: UserError."""
    data = config.data
    if data.source == "digits":
        if data.root is not None:
            raise UserError(f"--data.root {data.root}: the digits are embedded; give --data.source folder too")
        if data.augmentation != "digits" or data.local_views or config.boxes.every:
            raise UserError("--data.source digits has neither crops nor colours: only --data.augmentation digits")
        return
    if data.root is None:
        raise UserError(f"--data.root is needed for --data.source {data.source} (recipe {config.recipe})")
    if data.augmentation == "digits":
        raise UserError(f"--data.augmentation digits is for digits alone, not for --data.source {data.source}")
