"""Gradient products dz = G k and, without a teacher, dk = Gᵀ z, of the score gradient G, slab by slab.

layout.py defines the dimension letters.

In 16 bit, G is (a A - Pbar) * GRADIENT_FACTOR in fp16; rows and keys are centred, times HALF_UNIT, in fp16. Sums are
float32, and their factors are taken out at the end. Where Gᵀ is multiplied by centred rows, what they have in common is
added in float32 at the end, because near collapse it is most of every row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import GRADIENT_FACTOR, CommonPart
from ..layout import Layout
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
        self.dk: Tensor | None = None  # (N, D), Gᵀ z' of all keys and this rank's rows
        self.dk_own: Tensor | None = None  # (T*B, D), gradient of this rank's keys from all ranks' rows
        # Sums of columns of G over the rows that Gᵀ multiplies centred: of all N, at the end of this rank's keys alone.
        self.column_sums: Tensor | None = None

    @named_range("gradient")
    def add(self, G: Tensor, first: int) -> None:
        """Add the contribution of images first .. first + b - 1, whose score gradient is G (V, b, N)."""
        V, b, N = G.shape
        if b == self.layout.B and G.is_contiguous():
            self._add_whole(G.view(V * b, N))
            return
        rows, keys = G.reshape(V * b, N), self.keys.whole
        d = self.kernels.multiply(rows, keys, self.d.new_empty(V * b, self.layout.D))
        self.d.view(V, -1, self.layout.D)[:, first : first + b] = d.view(V, b, -1)
        if self.own_keys:
            if self.dk is None:
                self.dk = self.d.new_zeros(keys.shape)
            z = self.z.view(V, -1, self.layout.D)[:, first : first + b].reshape(V * b, -1)
            self.kernels.multiply(rows.T, z, self.dk, add=True)
            self._add_column_sums(rows)

    def _add_column_sums(self, G: Tensor) -> None:
        """Add the sums of G's columns, which are what the centre of the rows is multiplied by."""
        if self.keys.sixteen_bit:
            sums = self.kernels.mean_row(G).mul_(len(G))  # torch's sum takes 16 KB of workspace a column on a GPU
            self.column_sums = sums if self.column_sums is None else self.column_sums.add_(sums)

    def _add_whole(self, G: Tensor) -> None:
        """Add all rows G (M, N) at once. Key gradients are scattered before other ranks' keys are read again."""
        added = False  # whether d holds anything yet
        blocks = self.keys.blocks
        if self.own_keys and (self.layout.W == 1 or not self.keys.sixteen_bit):
            self._add_own(G)
            added, blocks = True, self.keys.others
        elif self.own_keys:
            self._add_column_sums(G)
            self.dk_own = self._scatter(lambda keys, out: self.kernels.multiply(G[:, keys].T, self.z, out))
        for column, block in blocks():
            self.kernels.multiply(G[:, column : column + len(block)], block, self.d, add=added)
            added = True

    def _add_own(self, G: Tensor) -> None:
        """Add what this rank's keys give: their part of G k, and all ranks' Gᵀ z of them."""
        n = self.layout.T * self.layout.B
        of_keys = self.d[:n]  # the rows that are this rank's keys

        def part(rank: int) -> Tensor:
            columns = G[:, rank * n : (rank + 1) * n]
            if rank == self.ranks.rank:
                return self._add_symmetric(columns, of_keys)
            return self.kernels.multiply(columns.T, self.z, torch.empty_like(of_keys))

        total = self.ranks.scatter(part)
        if total is not of_keys:
            of_keys.copy_(total)

    def _scatter(self, write: Callable[[slice, Tensor], Any]) -> Tensor:
        """Reduce-scatter of key gradients: this rank's (T*B, D), summed over the ranks.

        write(keys, out): writes Gᵀ z' of a rank's keys to out (T*B, D). In 16 bit the column sums of G follow it in the
        message, so that the part common to all rows is added once, after all ranks' contributions.
        """
        n, D = self.layout.T * self.layout.B, self.layout.D

        def part(rank: int) -> Tensor:
            keys = slice(rank * n, (rank + 1) * n)
            message = self.d.new_empty(n * D if self.column_sums is None else n * (D + 1))
            write(keys, message[: n * D].view(n, D))
            if self.column_sums is not None:
                message[n * D :] = self.column_sums[keys]
            return message

        total = self.ranks.scatter(part)
        if self.column_sums is not None:
            self.column_sums = total[n * D :]
        return total[: n * D].view(n, D)

    def _add_symmetric(self, G: Tensor, d: Tensor) -> Tensor:
        """Write G k' + Gᵀ z of this rank's keys to `d`, which is dz of the same rows, and G k' to dz of all other rows.

        G (M, T*B): the columns of these keys. The first T*B rows are the keys, so there z = k' + centre, and
        G k' + Gᵀ z = H k' + colsum(G) centre with H = G + Gᵀ: one product, of numbers that stay small near collapse.
        """
        keys, n = self.keys.own, len(d)
        if len(G) > n:
            self.kernels.multiply(G[n:], keys, self.d[n:])
        H = G[:n]
        self.column_sums = self.kernels.symmetrize_(H)
        self.kernels.multiply(H, keys, d)
        if len(G) > n:
            self.kernels.multiply(G[n:].T, self.z[n:], d, add=True)
            self._add_column_sums(G[n:])
        return d

    @named_range("gradient")
    def finish(self, temperature: float) -> Tensor:
        """Return dz (M, D) float32, after the gradient of the L2 normalisation."""
        n = self.layout.T * self.layout.B
        if (dk := self.dk) is not None:
            self.dk_own = dk if self.layout.W == 1 else self._scatter(lambda keys, out: out.copy_(dk[keys]))
        if self.dk_own is not None:
            self.d[:n].add_(self.dk_own)
        factor = 1.0
        if self.keys.sixteen_bit:
            factor = 1 / (GRADIENT_FACTOR * self.keys.unit * self.layout.B * temperature)
        common = None
        if self.column_sums is not None:  # what centred rows left out
            common = CommonPart(self.column_sums, self.keys.centre, self.keys.unit)
        return self.kernels.project_(self.d, self.rows, factor, common)
