"""Safetensors files: exports, written with a checksum of the whole file, and files of others.

The checksum stands among the metadata, in the header. It is that of the file with zeros in its place.
"""

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from bam_kernels.whole_files import replacing

from ..config import UserError, missing
from .checksums import DIGEST, DIGITS, Checksum

ORIGIN = "bam_kernels.model"
"""Key of an export's metadata for the options of its model, as JSON."""
LONGEST_HEADER = 10**8
"""Bytes above which safetensors reads no header."""
_START = 8
"""Bytes of a file before its header, which hold the header's length."""
_PLACE = re.compile(rb'"%b":"([0-9a-f]{%d})"' % (re.escape(DIGEST.encode()), DIGITS))


def save(tensors: dict[str, Tensor], options: dict[str, Any], path: Path, what: str) -> None:
    """Write tensors and the options of their model to a safetensors file. `what` begins each message.

    Raises: UserError where the file cannot be written, or safetensors is missing.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(missing("--format safetensors", "safetensors", error)) from error
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {ORIGIN: json.dumps(options), DIGEST: "0" * DIGITS})
            _stamp(temporary)
    except SafetensorError as error:  # also of a full disk
        raise UserError(f"{what}: not written ({error})") from error


def _stamp(path: Path) -> None:
    """Put the checksum of a file in the place of the zeros that its metadata has."""
    with path.open("r+b") as file:
        place = _PLACE.search(_header(file))
        assert place is not None
        digits = _digits(file, place)
        file.seek(_START + place.start(1))
        file.write(digits)


def _digits(file: BinaryIO, place: re.Match[bytes]) -> bytes:
    """Checksum of a file, with zeros in the place that it has in the header."""
    checksum = Checksum()
    checksum.add_span(file, 0, _START + place.start(1))
    checksum.add(b"0" * DIGITS)
    checksum.add_span(file, _START + place.end(1), file.seek(0, 2))
    return checksum.digits()


def _header(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(int.from_bytes(file.read(_START), "little"))


def fault(path: Path) -> str:
    """What is damaged in a safetensors file; empty where nothing is seen. Only exports of this driver have a checksum.

    Names that occur twice are a fault too: readers differ in which of the two they take.
    """
    with path.open("rb") as file:
        start, header = file.read(_START), _header(file)
        if len(header) < int.from_bytes(start, "little"):
            return f"not whole: it ends within its header, after {path.stat().st_size} bytes"
        try:
            metadata = json.loads(header, object_pairs_hook=_without_twins).get("__metadata__") or {}
            known = {ORIGIN, DIGEST} & metadata.keys()
        except (ValueError, AttributeError, RecursionError) as error:
            return f"damaged in its header ({error})"
        if not known:
            return ""
        if other := sorted(metadata.keys() - known):
            return f"damaged in its header, where {other[0]!r} is unknown"
        if DIGEST not in known:  # an export of an older version
            return ""
        place = _PLACE.search(header)
        if place is None or _digits(file, place) != place[1]:
            return f"damaged: its bytes do not have the checksum {DIGEST} in its header"
    return ""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def read(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name; of an export, also the options of its model under `config`.

    Raises: ValueError where the file is damaged, UserError where safetensors is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(missing(str(path), "safetensors", error)) from error
    if found := fault(path):
        raise ValueError(found)
    try:
        with safe_open(path, "pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
            options = (file.metadata() or {}).get(ORIGIN)
    except Exception as error:  # damaged headers make safetensors and torch raise errors of many types
        raise ValueError(f"not a readable safetensors file ({error})") from error
    if options is None:
        return content
    try:
        model = json.loads(options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {ORIGIN} is not JSON ({error})") from error
    if not isinstance(model, dict):
        raise ValueError(f"its {ORIGIN} must be a JSON object, got {type(model).__name__}")
    return content | {"config": {"model": model}}
