"""Where random crops lie: the usual random resized crop, and ContrastiveCrop's, around a box.

n crops, on any device; `u` (n, DRAWS) uniform. Lengths are in shares of the image's height and width.
"""

import math
from functools import cache

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

TRIES = 10
DRAWS = 2 * TRIES + 2
RATIOS = (3 / 4, 4 / 3)
WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of an image that has none."""


def rectangles(
    u: Tensor, scale: tuple[float, float], boxes: Tensor | None, alpha: float, aspect: float | Tensor = 1.0
) -> Tensor:
    """(n, 4) top, left, height, width, of area `scale` and ratio 3/4 to 4/3, the first of 10 draws that fits.

    boxes (n, 4) top, left, bottom, right: the crop's centre is drawn in it, each coordinate from Beta(alpha, alpha);
    None: the crop is anywhere. aspect: width over height of the image, in pixels.
    Source: Peng et al., "Crafting Better Contrastive Views for Siamese Representation Learning", CVPR 2022.
    """
    area = u[:, :TRIES] * (scale[1] - scale[0]) + scale[0]
    low, high = map(math.log, RATIOS)
    ratio = torch.exp(u[:, TRIES : 2 * TRIES] * (high - low) + low) / aspect
    heights, widths = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = (heights <= 1) & (widths <= 1)
    fits[:, -1] = True
    first = fits.int().argmax(1, keepdim=True)
    height, width = (side.gather(1, first).squeeze(1).clamp(max=1) for side in (heights, widths))
    across = u[:, 2 * TRIES :]
    if boxes is None:
        return torch.stack([across[:, 0] * (1 - height), across[:, 1] * (1 - width), height, width], dim=1)
    across = beta(across, alpha)
    corners = []
    for axis, side in enumerate((height, width)):
        ends = [(boxes[:, axis + end] - side / 2).clamp(min=0).minimum(1 - side) for end in (0, 2)]
        corners.append(torch.lerp(*ends, across[:, axis]))
    return torch.stack([*corners, height, width], dim=1)


def beta(u: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) from uniform u, by its inverse distribution function, tabulated."""
    table = _quantiles(alpha, u.device)
    place = u * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], place - below)


@cache
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    """(4097,) quantiles of evenly spaced shares; kept where they are used, since every copy waits for the device."""
    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, 4097))).float().to(device)
