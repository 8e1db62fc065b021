"""Launcher of the CUDA match kernels: with rows on chip, or with rows read again for every sum."""

import torch
from torch import Tensor

from ...layout import Layout
from ..addresses import address, pair, scores_of
from ..interface import LOG2_E, MatchSums, Number, Potential
from .launch import FLOAT_TYPES, Launcher, number
from .shapes import IMAGES_AT_ONCE, LONG, match_shape


class MatchKernels(Launcher):
    """Row kernels that compute targets, loss, entropies and the gradient of the scores."""

    def match(
        self,
        target: Tensor,
        source: Tensor | None,
        layout: Layout,
        col: Potential,
        row_exponent: Tensor,
        *,
        epsilon: float,
        temperature: float,
        step: Number = 1.0,
        top_k: int = 0,
        targets: Tensor | None = None,
        row_out: Potential | None = None,
        gradient: Tensor | None = None,
        gradient_factor: float = 1.0,
    ) -> MatchSums:
        """Compute targets P of b images and, with `source`, loss, entropies and score gradient of their source rows.

        Arguments as in backends/cpu.py, except gradient: (V, b, N) of any float type; for int16 scores it may be a
        16-bit float view of `source`.
        """
        L, b, n = target.shape
        V = len(source) if source is not None else 0
        assert row_exponent.stride(1) == 1 and (targets is None or targets.stride()[1:] == (n, 1))
        assert gradient is None or (source is not None and gradient.stride(2) == 1)
        # Without a source, the kernel writes the entropies of targets only.
        device = target.device
        per_image = torch.empty(3, b, dtype=torch.float32, device=device)
        if not V:
            per_image.zero_()
        top_k = top_k if top_k < n else 0
        shape = match_shape(L, n, target.element_size(), self._device(target)) or LONG
        images = min(b, IMAGES_AT_ONCE) if shape == LONG and top_k else b
        means = torch.empty(images if shape == LONG and top_k else 0, n, dtype=torch.float32, device=device)
        for first in range(0, b, images):
            part = slice(first, min(first + images, b))
            g = gradient[:, part] if gradient is not None else None
            self._kernels.match(
                scores_of(target[:, part], device),
                scores_of(source[:, part] if source is not None else None, device),
                (L, V, part.stop - first, n, layout.W, layout.T, layout.B, top_k),
                (
                    number(step, device, LOG2_E / epsilon),
                    number(step, device, LOG2_E / temperature),
                    number(step, device, 1 / temperature),
                ),
                gradient_factor / (layout.B * temperature),
                1.0 if V <= 1 else 1 / (L * (V - 1)),
                address(row_exponent[:, part], device),
                row_exponent.stride(0),
                pair(col, device),
                address(per_image[:, part], device),
                b,
                address(targets[:, part] if targets is not None else None, device),
                targets.stride(0) if targets is not None else 0,
                pair(row_out.rows(first, part.stop) if row_out is not None else None, device),
                gradient_of(g, device),
                *shape,
                address(means, device),
                self._launch_context(target),
            )
        return MatchSums(per_image)


def gradient_of(g: Tensor | None, device: torch.device) -> tuple[int, int, int, int]:
    """Gradient as kernels take it: address, type, strides of views and images; zeros for None."""
    if g is None:
        return 0, 0, 0, 0
    return address(g, device, FLOAT_TYPES), FLOAT_TYPES[g.dtype], g.stride(0), g.stride(1)
