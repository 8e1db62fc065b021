"""Launcher of the Triton match kernels: with rows on chip, or with rows read again for every sum."""

from typing import Any

import torch
from torch import Tensor

from ...layout import Layout
from ..interface import LOG2_E, MatchSums, Number, Potential
from . import match, match_long
from .launch import check_scores, number
from .launcher import Launcher
from .tiles import IMAGES_AT_ONCE, image_tile, long_image_tile


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
        for s in (target, source):
            if s is not None:
                check_scores(s)
        assert row_exponent.stride(1) == 1 and (targets is None or targets.stride()[1:] == (n, 1))
        assert gradient is None or (source is not None and gradient.stride(2) == 1)
        factor, step_pointer = number(step)
        per_image = torch.empty(3, b, dtype=torch.float32, device=target.device)
        top_k = top_k if top_k < n else 0
        on_chip = image_tile(L, n)
        long = on_chip is None
        tile = on_chip or long_image_tile(L, n)
        images = min(b, IMAGES_AT_ONCE) if long and top_k else b
        workspace: tuple[Any, ...] = ()
        if long:
            source_rows = torch.empty(images, V, 2, dtype=torch.float32, device=target.device) if V else None
            means = torch.empty(images, n, dtype=torch.float32, device=target.device) if top_k else None
            workspace = (source_rows, means)
        for first in range(0, b, images):
            part = slice(first, min(first + images, b))
            g = gradient[:, part] if gradient is not None else None
            self.run(
                match_long.match_long_kernel if long else match.match_kernel,
                (part.stop - first,),
                target[:, part],
                source[:, part] if source is not None else None,
                row_exponent[:, part],
                *col,
                per_image[:, part],
                targets[:, part] if targets is not None else None,
                *(row_out.rows(first, part.stop) if row_out is not None else (None, None)),
                g,
                LOG2_E / epsilon * factor,
                LOG2_E / temperature * factor,
                factor / temperature,
                gradient_factor / (layout.B * temperature),
                step_pointer,
                1.0 if V <= 1 else 1 / (L * (V - 1)),
                *workspace,
                L,
                V,
                b,
                n,
                layout.W,
                layout.T,
                layout.B,
                top_k,
                target.stride(0),
                target.stride(1),
                source.stride(0) if source is not None else 0,
                source.stride(1) if source is not None else 0,
                row_exponent.stride(0),
                targets.stride(0) if targets is not None else 0,
                g.stride(0) if g is not None else 0,
                g.stride(1) if g is not None else 0,
                TOP_K=top_k > 0,
                BLOCK_L=tile.block_m,
                BLOCK_N=tile.block_n,
                num_warps=tile.num_warps,
            )
        return MatchSums(per_image)
