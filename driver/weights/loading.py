"""Backbone weights from a file or from timm, loaded whole or not at all."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import pretrained_colours
from ..config import Model, UserError
from ..messages.text import first_line, listed, printable
from ..model import IMAGENET_MEAN
from .files import read
from .run_contents import is_count, is_ordinary
from .search import Found, convert, find, flatten, model_name


def load_backbone(backbone: nn.Module, path: Path, whose: str | None = None, model: Model | None = None) -> None:
    """Load all backbone weights of the file `path` into `backbone`, and print what was taken and what was left out.

    `whose` is "student", "teacher", or None: the teacher if there is one. Files are exports and checkpoints of this
    driver, and checkpoints of other training code, whose heads are left out. `model` has the backbone's options; files
    of this driver must agree with them, and others are not compared.
    Raises: UserError naming what does not fit; the backbone is unchanged then.
    """
    content = read(path)
    origin = content.get("config") if isinstance(content.get("config"), dict) else {}
    _check_origin(origin.get("model"), model or Model(), str(path))
    _load(backbone, flatten(content), str(path), whose)


def _check_origin(written: Any, model: Model, where: str) -> None:
    """Compare options of the run that wrote a file with the options here, where no tensor shows a difference.

    `written` has the options of a run's model; anything else is of other code.
    Raises: UserError on another number of attention heads.
    """
    if not isinstance(written, dict) or "teacher_momentum" not in written:
        return
    heads = written.get("heads", 0)
    if not is_count(heads):
        raise UserError(f"{where}: its config.model.heads must be a whole number, got a {type(heads).__name__}")
    if model.name != "convnet" and heads != model.heads:
        raise UserError(
            f"{where}: its run has --model.heads {heads}, here heads is {model.heads} (0: the model's own number). The "
            f"shapes of the tensors agree, but the features would not; give --model.heads {heads}, or --backbone.heads "
            f"{heads}"
        )
    name = written.get("name")
    if written.get("pretrained") is True and not model.pretrained and isinstance(name, str) and _is_known(name):
        mean, _ = pretrained_colours(name)
        if mean != IMAGENET_MEAN:
            print(f"note: the run of {where} standardised images with mean {mean}; here the mean is {IMAGENET_MEAN}")


def _is_known(name: str) -> bool:
    """Whether timm has weights of the model `name`, which a file may say and another version of timm may not know."""
    import timm

    return timm.get_pretrained_cfg(name) is not None


def load_pretrained(backbone: nn.Module, name: str) -> None:
    """Load timm's own weights of the model `name`, with or without a tag, downloaded into the hub's cache.

    Processes that download at one time wait for each other by the file locks of the hub's client.
    Raises: UserError where they cannot be had or do not fit.
    """
    import timm

    try:
        source = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client raises errors of many types
        raise UserError(
            f"--model.pretrained True: timm could not get the weights of {name} ({first_line(error)}). "
            "Without a connection, save them on another machine and give --model.weights weights.pth: python -c "
            f'\'import timm, torch; torch.save(timm.create_model("{name}", pretrained=True).state_dict(), '
            '"weights.pth")\''
        ) from error
    _load(backbone, dict(source.state_dict()), f"timm's weights of {name}", None)


def _load(backbone: nn.Module, state: dict[str, Tensor], where: str, whose: str | None) -> None:
    if empty := [name for name, value in state.items() if value.is_meta]:
        raise UserError(f"{where}: holds tensors without values (meta tensors): {listed(empty)}")
    if other := [name for name, value in state.items() if not is_ordinary(value)]:
        kinds = {f"{state[name].layout}, {state[name].dtype}" for name in other}
        raise UserError(f"{where}: holds tensors that are not plain numbers ({listed(sorted(kinds))}): {listed(other)}")
    found = find(state, backbone, where, whose)
    _check_rest(found, backbone, where)
    own = backbone.state_dict()
    tensors, changes = _fitted(found.tensors, backbone)
    wrong = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if wrong:
        sizes = [f"{name} is {_shape(tensors[name])} but must be {_shape(own[name])}" for name in wrong]
        text = f"{where}: does not fit the backbone {model_name(backbone)}: {listed(sizes)}"
        if all(re.search("pos|attention_bias", name) for name in wrong):
            text += ". These depend on the size of the images; give the size that the file was trained at"
        raise UserError(text)
    taken = {name: value for name, value in tensors.items() if name in own}
    for name, value in taken.items():
        if own[name].is_floating_point() > value.is_floating_point():
            raise UserError(f"{where}: {name} is {value.dtype}, {value.layout}, but must hold plain {own[name].dtype}")
        if not value.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are not finite")
    backbone.load_state_dict(taken, strict=False)  # without counters of batch norms, see required
    parts = [f"{where}: {len(taken)} of {len(state)} tensors" + (f" under {found.prefix[:-1]}" if found.prefix else "")]
    parts += ["names converted from another layout"] * found.converted
    parts += [listed(changes)] * bool(changes)
    if rest := _groups(state, found, own):
        parts.append(f"left out: {rest}")
    print(printable("; ".join(parts), None))
    _note_on_colours(found, backbone)


def _fitted(tensors: dict[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with positions resampled and the first convolution adapted to the backbone, and a line for each change.

    Tensors that still have other shapes are left for the caller to refuse.
    """
    own, changes = backbone.state_dict(), []
    tensors = dict(tensors)
    first = getattr(backbone, "pretrained_cfg", {}).get("first_conv") or ()
    for name in [f"{part}.weight" for part in ([first] if isinstance(first, str) else first)]:
        here, there = own.get(name), tensors.get(name)
        if here is None or there is None or here.ndim != 4 or there.ndim != 4 or here.shape[1] == there.shape[1]:
            continue
        if there.shape[1] == 3:
            from timm.models import adapt_input_conv

            tensors[name] = adapt_input_conv(here.shape[1], there)
            changes.append(f"{name} adapted from 3 channels to {here.shape[1]}")
    if any(name in own and value.shape != own[name].shape for name, value in tensors.items()):
        # A converter of timm may take a file without a classifier for one of an older layout.
        classifiers = {f"{name}.weight": torch.empty(0) for name in _classifiers(backbone)}
        converted = convert(classifiers | tensors, backbone)
        for name in [name for name in own if name in tensors and tensors[name].shape != own[name].shape]:
            value = converted.get(name, tensors[name])
            if name == "pos_embed" and value.shape != own[name].shape:
                value = _resampled_positions(value, backbone)
            # A projection of larger or smaller patches could be resampled, too, but is another network's.
            if value.shape == own[name].shape and ("pos" in name or value.ndim != 4):
                changes.append(f"{name} resampled from {_shape(tensors[name])} to {_shape(own[name])}")
                tensors[name] = value
    return tensors, changes


def _resampled_positions(value: Tensor, backbone: nn.Module) -> Tensor:
    """Position embeddings (1, n, D) on the backbone's grid, for families whose converter leaves them as they are."""
    own, grid = backbone.pos_embed, getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if grid is None or own.ndim != 3 or value.ndim != 3 or value.shape[2] != own.shape[2]:
        return value
    from timm.layers import resample_abs_pos_embed

    prefix = own.shape[1] - grid[0] * grid[1]
    patches = max(0, value.shape[1] - prefix)
    if math.isqrt(patches) ** 2 != patches or not patches:
        return value
    return resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix)


def _check_rest(found: Found, backbone: nn.Module, where: str) -> None:
    """Raise UserError if the tensors beside the backbone's show that the file holds another, larger network."""
    own, heads = backbone.state_dict(), _classifiers(backbone)
    prefixes = tuple(f"{head}." for head in heads)
    others = []
    for name in found.tensors:
        top, _, inner = name.partition(".")
        is_part = top.isdigit() or hasattr(backbone, top) if inner else bool(re.search("token|embed", name))
        ignored = name.startswith(prefixes) or re.match("mask|decoder", name)
        if name not in own and is_part and not ignored and not _is_index(name):
            others.append(name)
    if others:
        name = model_name(backbone)
        raise UserError(f"{where}: does not fit the backbone {name}, which has no {listed(others)}")


def _is_index(name: str) -> bool:
    """Whether a tensor is a counter or a table of indices, which the model makes by itself."""
    return name.endswith(("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table"))


def _classifiers(backbone: nn.Module) -> set[str]:
    """Names of modules of a whole classifier of this family that are not part of the backbone."""
    named = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return {"fc", "head", "head_dist", "classifier", "last_linear"} | set([named] if isinstance(named, str) else named)


def _groups(state: dict[str, Tensor], found: Found, own: dict[str, Tensor]) -> str:
    """Tensors of the file that were left out, as groups with their numbers."""
    path = found.prefix.split(".")[:-1]
    groups: Counter[str] = Counter()
    for name in state:
        inner = name[len(found.prefix) :]
        if name.startswith(found.prefix) and (inner in own or inner not in found.tensors or _is_index(inner)):
            continue
        parts = name.split(".")
        same = next((i for i, part in enumerate(parts) if i >= len(path) or part != path[i]), 0)
        groups[".".join(parts[: same + 1])] += 1
    return listed([f"{group} ({count})" for group, count in groups.items()], 6)


def _note_on_colours(found: Found, backbone: nn.Module) -> None:
    """Print a note where a whole classifier was given that timm trained on images standardised in another way."""
    mean = getattr(backbone, "pretrained_cfg", {}).get("mean", IMAGENET_MEAN)
    classifier = any(found.tensors.keys() >= {f"{name}.weight"} for name in _classifiers(backbone))
    if not found.prefix and classifier and tuple(mean) != IMAGENET_MEAN:
        print(
            f"note: timm's {model_name(backbone)} expects images standardised with mean {tuple(mean)}; here the mean "
            f"is {IMAGENET_MEAN}. If the file is timm's, --model.pretrained True takes its mean, too"
        )


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"
