"""Backbone weights from a file: an export, a checkpoint of this driver, or a checkpoint of the authors' code."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import UserError, missing

_OWN_PREFIX = "backbone.1."
"""Prefix of the model's weights in a Network, whose `backbone` is a Sequential of standardisation and model."""
_WRAPPERS = ("module.", "_orig_mod.", "base_encoder.", "backbone.")


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint file: tensors and plain containers.

    The only other type that is read is argparse.Namespace, which the authors' checkpoints hold.
    Raises: UserError where the file is missing, damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file makes the unpickler raise errors of many types
        raise UserError(f"{path}: not a readable checkpoint ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint but a {type(content).__name__}, where a dict is expected")
    return content


def backbone_weights(path: Path, whose: str | None = None) -> dict[str, Tensor]:
    """Backbone weights by their names in the timm model. `whose` is "student", "teacher", or None: the teacher if any.

    Checkpoints of this driver hold them in `network` and `teacher`. Checkpoints of the authors hold them in `model`,
    with prefixes `student.` or `teacher.` and any of `module.`, `_orig_mod.`, `base_encoder.`, `backbone.`.
    Raises: UserError where the file has no such weights.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    content = read(path)
    if isinstance(content.get("network"), dict):
        teacher = content.get("teacher")
        if whose == "teacher" and teacher is None:
            raise UserError(f"{path}: no teacher in it")
        own = content["network"] if whose == "student" or teacher is None else teacher
        return {name[len(_OWN_PREFIX) :]: value for name, value in own.items() if name.startswith(_OWN_PREFIX)}
    return _authors_weights(content.get("model", content), path, whose)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(missing(str(path), "safetensors", error)) from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _authors_weights(content: Any, path: Path, whose: str | None) -> dict[str, Tensor]:
    named = content.items() if isinstance(content, dict) else ()
    state = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    trained = [part for part in ("teacher", "student") if any(name.startswith(f"{part}.") for name in state)]
    if whose is not None and trained and whose not in trained:
        raise UserError(f"{path}: no {whose} in it")
    if trained:
        part = f"{whose or trained[0]}."
        state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    inner = {name: _without_wrappers(name) for name in state}
    backbone = [name for name in state if "backbone." in name or "base_encoder." in name] or list(state)
    if not backbone:
        raise UserError(f"{path}: neither a checkpoint of this driver nor one of the authors': no backbone in it")
    return {inner[name]: state[name] for name in backbone}


def _without_wrappers(name: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def load_backbone(backbone: nn.Module, path: Path, whose: str | None = None) -> None:
    """Load all backbone weights of the file `path` into `backbone`. Raises: UserError naming what does not fit."""
    state = backbone_weights(path, whose)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the backbone that the options describe: {error}") from error
