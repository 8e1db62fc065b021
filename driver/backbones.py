"""Backbones: the built-in convnet, and models of timm, which the options change from outside."""

from typing import Any

import torch
from torch import nn

from .config import Model, UserError, missing


def make(model: Model, channels: int, size: int, several_sizes: bool = False) -> nn.Module:
    """Backbone from images (n, C, S, S) to features (n, D). `several_sizes`: for images of other sizes, too.

    Raises: UserError where the model is unknown, or an option does not apply to it.
    """
    if model.name == "convnet":
        for option in ("heads", "frozen_patches", "drop_path", "checkpointing"):
            if getattr(model, option):
                raise UserError(f"--model.{option} {getattr(model, option)}: convnet has no such thing")
        if (model.stem, model.positions) != ("own", "own"):
            raise UserError(f"--model.stem {model.stem} --model.positions {model.positions}: convnet has its own")
        return convnet(channels, size, model.width, model.norm)
    backbone = _timm_backbone(model, channels, size, several_sizes)
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


def timm_arguments(model: Model, channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` that make this backbone, in addition to its name and image size."""
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if model.heads:
        arguments["num_heads"] = model.heads
    if model.drop_path:
        arguments["drop_path_rate"] = model.drop_path
    return arguments


def _timm_backbone(model: Model, channels: int, size: int, several_sizes: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(missing(f"--model.name {model.name}", "timm", error)) from error
    if not timm.is_model(model.name):
        near = ", ".join(timm.list_models(f"*{model.name}*")[:5]) or "see timm.list_models()"
        raise UserError(f"--model.name {model.name}: neither convnet nor a model of timm; near: {near}")
    # ViTs take both sizes, other transformers only img_size, convolutional models neither.
    sizes: list[dict[str, Any]] = [{"img_size": size}, {}]
    if several_sizes:
        sizes.insert(0, {"img_size": size, "dynamic_img_size": True})
    for size_arguments in sizes:
        try:
            return timm.create_model(model.name, **timm_arguments(model, channels), **size_arguments)
        except (TypeError, AssertionError) as error:  # timm asserts, e.g., that heads divide the width
            reason = error
    raise UserError(f"--model.name {model.name}: {reason}")


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
