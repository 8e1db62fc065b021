"""Boxes of ContrastiveCrop: one box per training image, around what the network attends to; crops are centred in it.

Source: Peng et al., "Crafting Better Contrastive Views for Siamese Representation Learning", CVPR 2022.
data/crops.py makes crops from boxes. n images, h x w places of a feature map, S pixels a side.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Boxes, UserError
from .data.images import Images
from .distributed import World
from .model import Network


def due(boxes: Boxes, epoch: int) -> bool:
    """Whether the boxes are refreshed before this epoch; never before epoch 0, when the network is untrained."""
    return boxes.every > 0 and epoch >= max(boxes.after, 1) and (epoch - boxes.after) % boxes.every == 0


@torch.no_grad()
def check(network: Network, channels: int, size: int) -> None:
    """Raise a UserError where the backbone cannot give boxes: a trial on one image, before the run starts."""
    with _evaluating(network):
        heat(network.backbone, next(network.parameters()).new_zeros(1, channels, size, size))


@torch.no_grad()
def refresh(images: Images, network: Network, threshold: float, world: World) -> None:
    """Set new boxes of all training images. Each rank computes the boxes of its share; every rank gets all of them."""
    share = torch.arange(world.rank, images.training, world.size)
    with _evaluating(network):
        boxes = [boxes_of(heat(network.backbone, batch), threshold).float() for batch in images.whole(share)]
    images.set_boxes(world.interleaved(torch.cat(boxes), images.training).cpu())


def boxes_of(heat: Tensor, threshold: float) -> Tensor:
    """Boxes (n, 4) around the places with heat above the threshold: top, left, bottom, right, in shares of the sides.

    heat (n, h, w) is enlarged bilinearly to 8 times the grid. The threshold is a share of the way from the image's
    smallest to its largest heat.
    """
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    scaled = (heat - low) / (high - low).clamp(min=1e-12)
    fine = F.interpolate(scaled[:, None], scale_factor=8, mode="bilinear")[:, 0]
    above = fine > threshold
    above |= ~above.any(2).any(1)[:, None, None]  # no place is above the threshold: the box is the whole image
    sides = []
    for seen in (above.any(2), above.any(1)):
        length = seen.shape[1]
        first = seen.int().argmax(1)
        last = length - seen.flip(1).int().argmax(1)
        sides.append((first / length, last / length))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], dim=1)


def heat(backbone: nn.Sequential, images: Tensor) -> Tensor:
    """Heat (n, h, w): how much the backbone attends to each place of the images.

    ViTs: attention of the class token to each patch in the last block, summed over heads. Other models: norm over
    channels of the last feature map.
    Raises: UserError where the backbone has neither.
    """
    standardize, model = backbone
    blocks = getattr(model, "blocks", None)
    attention: Any = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None
    if all(hasattr(attention, part) for part in ("qkv", "q_norm", "k_norm")):
        if getattr(model, "cls_token", None) is None:
            raise UserError("--boxes.every: this ViT has no class token whose attention could be looked at")
        with _input_of(attention.qkv) as seen:
            model.forward_features(standardize(images))
        grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return _class_attention(attention, seen[0], model.num_prefix_tokens).float().unflatten(1, grid)
    features = model[:-2] if isinstance(model, nn.Sequential) else getattr(model, "forward_features", None)
    map_ = None if features is None else features(standardize(images))
    if not isinstance(map_, Tensor) or map_.ndim != 4:
        raise UserError("--boxes.every: this backbone shows neither attention of a class token nor a feature map")
    return map_.float().norm(dim=3 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1)


def _class_attention(attention: nn.Module, tokens: Tensor, prefix: int) -> Tensor:
    """Attention softmax(q kᵀ) of the class token (n, patches), summed over heads. tokens (n, prefix + patches, D)."""
    n, length, _ = tokens.shape
    q, k, _ = attention.qkv(tokens).view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)[:, :, 0, prefix:].sum(1)


@contextmanager
def _evaluating(network: nn.Module):
    """Context in which the network is in evaluation mode. After it, each module gets its own mode back.

    Modes differ within a teacher: its dropout is in evaluation mode, its norms are in training mode.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _input_of(module: nn.Module):
    """Context that gives a list; each input with which the module is called is appended to it."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
