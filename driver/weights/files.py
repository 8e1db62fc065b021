"""Content of a checkpoint file, read without running code that the file may hold."""

import json
import zipfile
from pathlib import Path
from typing import Any

from ..config import UserError
from ..messages.text import listed, printable
from . import exports, unpickling
from .checksums import fault_of_zip, is_marked
from .way_back import FILE, damaged

FOLDER = (FILE, "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
"""Files that are looked for in a folder: a run's checkpoint, then the names on model hubs."""
INDEX = ".index.json"
"""End of the name of a list of files, among which a model hub divides the tensors of a large model."""
_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; `git lfs pull` fetches it",
    b"<": "a web page (HTML or XML), not weights; download the file itself",
    b"{": "JSON text, not weights; download the file of weights itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes; weights of PyTorch are needed",
    **dict.fromkeys((b"\x80\x04", b"\x80\x05"), "a pickle of Python, not of PyTorch; save its weights by torch.save"),
}
"""What a file is that starts so, and the way on. The format before PyTorch 1.6 is a pickle too, of protocol 2."""


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
    return _read_parts(path) if path.name.endswith(INDEX) else _read_file(path)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
        with path.open("rb") as file:
            start, size = file.read(512), path.stat().st_size
        marked = is_marked(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path), None)}: cannot be read ({error})") from error
    # A safetensors file starts with the length of its JSON header in 8 bytes.
    safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < exports.LONGEST_HEADER
    if not size:
        raise damaged(path, "an empty file")
    if not marked and not safetensors and (reason := _not_weights(path, start)):
        raise damaged(path, reason, "")
    try:
        if safetensors and not marked:
            return exports.read(path)
        if (marked or start.startswith(b"PK")) and (fault := fault_of_zip(path)):
            raise ValueError(fault)
        return unpickling.read(path)
    except unpickling.HoldsCode as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise damaged(path, str(error)) from error


def _not_weights(path: Path, start: bytes) -> str:
    """What a file is that holds no weights of PyTorch, and the way on. Empty for a file that may hold them."""
    for magic, what in _STARTS.items():
        if start.lstrip().startswith(magic):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if start.startswith(b"PK"):
        return _not_weights_zip(path)
    if start[:1] != b"\x80":
        return f"neither a checkpoint of PyTorch nor safetensors; it starts with {start[:12]!r}"
    return ""


def _not_weights_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damage makes zipfile raise errors of many types
        return ""  # its fault is found with its checksums
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
    """Tensors of all files that an index names: files in its folder and below, which are no lists themselves."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [Path(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of files of weights ({type(error).__name__}: {error})") from error
    for part in parts:
        if part.is_absolute() or ".." in part.parts or part.name.endswith(INDEX):
            raise UserError(
                f"{index}: names {printable(str(part))}; an index must name files of weights in its own folder"
            )
    return {name: value for part in parts for name, value in _read_file(index.parent / part).items()}
