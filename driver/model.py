"""Network of a run: a backbone, whose features are the result, and a projection head that only the loss needs."""

import copy

import torch
from torch import Tensor, nn

from . import backbones
from .config import Model, UserError
from .data.images import floats
from .messages.text import first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.25,)


class Network(nn.Module):
    """Images (n, C, S, S), or a list of such tensors of several sizes -> embeddings (n, head_dim), in order.

    `backbone` alone gives the features. Images are uint8, or float in [0, 1]; they are copied to the network's device.
    """

    def __init__(self, model: Model, channels: int, size: int, local_size: int | None = None) -> None:
        super().__init__()
        backbone = backbones.make(model, channels, size, several_sizes=local_size is not None)
        self.backbone = nn.Sequential(Standardize.of(model, channels), backbone)
        width = feature_width(self.backbone, model, channels, size)
        if local_size is not None:
            feature_width(self.backbone, model, channels, local_size, "--data.local-size")
        self.head = make_head(width, model)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            images = [images]
        return self.head(torch.cat([self.backbone(crops) for crops in images]))


class Standardize(nn.Module):
    """Images, uint8 or float in [0, 1] -> about zero mean and unit variance, on the network's device, in its dtype."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, model: Model, channels: int) -> "Standardize":
        """Mean and standard deviation of timm's weights where these are loaded, else of ImageNet or of grey images."""
        if channels != 3:
            return cls(GREY_MEAN, GREY_STD)
        if model.pretrained:
            return cls(*backbones.pretrained_colours(model.name))
        return cls(IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)  # as they are: bytes are a quarter of a float's copy
        return (floats(images).to(self.mean) - self.mean) / self.std


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


def feature_width(backbone: nn.Sequential, model: Model, channels: int, size: int, option: str = "--data.size") -> int:
    """Number of features per image, found by a trial.

    Raises: UserError where the backbone cannot take images of `size` pixels, or would ignore their last rows and
    columns. The message names the option that gives the size, and the nearest sizes that work.
    """
    features, problem = _trial(backbone, channels, size)
    backbone.train()
    if problem:
        patch = getattr(getattr(backbone[1], "patch_embed", None), "patch_size", None)
        side = patch[0] if isinstance(patch, tuple) else patch
        if isinstance(side, int) and size % side:
            problem = f"its patches of {side} pixels do not divide {option} {size}"
        else:
            problem = f"{problem} at {option} {size}"
        near = " or ".join(str(other) for other in _sizes_near(backbone[1], model, channels, size))
        raise UserError(f"--model.name {model.name}: {problem}" + (f"; give {near}" if near else ""))
    if features.dim() != 2:
        raise UserError(
            f"--model.name {model.name}: gives features of shape {tuple(features.shape)}, not one vector per image"
        )
    return features.shape[1]


@torch.no_grad()
def _trial(backbone: nn.Module, channels: int, size: int) -> tuple[Tensor, str]:
    """Features of two trial images, and a description of what is wrong with this size, empty if it works.

    The last row of one image and the last column of the other are NaN, which passes every layer, also layers of zero
    weights. Finite features therefore show a border that no weight sees.
    """
    images = torch.zeros(2, channels, size, size)
    images[0, :, -1], images[1, :, :, -1] = torch.nan, torch.nan
    try:
        features = backbone.eval()(images)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        return images, f"cannot take images of {size} x {size} pixels ({first_line(error)})"
    seen = features.flatten(1).isnan().any(dim=1).all()
    return features, "" if seen else "the last rows and columns have no influence on its features"


def _sizes_near(backbone: nn.Module, model: Model, channels: int, size: int) -> list[int]:
    """Nearest smaller and larger image size that the model can take, as far as a few dozen trials find them.

    Where they find none, the size that the model was made for.
    """
    info = getattr(backbone, "feature_info", None)
    stride = info[0]["reduction"] if info else 1
    step = stride if stride > 2 else 1  # networks with a stem of stride 2 may need odd sizes
    below = range(size // step * step - (0 if size % step else step), 0, -step)
    above = range((size // step + 1) * step, size + 33 * step, step)
    near = [s for sizes in (below, above) if (s := next((s for s in sizes[:32] if _works(model, channels, s)), 0))]
    own = getattr(backbone, "pretrained_cfg", {}).get("input_size", (0, 0, 0))[1]
    return near or [own] * (own not in (0, size) and _works(model, channels, own))


def _works(model: Model, channels: int, size: int) -> bool:
    try:
        return not _trial(backbones.make(model, channels, size), channels, size)[1]
    except (UserError, RuntimeError, ValueError):
        return False


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
