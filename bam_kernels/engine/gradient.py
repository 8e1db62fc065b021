"""Gradient products dz = G k and, without a teacher, dk = Gᵀ z, of the score gradient G, slab by slab.

layout.py defines the dimension letters.

In 16 bit, G is (a A - Pbar) * GRADIENT_FACTOR in fp16; rows and keys are centred, times HALF_UNIT, in fp16. The part
common to all rows is added in float32, because near collapse it is most of every row. Sums are float32, and their
factors are taken out at the end.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends.interface import GRADIENT_FACTOR
from ..layout import Layout
from ..precision import multiply
from ..ranges import named_range
from ..ranks import Ranks
from .rows import Rows


class Gradient:
    """Accumulates the gradient of the sum of all ranks' losses by this rank's embeddings, slab by slab."""

    def __init__(self, rows: Rows, layout: Layout, ranks: Ranks, kernels: Any) -> None:
        self.rows, self.keys, self.own_keys = rows.z, rows.keys, rows.own_keys
        self.layout, self.ranks, self.kernels = layout, ranks, kernels
        self.z = rows.z.read
        self.d = torch.empty_like(self.z, dtype=torch.float32)
        self.dk: Tensor | None = None  # (N, D), gradient of all keys from this rank's rows
        self.dk_own: Tensor | None = None  # (T*B, D), gradient of this rank's keys from all ranks' rows

    @named_range("gradient")
    def add(self, G: Tensor, first: int) -> None:
        """Add the contribution of images first .. first + b - 1, whose score gradient is G (V, b, N)."""
        V, b, N = G.shape
        if b == self.layout.B and G.is_contiguous():
            self._add_whole(G.view(V * b, N))
            return
        rows, keys = G.reshape(V * b, N), self.keys.whole
        d = multiply(rows, keys, self.d.new_empty(V * b, self.layout.D))
        self.d.view(V, -1, self.layout.D)[:, first : first + b] = d.view(V, b, -1)
        if self.own_keys:
            if self.dk is None:
                self.dk = torch.zeros_like(keys, dtype=torch.float32)
            z = self.z.view(V, -1, self.layout.D)[:, first : first + b].reshape(V * b, -1)
            self._contract_keys(rows, z, self.dk, add=True)

    def _contract_keys(self, G: Tensor, z: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Write Gᵀ z, or out + Gᵀ z with `add`, to out (columns of G, D)."""
        multiply(G.T, z, out, add=add)
        if self.keys.sixteen_bit:
            out.addr_(G.sum(0, dtype=torch.float32), self.keys.centre, alpha=self.keys.unit)
        return out

    def _add_whole(self, G: Tensor) -> None:
        """Add all rows G (M, N) at once: key gradients are scattered to their ranks before dz is computed."""
        if self.own_keys and self.layout.W == 1:
            self._add_symmetric(G)
            return
        n = self.layout.T * self.layout.B
        if self.own_keys:
            self.dk_own = self.ranks.scatter(
                lambda rank: self._contract_keys(
                    G[:, rank * n : (rank + 1) * n], self.z, self.d.new_empty(n, self.layout.D)
                )
            )
        for number, (column, block) in enumerate(self.keys.blocks()):
            multiply(G[:, column : column + len(block)], block, self.d, add=number > 0)

    def _add_symmetric(self, G: Tensor) -> None:
        """Add all rows on one rank without a teacher, where the first N rows are the keys.

        For the first N rows, G k + Gᵀ z is one product H z with H = G + Gᵀ. There z = k' + centre, so
        H z = H k' + rowsum(H) centre; products with k' stay small near collapse.
        """
        keys, N = self.keys.whole, self.layout.N
        multiply(G[N:], keys, self.d[N:])
        H = G[:N]
        sums = self.kernels.symmetrize_(H)
        d = multiply(H, keys, self.d[:N])
        d.addr_(sums, self.keys.centre, alpha=self.keys.unit)
        if len(G) > N:
            self._contract_keys(G[N:], self.z[N:], d, add=True)

    @named_range("gradient")
    def finish(self, temperature: float) -> Tensor:
        """Return dz (M, D) float32, after the gradient of the L2 normalisation."""
        n = self.layout.T * self.layout.B
        if self.dk is not None:
            blocks = self.dk.split(n)
            self.dk_own = self.ranks.scatter(lambda rank: blocks[rank])
        if self.dk_own is not None:
            self.d[:n] += self.dk_own
        factor = 1.0
        if self.keys.sixteen_bit:
            factor = 1 / (GRADIENT_FACTOR * self.keys.unit * self.layout.B * temperature)
        return self.kernels.project_(self.d, self.rows, factor)
