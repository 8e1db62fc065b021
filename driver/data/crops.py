"""Rectangles of random crops: random resized crops anywhere in the image, or ContrastiveCrop's with centres in a box.

n crops at once, on any device, from uniform u (n, DRAWS). Lengths are in shares of the image's height and width.
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
"""Box around the whole image: top, left, bottom, right."""


def rectangles(
    u: Tensor, scale: tuple[float, float], boxes: Tensor | None, alpha: float, aspect: float | Tensor = 1.0
) -> Tensor:
    """(n, 4) top, left, height, width of crops whose area is within `scale` and whose ratio is 3/4 to 4/3.

    Of 10 draws of area and ratio, the first that fits into the image counts; if none does, the last one, cut.
    boxes: (n, 4) top, left, bottom, right; a crop's centre is drawn in its box, each coordinate from
    Beta(alpha, alpha). None: crops are anywhere.
    aspect: width over height of the image, in pixels.
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
    """Draws from Beta(alpha, alpha) by its tabulated inverse distribution function at uniform u."""
    table = _quantiles(alpha, u.device)
    place = u * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], place - below)


@cache
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    """(4097,) quantiles of Beta(alpha, alpha), cached on the device: a copy at each use would wait for it."""
    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, 4097))).float().to(device)
