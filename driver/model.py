"""Network of a run: a backbone, whose features are the result, and a projection head that only the loss needs."""

import copy

import torch
from torch import Tensor, nn

from . import backbones
from .config import Model, UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.25,)


class Network(nn.Module):
    """Images (n, C, S, S) in [0, 1], or a list of such tensors of several sizes -> embeddings (n, head_dim), in order.

    `backbone` alone gives the features. Images are copied to the network's device.
    """

    def __init__(self, model: Model, channels: int, size: int, local_size: int | None = None) -> None:
        super().__init__()
        backbone = backbones.make(model, channels, size, several_sizes=local_size is not None)
        self.backbone = nn.Sequential(Standardize(channels), backbone)
        width = feature_width(self.backbone, channels, size, model.name)
        if local_size is not None:
            feature_width(self.backbone, channels, local_size, model.name)
        self.head = make_head(width, model)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            images = [images]
        return self.head(torch.cat([self.backbone(crops) for crops in images]))


class Standardize(nn.Module):
    """Images in [0, 1] -> about zero mean and unit variance, on the device and in the dtype of the network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean, non_blocking=True) - self.mean) / self.std


def make_head(width: int, model: Model) -> nn.Sequential:
    """Projection head: linear layers with a norm and an activation between them, and a norm without weights at the end.

    Embeddings with a common mean have all cosines near 1, and training may stay there; the last norm removes the mean.
    With `norm="none"` the linear layers have biases and small weights instead, as published.
    """
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    layers: list[nn.Module] = []
    for i in range(model.head_layers):
        last = i == model.head_layers - 1
        out = model.head_dim if last else model.head_width
        layers.append(nn.Linear(width, out, bias=model.norm == "none"))
        if model.norm == "none":
            nn.init.trunc_normal_(layers[-1].weight, std=0.02)
            nn.init.zeros_(layers[-1].bias)
        elif last:
            affine = {"affine": False} if model.norm == "batch" else {"elementwise_affine": False}
            layers.append(norms[model.norm](out, **affine))
        else:
            layers.append(norms[model.norm](out))
        if not last:
            layers.append(nn.GELU() if model.activation == "gelu" else nn.ReLU(inplace=True))
        width = out
    return nn.Sequential(*layers)


def synchronised(network: Network) -> Network:
    """Network whose batch norms use the statistics of all ranks; weights keep their names."""
    try:  # some layers of timm hold norm and activation; its converter keeps the activation
        from timm.layers import convert_sync_batchnorm
    except ImportError:
        convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert_sync_batchnorm(network)


@torch.no_grad()
def feature_width(backbone: nn.Module, channels: int, size: int, name: str) -> int:
    """Number of features per image, found by a trial. Raises: UserError where the backbone cannot take such images."""
    try:
        shape = backbone.eval()(torch.zeros(2, channels, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--model.name {name}: cannot take images of {size} x {size} pixels ({error})") from error
    backbone.train()
    if len(shape) != 2:
        raise UserError(f"--model.name {name}: gives features of shape {tuple(shape)}, not one vector per image")
    return shape[1]


def make_teacher(network: Network) -> Network:
    """Copy of the student that takes no gradient and has no dropout."""
    teacher = copy.deepcopy(network).requires_grad_(False)
    for module in teacher.modules():
        if type(module).__name__ in ("Dropout", "DropPath"):
            module.eval()
    return teacher


@torch.no_grad()
def follow(teacher: Network, student: Network, momentum: float) -> None:
    """Move the teacher's weights towards the student's weights. The teacher's batch-norm statistics stay its own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
