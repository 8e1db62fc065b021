"""Result of an engine: the loss, its statistics and dz, computed from the sums of the match kernels.

layout.py defines the dimension letters.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import MatchSums
from ..layout import Layout


@dataclass
class Evaluation:
    """Result of one evaluation on this rank.

    loss    scalar: float64, or float32 if a kernel summed in float64 and rounded at the end
    stats   (6,), in the order of BAMStats, of the dtype of the loss
    dz      (M, D) float32 or None
    """

    loss: Tensor
    stats: Tensor
    dz: Tensor | None


class Sums:
    """Collects the sums of every slab's match, and turns them into the loss and its statistics on the device."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.parts: list[Tensor] = []
        self.norm: Tensor | None = None

    def add(self, matched: MatchSums) -> None:
        self.parts.append(matched.images)

    def make_nan_unless_finite(self, norm: Tensor) -> None:
        """Make the loss NaN if a norm of rows, norm (m,) float64, is not finite."""
        self.norm = norm

    def evaluation(self, layout: Layout, masked: bool, column_sums: Tensor, dz: Tensor | None) -> Evaluation:
        images = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 1)
        uniform_loss = math.log(layout.N - layout.T if masked else layout.N)
        reduction = getattr(self.kernels, "loss_and_stats", loss_and_stats)
        loss, stats = reduction(images, column_sums, self.norm, layout, uniform_loss)
        return Evaluation(loss, stats, dz)


def loss_and_stats(
    images: Tensor, column_sums: Tensor, norm: Tensor | None, layout: Layout, uniform_loss: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss and its statistics (6,) in float64, from MatchSums.images and the last column sums.

    norm: see Sums.make_nan_unless_finite.
    """
    total = images.sum(1, dtype=torch.float64)
    if norm is not None:
        total = total + 0.0 * norm.sum()
    loss = total[0] / layout.B
    target_entropy = total[1] / (layout.L * layout.B)
    least, most = column_sums.aminmax()
    mean = column_sums.mean(dtype=torch.float64)
    uniform = loss.new_full((), uniform_loss)
    stats = [
        target_entropy,
        total[2] / layout.M,
        loss - target_entropy,
        torch.maximum(most / mean - 1, 1 - least / mean),
        uniform,
        uniform - loss,
    ]
    return loss, torch.stack(stats)
