"""Content of files of torch.save, without running code that they may hold: stand-ins take the place of objects."""

import pickle
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages.text import first_line, printable
from .run_contents import is_ordinary, name_of

DEPTH, PARTS = 100, 10**6
"""Dictionaries within each other, and parts of all of them, that any file may hold. A dictionary that holds itself has
more, and so have a few that hold each other many times. A file may have as many parts as bytes."""
VIEWS = 2**28
"""Bytes that copies of views may take beyond the views' memory, for expanded masks; a larger file may have its size."""
NAMES = 200
"""Functions and classes, besides those of torch, that a file may name. torch compares each of them with all."""
SHOWN = 300
"""Characters of a name or a fault in a file that a message shows."""


class StandIn:
    """Object of a checkpoint whose class or function is not called: it keeps the attributes that the file gives it."""

    __slots__ = ("attributes",)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        del arguments, keywords

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = dict(dict.items(state))  # a pickle may replace the methods of an ordered dictionary

    def tensors(self) -> dict[Any, Any]:
        """Parameters, persistent buffers and inner modules of a whole module, by name; empty for other objects."""
        buffers, skipped = self._named("_buffers"), self._attribute("_non_persistent_buffers_set", set)
        kept = {name: value for name, value in buffers.items() if name not in skipped}
        return {**self._named("_parameters"), **kept, **self._named("_modules")}

    def _named(self, name: str) -> dict[Any, Any]:
        return dict(dict.items(self._attribute(name, dict)))

    def _attribute(self, name: str, kind: type) -> Any:
        value = getattr(self, "attributes", {}).get(name)
        return value if isinstance(value, kind) else kind()


def read(path: Path) -> dict[str, Any]:
    """Content of a file of torch.save: tensors, plain containers, and stand-ins.

    Raises: ValueError with what is wrong in the file. It is a HoldsCode where objects in it have no stand-in.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the format before PyTorch 1.6, or a damaged file, which torch.load describes
        names = []
    if len(names) > NAMES:
        raise ValueError(f"not a checkpoint: it names {len(names):,} functions and classes, more than {NAMES:,}")
    # Dictionaries with default values are filled item by item, which the unpickler allows for dict itself alone.
    calls = [(_empty if name == "collections.defaultdict" else StandIn, name) for name in names]
    try:
        with torch.serialization.safe_globals(calls), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise errors of many types
        named = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        objects = [named[1]] if named else sorted(names)
        if objects and isinstance(error, pickle.UnpicklingError):
            raise HoldsCode(path, ", ".join(printable(name, SHOWN) for name in objects[:3])) from error
        raise ValueError(f"not a readable checkpoint ({_reason(error)})") from error
    if not isinstance(content, (dict, StandIn)):
        raise ValueError(f"not a checkpoint but a {type(content).__name__}, where a dict is expected")
    return _Plain(path.stat().st_size).of(content)


def _empty(*_: Any) -> dict[str, Any]:
    return {}


class HoldsCode(ValueError):
    """Error of a file with objects that have no stand-in, and how its weights alone are saved."""

    def __init__(self, path: Path, names: str) -> None:
        weights = 'x.state_dict() if hasattr(x, "state_dict") else x.get("state_dict", x)'
        code = f'import torch; x = torch.load({str(path)!r}, "cpu", weights_only=False); '
        super().__init__(
            f"not read, since reading it would run code of the file: it holds objects of {names}. Only if you trust "
            "its authors as you trust a program that you start: the command that follows runs that code and "
            f"saves the weights alone; then give weights.pth: python -c "
            + shlex.quote(f'{code}torch.save({weights}, "weights.pth")')
        )


def _reason(error: Exception) -> str:
    """Reason of an error of torch.load, without its advice to run the code of the file."""
    reason = first_line(Exception(str(error).partition("WeightsUnpickler error:")[2].strip() or error))
    shown = "no object of tensors" if "weights_only" in reason else printable(reason, SHOWN)
    return f"{type(error).__name__}: {shown}"


class _Plain:
    """Copy of the content of a file of `size` bytes in plain dictionaries and tensors, which have no other attributes.

    torch gives a tensor that claims more numbers than the file holds memory with any values. A view of few numbers may
    claim any shape, and a copy of it would take all that memory.
    """

    def __init__(self, size: int) -> None:
        self.size, self.parts, self.claimed, self.expanded = size, 0, 0, 0
        self.storages: set[int] = set()

    def of(self, value: Any, name: str = "", depth: int = 1) -> Any:
        """The plain copy of a dictionary, stand-in or tensor; another value as it is. Raises: ValueError."""
        if isinstance(value, Tensor):
            return self._tensor(Tensor.detach(value), name)
        if isinstance(value, StandIn):
            value = value.tensors()
        if not isinstance(value, dict):
            return value
        self.parts += len(value)
        limit = max(PARTS, self.size)
        if depth > DEPTH or self.parts > limit:
            raise ValueError(
                f"its dictionaries are nested more than {DEPTH} deep or have more than {limit:,} parts, as at "
                f"{printable(name)}"
            )
        within = f"{name}." if name else ""
        return {key: self.of(part, within + name_of(key), depth + 1) for key, part in dict.items(value)}

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        if not is_ordinary(value):
            return value  # where such a tensor is needed, its reader refuses it
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.claimed += storage.nbytes()
        self.expanded += max(0, value.numel() * value.element_size() - storage.nbytes())
        if self.claimed > self.size or self.expanded > max(VIEWS, self.size):
            claimed = self.claimed + self.expanded
            raise ValueError(f"its tensors claim {claimed:,} bytes up to {printable(name)}, the file has {self.size:,}")
        return value
