"""The network: a backbone, whose features are what one keeps, and a projection head for the loss."""

import copy

import torch
from torch import Tensor, nn

from .config import Model, UserError, missing


class Network(nn.Module):
    """Images (n, C, S, S) in [0, 1] -> embeddings (n, head_dim). `backbone` alone gives the features.

    Images are fetched to the network's device. The head ends in a norm: embeddings with a common mean have all cosines
    near 1, and training may stay there.
    """

    def __init__(self, model: Model, channels: int, size: int) -> None:
        super().__init__()
        backbone = make_backbone(model, channels, size)
        self.backbone = nn.Sequential(Standardize(), backbone)
        width = feature_width(self.backbone, channels, size, model.name)
        self.head = nn.Sequential(
            nn.Linear(width, model.head_width, bias=False),
            nn.BatchNorm1d(model.head_width) if model.norm == "batch" else nn.LayerNorm(model.head_width),
            nn.ReLU(inplace=True),
            nn.Linear(model.head_width, model.head_dim, bias=False),
            nn.BatchNorm1d(model.head_dim, affine=False)
            if model.norm == "batch"
            else nn.LayerNorm(model.head_dim, elementwise_affine=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Standardize(nn.Module):
    """[0, 1] to about zero mean and unit variance, on the device and in the type of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean, non_blocking=True) - self.mean) * 4


def make_backbone(model: Model, channels: int, size: int) -> nn.Module:
    """The built-in convnet, or a timm model without its classifier. Raises: UserError."""
    if model.name == "convnet":
        return convnet(channels, size, model.width, model.norm)
    try:
        import timm
    except ImportError as error:
        raise UserError(missing(f"--model.name {model.name}", "timm", error)) from error
    if not timm.is_model(model.name):
        near = ", ".join(timm.list_models(f"*{model.name}*")[:5]) or "see timm.list_models()"
        raise UserError(f"--model.name {model.name}: neither convnet nor a model of timm; near: {near}")
    try:
        return timm.create_model(model.name, num_classes=0, in_chans=channels, img_size=size)
    except TypeError:  # convolutional models take no img_size
        return timm.create_model(model.name, num_classes=0, in_chans=channels)


def convnet(channels: int, size: int, width: int, norm: str) -> nn.Module:
    """3x3 convolutions; each stage halves the side and doubles the channels until the side is 2."""
    layers: list[nn.Module] = [*_convolution(channels, width, 1, norm)]
    widest, side = 8 * width, size
    while side > 2:
        wider = min(2 * width, widest)
        layers += [*_convolution(width, wider, 2, norm), *_convolution(wider, wider, 1, norm)]
        width, side = wider, (side + 1) // 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convolution(channels: int, width: int, stride: int, norm: str) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    normalize = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)
    return convolution, normalize, nn.ReLU(inplace=True)


@torch.no_grad()
def feature_width(backbone: nn.Module, channels: int, size: int, name: str | None) -> int:
    """Features per image, by asking the backbone. Raises: UserError where it cannot take such images."""
    try:
        shape = backbone.eval()(torch.zeros(2, channels, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--model.name {name}: cannot take images of {size} x {size} pixels ({error})") from error
    backbone.train()
    if len(shape) != 2:
        raise UserError(f"--model.name {name}: gives features of shape {tuple(shape)}, not one vector per image")
    return shape[1]


def make_teacher(network: Network) -> Network:
    """A copy that takes no gradient."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(teacher: Network, student: Network, momentum: float) -> None:
    """Move the teacher's weights towards the student's; its batch statistics are its own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
