"""Search for a backbone in a checkpoint: the prefix under which the tensors have the backbone's names.

A prefix is what training code puts before the name of a tensor, e.g. `state_dict.model.`, `teacher.backbone.` or
`module.encoder_q.`; dictionaries within dictionaries count as prefixes.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import UserError
from ..messages.text import listed

_TEACHER = {"teacher", "ema", "swa", "averaged"}
_MOVING = {"momentum", "target", "k", "key"}
"""Parts of prefixes of a moving average that is not the network its authors evaluate, as in MoCo and BYOL."""
_STUDENT = {"student", "network", "q", "query", "base", "online"}
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that compilation, sharding and activation checkpointing of single blocks insert."""
_TORCHVISION_VIT = {
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(?:0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(?:3|linear_2)\.": ".mlp.fc2.",
    r"^heads\.": "head.",
}
"""Parts of the names in torchvision's ViT, and timm's names for them; `linear_` is of its first version."""
_ORIGINS = {
    "features.0.0.weight": "a network of torchvision",
    "trunk_output.": "a network of torchvision",
    "embeddings.patch_embeddings": "a network of Hugging Face's transformers",
    "embedder.embedder": "a network of Hugging Face's transformers",
}
"""Marks of libraries whose names timm does not convert for every model."""


@dataclass(frozen=True)
class Found:
    """Tensors of a file under one prefix, by the backbone's names where timm or this module could convert them."""

    prefix: str
    tensors: dict[str, Tensor]
    converted: bool = False


def flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """All tensors of nested dictionaries, by their keys joined with dots, without wrappers of modules.

    Keys that are not text are left out.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[_WRAPPERS.sub("", prefix + key)] = value
        elif isinstance(key, str) and isinstance(value, Mapping):
            tensors |= flatten(value, f"{prefix}{key}.")
    return tensors


def model_name(backbone: nn.Module) -> str:
    return getattr(backbone, "pretrained_cfg", {}).get("architecture", "convnet")


def required(backbone: nn.Module) -> set[str]:
    """Names that a file must have: all but the counters of batch norms, which old files lack and nothing reads."""
    return {name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")}


def find(state: dict[str, Tensor], backbone: nn.Module, where: str, whose: str | None) -> Found:
    """Backbone in the tensors of a file; `whose` chooses among several. Raises: UserError if none is whole.

    First come prefixes with all names of the backbone, then other layouts whose names are converted.
    """
    names = required(backbone)
    counts = Counter(name[:start] for name in state for start in _starts(name) if name[start:] in names)
    whole = [Found(prefix, _under(state, prefix)) for prefix, count in counts.items() if count == len(names)]
    if not whole:
        others = [
            Found(p, convert(rename(_under(state, p), backbone), backbone), converted=True)
            for p in _prefixes(state, names)
        ]
        counts |= Counter({found.prefix: len(names & found.tensors.keys()) for found in others})
        whole = [found for found in others if names <= found.tensors.keys()]
    if not whole:
        prefix, count = counts.most_common(1)[0] if counts else ("", 0)
        prefix = prefix if 10 * count >= len(names) else ""  # fewer names agree by chance
        raise UserError(f"{where}: {_missing(state, names, prefix, backbone)}")
    return _choose(whole, where, whose)


def _starts(name: str) -> list[int]:
    """Places in a tensor's name at which the name of a backbone's tensor may begin."""
    return [0, *(dot.end() for dot in re.finditer(r"\.", name))]


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _prefixes(state: dict[str, Tensor], names: set[str]) -> list[str]:
    """Prefixes of at least half as many tensors as the backbone has."""
    sizes = Counter(name[:start] for name in state for start in _starts(name))
    return [prefix for prefix, count in sizes.items() if 2 * count >= len(names)]


def rename(tensors: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names of an ordinary module, from three other layouts.

    Names of torchvision's ViT become timm's. `blocks.0.3.` of chunked blocks, as DINOv2 trains, becomes `blocks.3.`. An
    index of a Sequential over a network's children, as in `nn.Sequential(*list(resnet.children())[:-1])`, becomes the
    child's name.
    """
    if "conv_proj.weight" in tensors:
        for old, new in _TORCHVISION_VIT.items():
            tensors = {re.sub(old, new, name): value for name, value in tensors.items()}
    children = [name for name, _ in backbone.named_children()]
    if tensors and children and all(re.match(r"\d+\.", name) for name in tensors) and not children[0].isdigit():
        indices = {name: int(name.partition(".")[0]) for name in tensors}
        if max(indices.values()) < len(children):
            return {f"{children[i]}.{name.partition('.')[2]}": tensors[name] for name, i in indices.items()}
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in tensors.items()}


def convert(tensors: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Tensors as timm's own converter of the backbone's family makes them.

    It knows published layouts of the family, and resamples position embeddings to the backbone's grid. Tensors that
    it cannot take come back as they are.
    """
    if model_name(backbone) == "convnet":
        return tensors
    import timm

    module = sys.modules[timm.model_entrypoint(model_name(backbone)).__module__]
    family = getattr(module, "checkpoint_filter_fn", None) or getattr(
        sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None
    )
    if family is None:
        return tensors
    try:
        return dict(family(dict(tensors), backbone))
    except Exception:  # a converter that meets another network's tensors raises errors of many types
        return tensors


def _choose(whole: list[Found], where: str, whose: str | None) -> Found:
    """The backbone that is asked for, among whole ones. None: the teacher, else the network, else a moving average."""
    kinds: dict[str, list[Found]] = {"teacher": [], "moving": [], "student": [], "plain": []}
    for found in whole:
        parts = set(re.split(r"[._]", found.prefix))
        marks = (("teacher", _TEACHER), ("moving", _MOVING), ("student", _STUDENT))
        kinds[next((kind for kind, mark in marks if parts & mark), "plain")].append(found)
    own = kinds["student"] + kinds["plain"]
    if whose == "teacher":
        asked = [kinds["teacher"], kinds["moving"], kinds["plain"] if not kinds["student"] else []]
    else:
        asked = [own] if whose == "student" else [kinds["teacher"], own, kinds["moving"]]
    group = next((group for group in asked if group), None)
    if group is None:
        raise UserError(f"{where}: no {whose} in it, only {' and '.join(found.prefix or 'one' for found in whole)}")
    first = group[0]
    for other in group[1:]:
        if any(not value.equal(other.tensors[name]) for name, value in first.tensors.items() if name in other.tensors):
            raise UserError(
                f"{where}: several backbones that fit, {' and '.join(repr(found.prefix) for found in group)}; "
                "save one of them to a file of its own"
            )
    return first


def _missing(state: dict[str, Tensor], names: set[str], prefix: str, backbone: nn.Module) -> str:
    """Description of the difference between a file and the backbone, whose tensors it does not have."""
    name = model_name(backbone)
    if not state:
        return "no backbone in it: it holds no tensors with names"
    have = [n for n in backbone.state_dict() if n in names and prefix + n in state]
    lack = [n for n in backbone.state_dict() if n in names and prefix + n not in state]
    origin = next((origin for mark, origin in _ORIGINS.items() if any(mark in n for n in state)), None)
    text = f"does not fit the backbone {name}: {len(have)} of its {len(names)} tensors are there"
    text += f"; missing are {listed(lack)}"
    if others := [n for n in _under(state, prefix) if n not in names]:
        text += f"; the file has {listed(others)} instead"
    if origin:
        text += f". These are names of {origin}; give weights by timm's names, or --model.pretrained True"
    return text
