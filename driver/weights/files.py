"""Content of a checkpoint file, read without running code that the file may hold."""

import argparse
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import UserError, missing

FOLDER = ("checkpoint.pt", "model.safetensors", "pytorch_model.bin")
"""Files that are looked for in a folder: a run's checkpoint, then the names on model hubs."""
HARMLESS: list[Any] = [
    argparse.Namespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (np.float64().__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64().__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdU"},
]
"""Types, besides tensors and plain containers, that common training scripts save and that run no code: their arguments
and numbers of numpy, by the names of old and new versions."""
_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; `git lfs pull` fetches it",
    b"<": "a web page (HTML or XML), not weights; download the file itself",
    b"{": "JSON text, not weights; download the file of weights itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes; weights of PyTorch are needed",
}


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint file, or of the one in a folder: tensors and plain containers.

    Raises: UserError where the file is missing, damaged, of another format, or holds anything else.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: a folder without weights; none of {', '.join(FOLDER)} is in it")
        path = found[0]
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
    return f"a zip archive of {', '.join(names[:3]) or 'nothing'}, not weights; unpack it first"


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise errors of many types
        if code := re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error)):
            raise UserError(f"{path}: {_holds_code(path, code[1])}") from error
        raise UserError(f"{path}: not a readable checkpoint ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint but a {type(content).__name__}, where a dict is expected")
    return content


def _holds_code(path: Path, name: str) -> str:
    """Why a file that names classes is not read, and how its weights alone are saved."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):  # the format before PyTorch 1.6
        names = [name]
    weights = 'x.state_dict() if hasattr(x, "state_dict") else x.get("state_dict", x)'
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"holds objects of {', '.join(names[:3])}{more}; reading these would run "
        f"code of the file, so it is not read. If you trust the file, save its weights alone and give weights.pth: "
        f'python -c \'import torch; x = torch.load("{path}", "cpu", weights_only=False); '
        f'torch.save({weights}, "weights.pth")\''
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(missing(str(path), "safetensors", error)) from error
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or copy it again") from error
