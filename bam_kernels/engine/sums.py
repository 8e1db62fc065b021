"""What an engine gives: the loss, its statistics and dz, from the kernels' sums. Letters are those of layout.py."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.interface import Matched
from ..layout import Layout


@dataclass
class Evaluated:
    """loss: float64 scalar of this rank; stats: (6,) float64 in the order of BAMStats; dz: (M, D) float32 or None."""

    loss: Tensor
    stats: Tensor
    dz: Tensor | None


class Sums:
    """Adds up the kernels' sums over match slabs and turns them into means over images, without leaving the device."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, matched: Matched) -> None:
        self.parts.append(torch.stack([matched.loss, matched.target_entropy, matched.source_entropy]))

    def spoil_unless_finite(self, x: Tensor) -> None:
        """All sums are NaN from now on if x holds what is not finite."""
        self.parts[-1] = self.parts[-1] + 0.0 * x.sum()

    def evaluated(self, layout: Layout, masked: bool, column_sums: Tensor, dz: Tensor | None) -> Evaluated:
        total = self.parts[0] if len(self.parts) == 1 else torch.stack(self.parts).sum(0)
        loss = total[0] / layout.B
        target_entropy = total[1] / (layout.L * layout.B)
        least, most = column_sums.aminmax()
        mean = column_sums.mean(dtype=torch.float64)
        uniform_loss = loss.new_full((), math.log(layout.N - layout.T if masked else layout.N))
        stats = [
            target_entropy,
            total[2] / layout.M,
            loss - target_entropy,
            torch.maximum(most / mean - 1, 1 - least / mean),
            uniform_loss,
            uniform_loss - loss,
        ]
        return Evaluated(loss, torch.stack(stats), dz)
