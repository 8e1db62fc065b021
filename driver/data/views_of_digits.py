"""Views of the digits: batches moved, toned and resized on their device, each image by its own random numbers.

Images are (n, C, S, S) in [0, 1], before and after. Random numbers come as uniform u, or from keys (random_keys.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Data
from .images import Augment
from .random_keys import normal, uniform


@dataclass(frozen=True)
class Affine:
    """Half-widths of a random affine map's uniform distributions. Rotation: degrees; shift: shares of the side."""

    rotation: float
    shift: float
    scale: float = 0.0
    shear: float = 0.0

    def __mul__(self, strength: float) -> "Affine":
        return Affine(self.rotation * strength, self.shift * strength, self.scale * strength, self.shear * strength)


HELD_OUT_MOVE = Affine(rotation=20.0, shift=0.15)
"""How held-out images are moved in the harder half of the evaluation, photographs as well as digits."""
DIGIT_MOVE = Affine(rotation=20.0, shift=0.125, scale=0.1, shear=0.1)
"""The geometric half of the digits' augmentation."""


def affine(images: Tensor, limits: Affine, u: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each image by u (5, n), uniform in [0, 1]; pixels from outside are 0."""
    n = len(images)
    u = u.mul(2).sub(1).to(images.device)
    angle = u[0] * math.radians(limits.rotation)
    zoom = torch.exp(u[1] * limits.scale)
    shear = u[2] * limits.shear
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift_x, shift_y = 2 * limits.shift * u[3], 2 * limits.shift * u[4]
    rows = torch.stack([cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)


def tone(images: Tensor, strength: float, u: Tensor, noise: Tensor) -> Tensor:
    """Change gamma and contrast by u (2, n), and add normal noise (n, C*S*S): the thickness and pressure of a pen."""
    u = u.mul(2).sub(1)[:, :, None, None, None]
    toned = images.pow(torch.exp(0.5 * strength * u[0])) * (1 + 0.3 * strength * u[1])
    return (toned + 0.05 * strength * noise.view_as(images)).clamp_(0, 1)


def augment_digits(images: Tensor, strength: float, keys: Tensor) -> Tensor:
    """One view of each digit, by its key (n,). Strength 0 gives the images themselves."""
    if strength == 0:
        return images
    u = uniform(keys, 7).T
    moved = affine(images, DIGIT_MOVE * strength, u[:5])
    return tone(moved, strength, u[5:], normal(keys ^ 1 << 62, images[0].numel()))


def augmentation(data: Data) -> Augment:
    """The augmentation of digits on their device: all views are alike, and there are no crops to keep to boxes."""

    def augment(images: Tensor, view: int, keys: Tensor, boxes: Tensor | None) -> Tensor:
        return augment_digits(images, data.augment, keys)

    return augment


class Resize:
    """Transform of one digit (C, H, W) to size x size pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        if self.size == image.shape[-1]:
            return image
        return F.interpolate(image[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]
