"""Parts of a run's checkpoint: which there must be, of which types and shapes.

PyTorch checks little of this when it loads states. A moment of another shape than its weight ends a process without a
word.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PARTS
from ..messages.text import NAME_LIMIT, printable

LARGEST = 2**53
"""Bound of counts: a float holds each whole number up to it exactly."""
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Lamb": {"exp_avg", "exp_avg_sq"}}
"""What an optimiser must have for a weight once it has taken a step; others make anew what is missing."""
OPTIONAL = {"teacher": dict, "scaler": dict, "boxes": Tensor, "backend": str}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval")


class WrongPart(ValueError):
    """Error of a checkpoint with a part of a wrong type, shape or value."""


def require(holds: bool, what: str, must: str, got: Any) -> None:
    """Raise a WrongPart that says what a part of a checkpoint must be, and what it is."""
    if not holds:
        raise WrongPart(f"its {what} must be {must}, got {_shown(got)}")


def _shown(got: Any) -> str:
    if isinstance(got, Tensor):
        return f"a tensor {tuple(got.shape)} of {got.dtype}, {got.layout}, {got.device}"
    if isinstance(got, str):
        return repr(printable(got[:NAME_LIMIT]))
    return repr(got)[:NAME_LIMIT] if got is None or type(got) in (bool, int, float) else f"a {type(got).__name__}"


def name_of(key: Any) -> str:
    """Key of a dictionary for messages. One that is no text or number may hold anything, without end."""
    return printable(str(key)) if isinstance(key, (str, int, float)) else f"({type(key).__name__})"


def is_option(value: Any) -> bool:
    """Whether a value is a number, text, None, or a list of them, as options of a run are."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or type(part) in (bool, int, float, str) for part in parts)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, finite and small enough to compute with."""
    return type(value) in (int, float) and math.isfinite(value) and (type(value) is float or abs(value) < LARGEST)


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor with memory that is neither sparse, nested nor quantised."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return not value.is_meta and not value.is_quantized


def is_plain(value: Any, floating: bool = True) -> bool:
    """Whether a value is an ordinary tensor of floats, or of integers or truth values."""
    return is_ordinary(value) and not value.is_complex() and value.is_floating_point() == floating


def check_run(content: dict[str, Any]) -> None:
    """Check the parts of a checkpoint that are no states of modules.

    Raises: WrongPart; KeyError where a part is missing.
    """
    options = content["config"]
    require(isinstance(options, dict), "config", "a dict of options", options)
    for part in PARTS:
        require(isinstance(options[part], dict), f"config.{part}", "a dict of options", options[part])
        for name, value in options[part].items():
            require(is_option(value), f"config.{part}.{name_of(name)}", "a number, text or a list of them", value)
    for name in ("epoch", "step"):
        require(is_count(content[name]), name, "a whole number of at least 0", content[name])
    for name, kind in OPTIONAL.items():
        value = content.get(name)
        require(value is None or isinstance(value, kind), name, f"a {kind.__name__} or None", value)
    images = content["images"]
    require(isinstance(images, dict), "images", "a dict", images)
    for name in ("training", "step"):
        require(is_count(images[name]), f"images.{name}", "a whole number of at least 0", images[name])
    digests = images.get("digests")
    if digests is not None:
        require(isinstance(digests, dict), "images.digests", "a dict", digests)
        for part in ("training", "held_out"):
            require(isinstance(digests[part], str), f"images.digests.{part}", "text", digests[part])


def check_module(saved: Any, module: nn.Module, what: str) -> None:
    """Check that a saved state of a module is a dict of plain tensors. Names and shapes are torch's to compare.

    Raises: WrongPart.
    """
    require(isinstance(saved, dict), what, "a dict of tensors", saved)
    own = module.state_dict()
    for name, value in saved.items():
        require(isinstance(name, str), f"names in {what}", "text", name)
        if name in own:
            floating = own[name].is_floating_point()
            kind = "floats" if floating else "whole numbers"
            require(is_plain(value, floating), f"{what}.{printable(name)}", f"a plain tensor of {kind}", value)


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Check a saved state of an optimiser against its weights.

    Raises: WrongPart; KeyError where a part is missing.
    """
    require(isinstance(saved, dict), "optimizer", "a dict", saved)
    own, states = [group["params"] for group in optimizer.param_groups], saved["state"]
    numbers = _check_groups(saved["param_groups"], [len(weights) for weights in own])
    weights = dict(zip(numbers, (weight for group in own for weight in group), strict=True))
    require(isinstance(states, dict), "optimizer.state", "a dict", states)
    for number, state in states.items():
        require(number in weights, "optimizer.state", f"of {len(weights)} weights alone", number)
        what = f"optimizer.state.{number}"
        require(isinstance(state, dict), what, "a dict", state)
        lacking = MOMENTS.get(type(optimizer).__name__, set()) - state.keys() if state else set()
        if lacking:
            raise WrongPart(f"its {what} lacks {', '.join(sorted(lacking))}")
        for name, value in state.items():
            _check_moment(f"{what}.{name_of(name)}", name, value, weights[number])


def _check_groups(groups: Any, sizes: list[int]) -> list[int]:
    """Numbers that saved groups of these sizes give to the weights. Raises: WrongPart; KeyError."""
    what, numbers = "optimizer.param_groups", []
    require(
        isinstance(groups, list) and all(isinstance(group, dict) for group in groups), what, "a list of dicts", groups
    )
    for group in groups:
        require(isinstance(group["params"], list), f"{what}.params", "a list", group["params"])
        if "step" in group:  # of optimisers that count steps once for a group of weights
            _check_step(f"{what}.step", group["step"])
        numbers += group["params"]
    require([len(group["params"]) for group in groups] == sizes, what, f"for groups of {sizes} weights", groups)
    for number in numbers:
        require(is_count(number), f"{what}.params", "whole numbers", number)
    require(len(set(numbers)) == len(numbers), f"{what}.params", "different numbers", numbers)
    return numbers


def _check_moment(what: str, name: Any, value: Any, weight: Tensor) -> None:
    if name == "step":
        _check_step(what, value)
    elif value is not None:  # as momentum_buffer where the momentum is 0
        fits = is_plain(value) and value.shape == weight.shape
        require(fits, what, f"a plain tensor {tuple(weight.shape)} of floats, as its weight is", value)


def _check_step(what: str, value: Any) -> None:
    number = value.item() if is_plain(value) and value.ndim == 0 else value
    require(is_number(number) and number >= 0, what, "a finite number of at least 0", value)


def check_scaler(saved: Any) -> None:
    """Check a saved state of a gradient scaler. Raises: WrongPart; KeyError where a part is missing."""
    require(isinstance(saved, dict), "scaler", "a dict", saved)
    for name in SCALER:
        require(is_number(saved[name]) and saved[name] > 0, f"scaler.{name}", "a positive, finite number", saved[name])
    tracker = saved["_growth_tracker"]
    require(is_count(tracker), "scaler._growth_tracker", "a whole number of at least 0", tracker)


def check_boxes(saved: Any, training: int) -> None:
    """Check boxes of all training images. Raises: WrongPart."""
    fits = is_plain(saved) and saved.shape == (training, 4) and bool(saved.isfinite().all())
    require(fits, "boxes", f"a plain tensor ({training}, 4) of finite floats", saved)
