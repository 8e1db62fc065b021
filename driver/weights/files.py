"""Content of a checkpoint file, read without running code that the file may hold."""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, missing
from ..messages.text import first_line, listed

FOLDER = ("checkpoint.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
"""Files that are looked for in a folder: a run's checkpoint, then the names on model hubs."""
INDEX = ".index.json"
"""End of the name of a list of files, among which a model hub divides the tensors of a large model."""
ORIGIN = "bam_kernels.model"
"""Key of an export's metadata for the options of its model, as JSON."""
_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; `git lfs pull` fetches it",
    b"<": "a web page (HTML or XML), not weights; download the file itself",
    b"{": "JSON text, not weights; download the file of weights itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes; weights of PyTorch are needed",
}


class StandIn:
    """Object of a checkpoint whose class or function is not called: it has the attributes that the file gives it."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        del arguments, keywords

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def tensors(self) -> dict[str, Any]:
        """Parameters, persistent buffers and inner modules of a whole module, by name; empty for other objects."""
        buffers, skipped = getattr(self, "_buffers", {}), getattr(self, "_non_persistent_buffers_set", ())
        kept = {name: value for name, value in buffers.items() if name not in skipped}
        return {**getattr(self, "_parameters", {}), **kept, **getattr(self, "_modules", {})}


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint file, or of the one in a folder: tensors, plain containers, and stand-ins for objects.

    Options of the run that wrote an export are under `config`, as in its checkpoints.
    Raises: UserError where the file is missing, damaged or of another format.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: a folder without weights; none of {', '.join(FOLDER)} is in it")
        path = found[0]
    if path.name.endswith(INDEX):
        return _read_parts(path)
    try:
        with path.open("rb") as file:
            start, size = file.read(512), path.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # A safetensors file starts with the length of its JSON header in 8 bytes.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1e8:
        return _read_safetensors(path)
    if reason := _not_weights(path, start, size):
        raise UserError(f"{path}: {reason}")
    return _read_torch(path)


def _not_weights(path: Path, start: bytes, size: int) -> str:
    """What a file is that holds no weights of PyTorch, and the way on. Empty for a file that may hold them."""
    if not size:
        return "an empty file; download or copy it again"
    for magic, what in _STARTS.items():
        if start.lstrip().startswith(magic):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if start.startswith(b"PK"):
        return _not_weights_zip(path, size)
    if start[:1] != b"\x80":
        return f"neither a checkpoint of PyTorch nor safetensors; it starts with {start[:12]!r}"
    return ""


def _not_weights_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"not whole: it ends within its content, after {size} bytes; download or copy it again"
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript program, not weights; save torch.jit.load(FILE).state_dict() and give that file"
    if any(name.endswith("data.pkl") for name in names):
        return ""
    if any(name.endswith(".npy") for name in names):
        return (
            "a NumPy archive, as of Google's ViTs; save timm.create_model(NAME, checkpoint_path=FILE).state_dict() "
            "with torch.save and give that file"
        )
    return f"a zip archive of {listed(names) or 'nothing'}, not weights; unpack it first"


def _read_parts(index: Path) -> dict[str, Any]:
    """Tensors of all files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of files of weights ({type(error).__name__}: {error})") from error
    return {name: value for part in names for name, value in read(index.parent / part).items()}


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the format before PyTorch 1.6, or a damaged file, which torch.load describes
        names = []
    # Dictionaries with default values are filled item by item, which the unpickler allows for dict itself alone.
    calls = [(_empty if name == "collections.defaultdict" else StandIn, name) for name in names]
    try:
        with torch.serialization.safe_globals(calls):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise errors of many types
        named = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        objects = [named[1]] if named else sorted(names)
        if objects and isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{path}: {_holds_code(path, ', '.join(objects[:3]))}") from error
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)})") from error
    if isinstance(content, StandIn):
        content = content.tensors()
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint but a {type(content).__name__}, where a dict is expected")
    return content


def _empty(*_: Any) -> dict[str, Any]:
    return {}


def _holds_code(path: Path, names: str) -> str:
    """Why a file with objects that have no stand-in is not read, and how its weights alone are saved."""
    weights = 'x.state_dict() if hasattr(x, "state_dict") else x.get("state_dict", x)'
    return (
        f"holds objects of {names}; reading these would run "
        f"code of the file, so it is not read. If you trust the file, save its weights alone and give weights.pth: "
        f'python -c \'import torch; x = torch.load("{path}", "cpu", weights_only=False); '
        f'torch.save({weights}, "weights.pth")\''
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(missing(str(path), "safetensors", error)) from error
    try:
        with safe_open(path, "pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
            options = (file.metadata() or {}).get(ORIGIN)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or copy it again") from error
    return content | ({"config": {"model": json.loads(options)}} if options else {})
