"""Checked options from the command line.

The options of a run come from a recipe, a YAML file over it, and the command line over both. The options of another
script come from the command line alone.
"""

import argparse
import os
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from bam_kernels.whole_files import check_file

from . import checkpoint, option_files
from .bounds import bounds_of
from .config import FILE, PARTS, Config, UserError, as_plain
from .distributed import World
from .exits import exit_code
from .files import obstacle, try_folder
from .messages.text import can_be_a_name, printable, typed
from .recipes import recipe

T = TypeVar("T")
LONGEST_NAME = 200
"""Bytes of the longest name of a run. File systems take 255 for a name with its number."""
PLAIN = (tyro.conf.FlagConversionOff,)
"""Setting of tyro: a truth value is given as `--option True` or `--option False`."""


def parse(args: list[str] | None = None) -> Config:
    """Options of a run, from the command line `args`.

    With --run.resume, the run's saved options take the place of --config.
    Raises: UserError on options that exclude each other, a bad file, or a value out of bounds.
    """
    args = with_home(args)
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--config", "--run.resume", "--run.directory", "--data.root"):
        sources.add_argument(name)
    given = vars(sources.parse_known_args(args)[0])
    resume, file, name = given["run.resume"], given["config"], given["recipe"]
    if sum(source is not None for source in (resume, file, name)) > 1:
        raise UserError("--recipe, --config and --run.resume each give every option: only one of them")
    if resume is not None and given["run.directory"] is not None:
        raise UserError(f"--run.directory {given['run.directory']}: does nothing with --run.resume {resume}")
    saved: dict[str, Any] = {}
    if file is not None:
        saved = option_files.read(Path(file), f"--config {file}")
    elif resume is not None:
        saved = options_of_run(resume)
    base = recipe(name or saved.pop("recipe", "digits" if given["data.root"] is None else "images"))
    if (file, resume, name) == (None, None, None) and given["data.root"] is not None:
        base = replace(base, run=replace(base.run, name=os.path.basename(os.path.abspath(given["data.root"]))))
    defaults = with_values(base, saved)
    config = tyro.cli(Config, args=args, default=defaults, config=PLAIN)
    if resume is None and config.run.resume is not None:
        raise UserError(f"--config {file}: run.resume {config.run.resume} in it; --run.resume alone resumes a run")
    check(config, defaults)
    if resume is not None:
        checkpoint.check_options(as_plain(defaults), as_plain(config))
    return config


def options_of_run(resume: str) -> dict[str, Any]:
    """All options of the run that --run.resume names. An option that is newer than the run has its default.

    Raises: UserError where its config.yaml lacks an option that its checkpoint has.
    """
    path = checkpoint.file_of(Path(resume)).with_name(FILE)
    if not path.is_file():
        raise UserError(f"--run.resume {resume}: not the directory of a run (no {path})")
    what = f"--run.resume {resume}: damaged options"
    found, defaults = option_files.read(path, what), Config()
    saved = as_plain(defaults)
    lacking = [(part, name) for part in PARTS for name in saved[part] if name not in found.get(part, {})]
    if lacking:
        known = checkpoint.options_in(Path(resume))
        for part, name in lacking:
            if known is None or name in known.get(part, {}):
                raise UserError(f"{what} ({path}: no {part}.{name} in it; each checkpoint has a copy, `config`)")
            found.setdefault(part, {})[name] = getattr(getattr(defaults, part), name)
        newer = " ".join(typed(f"{part}.{name}") for part, name in lacking)
        print(f"note: the run is older than {newer}: the defaults hold")
    return found


def with_home(args: list[str] | None) -> list[str]:
    """Arguments, by default those of this process, in which ~ at the start of a value is the home directory.

    Shells fill it in for `--data.root ~/images`, but not for `--data.root=~/images`.
    """
    given = sys.argv[1:] if args is None else args
    split = (arg.partition("=") if arg.startswith("--") else ("", "", arg) for arg in given)
    return [f"{name}{equals}{os.path.expanduser(value)}" for name, equals, value in split]


def with_values(config: Config, values: dict[str, dict[str, Any]]) -> Config:
    """Options with some values replaced, which are given by part and name."""
    return replace(config, **{part: replace(getattr(config, part), **of_part) for part, of_part in values.items()})


WITHOUT_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "data.local_size": ("data.local_views", (0,)),
    "data.local_scale": ("data.local_views", (0,)),
    "data.blur": ("data.augmentation", ("digits", "dino")),
    "model.teacher_momentum_end": ("model.teacher_momentum", (0,)),
    "model.teacher_views": ("model.teacher_momentum", (0,)),
    "boxes.after": ("boxes.every", (0,)),
    "boxes.threshold": ("boxes.every", (0,)),
    "boxes.alpha": ("boxes.every", (0,)),
    "boxes.every": ("data.augment", (0,)),
    "optim.momentum": ("optim.name", ("adamw", "lamb")),
}
"""An option on the left does nothing where its option on the right has one of these values."""


def check(config: Config, defaults: Config) -> None:
    """Raise a UserError where a value is out of its bound or options do not fit each other.

    `defaults` has the values of the recipe or the file. An option that does nothing may keep its value from there.
    """

    def value_of(option: str, of: Config = config) -> Any:
        part, name = option.split(".")
        return getattr(getattr(of, part), name)

    check_bounds(config)
    if not config.run.name or os.path.basename(config.run.name) != config.run.name:
        raise UserError(f"--run.name must be a plain name without slashes, got {config.run.name!r}")
    for option, (other, values) in WITHOUT_EFFECT.items():
        given = value_of(option) not in (value_of(option, Config()), value_of(option, defaults))
        if given and value_of(other) in values:
            values = value_of(option) if isinstance(value_of(option), tuple) else (value_of(option),)
            raise UserError(f"{typed(option, *values)} does nothing where {typed(other)} is {value_of(other) or 0}")
    check_source(config)


def check_bounds(options: Any, prefix: str = "") -> None:
    """Raise a UserError where a value in the dataclass `options`, or in a part of it, is out of its option's bound.

    Texts and paths are bounded too: the system has no name with a null byte, or with half a pair of surrogates.
    """
    for name, annotation in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{name}.")
        if isinstance(value, (str, Path)) and not can_be_a_name(str(value)):
            raise UserError(f"{typed(prefix + name)} must hold no null byte and no surrogate, got {str(value)!a}")
        for bound in bounds_of(annotation):
            if value is not None and not bound.admits(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                raise UserError(f"{typed(prefix + name)} must be {bound.words}, got {printable(shown)}")


def check_source(config: Config) -> None:
    """Raise a UserError where the options do not fit --data.source."""
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


def check_new_name(name: str) -> None:
    """Raise a UserError where no directory can have the name, or the commands that a run prints could not hold it."""
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise UserError(f"--run.name must have no line break or other control character, got {name!r}")
    if (length := len(name.encode(errors="surrogateescape"))) > LONGEST_NAME:
        raise UserError(f"--run.name must have at most {LONGEST_NAME} bytes, got {length}: {name}")


def check_folder(folder: Path, what: str, *names: str) -> Path:
    """Return `folder` after a trial that files of these names can be written there. A missing folder is not made yet.

    `what` begins the message. Raises: UserError where they cannot, before hours of work are lost.
    """
    for path in (folder, *(folder / name for name in names)):
        try:
            try_folder(path) if path == folder else check_file(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{what}: {path} cannot be written: {obstacle(path, error)}") from error
    return folder


def run_script(options: type[T], main: Callable[[T, World], Any], args: list[str] | None = None) -> int:
    """Call `main` with the options of the command line, and return the exit code of this process.

    The code is 0, 1 after a UserError, 2 (from tyro) after a wrong option, 130 after Ctrl-C, or 141
    where the reader of standard output has gone.
    """

    def checked() -> T:
        found = tyro.cli(options, args=with_home(args), config=PLAIN)
        check_bounds(found)
        return found

    def run(world: World) -> int:
        main(world.from_first("options", checked), world)
        return 0

    return exit_code(run)
