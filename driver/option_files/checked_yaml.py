"""Reader of YAML files of options. Each value must be of the kind that its option takes, and never becomes another one.

Such a file may come from a stranger. It is a mapping of parts to mappings of options, plain text alone: aliases,
anchors, tags and deeper nesting are errors, so that a short file can neither grow nor run code.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from bam_kernels import user_files

from ..config import PARTS, UserError
from ..messages.text import can_be_a_name, printable
from ..recipes import nearest

MOST_BYTES = 1 << 16
"""Largest file. A run's config.yaml has about 2,000 bytes."""
DEPTH = 3
"""Nesting of a file: parts, options, and the values of an option that takes several."""
NULL = ("", "~", "null", "Null", "NULL")
TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", NoneType: "null"}


def read(path: Path, what: str) -> dict[str, Any]:
    """Options in a YAML file by part and name, and its recipe under `recipe`. `what` begins each message.

    Raises: UserError where the file is unreadable, or has a part, an option or a value that does not exist.
    """
    try:
        text = user_files.read(path, MOST_BYTES)
        _check_events(text)
        return _options(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        fault = f"{error.problem}{_line(error.problem_mark)}"
    except yaml.YAMLError as error:  # of characters that YAML does not allow
        fault = str(error).replace("\n", " ")
    except OSError as error:
        fault = error.strerror or str(error).removeprefix(f"{path} is ")
    except ValueError as error:
        fault = str(error)
    raise UserError(f"{what} ({printable(str(path), None)}: {fault})")


def _line(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}"


def _check_events(text: str) -> None:
    """Raise a ValueError on aliases, anchors, tags and deep nesting, before anything follows them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        where = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"aliases and anchors, * and &, are not allowed{where}; quote a text that begins so")
        if getattr(event, "tag", None):
            raise ValueError(f"tags such as {printable(event.tag)} are not allowed{where}; quote a text that begins so")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"nested too deeply{where}; there are parts, options and lists of values")


def _options(root: yaml.Node | None) -> dict[str, Any]:
    if root is None:
        return {}
    found: dict[str, Any] = {}
    for part, node in _items(root, "the file"):
        if part == "recipe":
            found[part] = _value("recipe", str, node)
        elif part in PARTS:
            found[part] = _of_part(part, node)
        else:
            raise ValueError(f"{printable(part)} is not a part; {nearest(part, ['recipe', *PARTS])}")
    return found


def _of_part(part: str, node: yaml.Node) -> dict[str, Any]:
    kinds = get_type_hints(PARTS[part])
    found = {}
    for name, value in _items(node, part):
        if name not in kinds:
            raise ValueError(f"{part}.{printable(name)} is no option; {nearest(name, list(kinds))}")
        found[name] = _value(f"{part}.{name}", kinds[name], value)
    return found


def _items(node: yaml.Node, what: str) -> Iterator[tuple[str, yaml.Node]]:
    """Keys and values of a mapping. Raises: ValueError where it is none, or has a key twice or one that is no text."""
    if not isinstance(node, yaml.MappingNode):
        kind = "a mapping of parts to options" if what == "the file" else "a mapping of options"
        raise ValueError(f"{what} must be {kind}, got {_shown(node)}")
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"a key in {what} is {_shown(key)}{_line(key.start_mark)}")
        if key.value in seen:
            raise ValueError(f"{printable(key.value)} stands twice in {what}{_line(key.start_mark)}")
        seen.add(key.value)
        yield key.value, value


def _value(option: str, annotation: Any, node: yaml.Node) -> Any:
    """Value of an option. Raises: ValueError saying of which kind it must be."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if NoneType in kinds and _is_plain(node, (*NULL, "None")):  # elsewhere None is a name, which YAML does not quote
        return None
    for kind in kinds:
        try:
            return _sequence(kind, node) if get_origin(kind) is tuple else _scalar(kind, node)
        except ValueError:
            continue
    words = " or ".join(map(_words, kinds))
    raise ValueError(f"{option} must be {words}, got {_shown(node)}{_line(node.start_mark)}")


def _sequence(kind: Any, node: yaml.Node) -> tuple[Any, ...]:
    members = get_args(kind)
    if not isinstance(node, yaml.SequenceNode) or len(node.value) != len(members):
        raise ValueError
    return tuple(map(_scalar, members, node.value))


def _scalar(kind: Any, node: yaml.Node) -> Any:
    """A value from its text, which is read as the option's kind and not as YAML would guess. Raises: ValueError."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError
    text = node.value
    if kind is bool and text in TRUTH:
        return TRUTH[text]
    if kind is int and INTEGER.fullmatch(text):
        return int(text)  # a ValueError beyond 4300 digits
    if kind is float and NUMBER.fullmatch(text):
        return float(text)
    if kind in (str, Path) and not _is_plain(node, NULL) and can_be_a_name(text):
        return text if kind is str else Path(os.path.expanduser(text))
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    raise ValueError


def _is_plain(node: yaml.Node, texts: tuple[str, ...]) -> bool:
    """Whether a value is one of these texts without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in texts


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return f"a list of {len(get_args(kind))} numbers" if get_origin(kind) is tuple else KINDS[kind]


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return printable(node.value) or "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
