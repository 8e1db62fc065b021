"""Backbones: the built-in convnet, and models of timm, which the options change from outside."""

from typing import Any

import torch
from torch import nn

from .config import Model, UserError, missing
from .messages.text import printable, typed


def make(model: Model, channels: int, size: int, several_sizes: bool = False) -> nn.Module:
    """Backbone from images (n, C, S, S) to features (n, D). `several_sizes`: for images of other sizes, too.

    Raises: UserError where the model is unknown, or an option does not apply to it.
    """
    if model.name == "convnet":
        for option in ("heads", "frozen_patches", "drop_path", "checkpointing", "pretrained"):
            if value := getattr(model, option):
                raise UserError(f"{typed(f'model.{option}', value)}: convnet has no such thing")
        if (model.stem, model.positions) != ("own", "own"):
            raise UserError(f"--model.stem {model.stem} --model.positions {model.positions}: convnet has its own")
        return convnet(channels, size, model.width, model.norm)
    backbone, _ = from_timm(model, channels, size, several_sizes)
    if model.pretrained:
        _check_pretrained(model)
    if model.stem == "small":
        _small_stem(backbone, channels, model.name)
    if model.positions == "sincos":
        _fixed_positions(backbone, model.name)
    if model.frozen_patches:
        _freeze_patches(backbone, model.name)
    if model.checkpointing:
        try:
            backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--model.checkpointing True: {model.name} does not offer it") from error
    return backbone


def pretrained_colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that timm's weights of the model expect."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return tuple(config.mean), tuple(config.std)


def _check_pretrained(model: Model) -> None:
    """Raise UserError where timm has no weights of the model, or an option excludes them."""
    import timm

    try:
        config = timm.get_pretrained_cfg(model.name)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None or not config.has_weights:
        near = ", ".join(timm.list_pretrained(f"{model.name[:5]}*")[:5]) or "see timm.list_pretrained()"
        raise UserError(f"--model.pretrained True: timm has no weights of {model.name}; it has, e.g., {near}")
    if model.weights is not None:
        raise UserError(f"--model.pretrained True: excludes --model.weights {model.weights}; give one of them")
    for option, default in (("stem", "own"), ("heads", 0), ("positions", "own")):
        if (value := getattr(model, option)) != default:
            raise UserError(
                f"--model.pretrained True: timm's weights are for --model.{option} {default}, not for {value}"
            )


def from_timm(model: Model, channels: int, size: int, several_sizes: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Model of timm before our changes, and the arguments of `timm.create_model` beside its name that made it.

    Raises: UserError where timm has no such model or cannot make it.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(missing(f"--model.name {model.name}", "timm", error)) from error
    if not timm.is_model(model.name):
        near = ", ".join(timm.list_models(f"*{model.name}*")[:5]) or "see timm.list_models()"
        raise UserError(f"--model.name {printable(model.name)}: neither convnet nor a model of timm; near: {near}")
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if model.heads:
        arguments["num_heads"] = model.heads
    if model.drop_path:
        arguments["drop_path_rate"] = model.drop_path
    # ViTs take both sizes, other transformers only img_size, convolutional models neither.
    sizes: list[dict[str, Any]] = [{"img_size": size}, {}]
    if several_sizes:
        sizes.insert(0, {"img_size": size, "dynamic_img_size": True})
    for size_arguments in sizes:
        try:
            return timm.create_model(model.name, **arguments, **size_arguments), arguments | size_arguments
        except (TypeError, AssertionError, ValueError) as error:  # timm asserts, e.g., that heads divide the width
            reason = str(error)
        except RuntimeError as error:
            reason = str(error)
            if "." in model.name:
                tags = timm.list_models(f"{model.name.partition('.')[0]}.*", pretrained=True)
                reason += f"; its tags are {', '.join(tags) or 'none'}"
    raise UserError(f"--model.name {model.name}: {reason or 'timm cannot make it for images of this size'}")


def _small_stem(backbone: nn.Module, channels: int, name: str) -> None:
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise UserError(f"--model.stem small: {name} does not begin with one convolution and a max-pool, as ResNets do")
    backbone.conv1 = nn.Conv2d(channels, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def _patches(backbone: nn.Module, option: str, name: str) -> nn.Module:
    patches = getattr(backbone, "patch_embed", None)
    if not hasattr(patches, "grid_size") or not isinstance(getattr(backbone, "pos_embed", None), nn.Parameter):
        raise UserError(f"--model.{option}: {name} is not a ViT with patches and positions")
    return patches


@torch.no_grad()
def _fixed_positions(backbone: nn.Module, name: str) -> None:
    """Fixed 2-D sine and cosine position embeddings of the patches; zeros for all other tokens."""
    from timm.layers import build_sincos2d_pos_embed

    grid = _patches(backbone, "positions sincos", name).grid_size
    embedding = build_sincos2d_pos_embed(list(grid), backbone.pos_embed.shape[-1], interleave_sin_cos=False)
    backbone.pos_embed.zero_()
    backbone.pos_embed[0, -len(embedding) :] = embedding
    backbone.pos_embed.requires_grad = False


def _freeze_patches(backbone: nn.Module, name: str) -> None:
    """Untrained patch projection, with Xavier's uniform weights of the projection taken as one matrix."""
    projection = _patches(backbone, "frozen_patches True", name).proj
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def convnet(channels: int, size: int, width: int, norm: str) -> nn.Sequential:
    """Network of 3x3 convolutions. Each stage halves the side and doubles the channels, up to 8 times, until side 2."""
    layers: list[nn.Module] = [*_convolution(channels, width, 1, norm)]
    widest, side = 8 * width, size
    while side > 2:
        wider = min(2 * width, widest)
        layers += [*_convolution(width, wider, 2, norm), *_convolution(wider, wider, 1, norm)]
        width, side = wider, (side + 1) // 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convolution(channels: int, width: int, stride: int, norm: str) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=norm == "none")
    norms = {"batch": nn.BatchNorm2d(width), "layer": nn.GroupNorm(1, width), "none": nn.Identity()}
    return convolution, norms[norm], nn.ReLU(inplace=True)
