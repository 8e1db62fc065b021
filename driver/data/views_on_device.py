"""Views of photographs made on the device by kornia, each by its own random numbers.

A batch of n images (n, 3, H, W) in [0, 1] gives n views (n, 3, S, S).
"""

import math

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from ..config import Data
from .crops import DRAWS, rectangles
from .images import Augment
from .random_keys import uniform
from .views import Kind, blur_kernel, kinds


def augmentation(data: Data, alpha: float) -> Augment:
    """The augmentation of photographs on their device. alpha: see `crops.rectangles`."""
    kind_of_view = kinds(data)

    def view_of(images: Tensor, view: int, keys: Tensor, boxes: Tensor | None) -> Tensor:
        size = data.size if view < data.views else data.local_size
        if data.augment == 0:
            return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return augment(images, kind_of_view[view], size, keys, boxes, alpha)

    return view_of


def augment(
    images: Tensor, kind: Kind, size: int, keys: Tensor, boxes: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """One view of each photograph by the random changes of views.py, except that colours change in a fixed order."""
    crops, (flip, *widths), (jitter, grey, blur, sigma, solarize) = (
        part if i == 0 else part.T for i, part in enumerate(uniform(keys, DRAWS + 10).split((DRAWS, 5, 5), dim=1))
    )
    out = cropped(images, rectangles(crops, kind.scale, boxes, alpha), flip < 0.5, size)
    factors = [1 + width * (2 * x - 1) for width, x in zip(kind.jitter, widths, strict=True)]
    out = torch.where(_per_image(jitter < kind.jitter_p), coloured(out, *factors), out)
    out = torch.where(_per_image(grey < kind.grey_p), rgb_to_grayscale(out), out)
    if kind.blur_p > 0:
        low, high = kind.sigma
        # Not gaussian_blur2d, which reads sigma on the host to check it.
        kernel = get_gaussian_kernel1d(blur_kernel(high, size), (low + (high - low) * sigma)[:, None])
        blurred = filter2d_separable(out, kernel, kernel, "reflect")
        out = torch.where(_per_image(blur < kind.blur_p), blurred, out)
    if kind.solarize_p > 0:
        out = torch.where(_per_image(solarize < kind.solarize_p) & (out >= 0.5), 1 - out, out)
    return out.clamp(0, 1)


def cropped(images: Tensor, rectangle: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut a rectangle (n, 4) from each image and resize it to S x S, bilinear, mirrored where `flip` (n,) is true."""
    top, left, height, width = rectangle.unbind(1)
    zero = torch.zeros_like(top)
    across = torch.where(flip, -width, width)
    rows = torch.stack([across, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def coloured(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Change the colours of each image by its four factors (n,); hue is rotated by hue - 1 turns."""
    images = adjust_brightness_accumulative(images, brightness)
    images = adjust_contrast_with_mean_subtraction(images, contrast)
    images = adjust_saturation_with_gray_subtraction(images, saturation)
    return adjust_hue(images, (hue - 1) * 2 * math.pi)


def _per_image(chosen: Tensor) -> Tensor:
    return chosen[:, None, None, None]
