"""dz = G k and, without a teacher, dk = Gᵀ z, as the rows of G come. Letters are those of layout.py."""

import torch
from torch import Tensor

from ..backends.interface import RowKernels
from ..layout import Layout
from ..ranks import Ranks
from .scores import Keys


class Gradient:
    """The gradient of the sum of all ranks' losses by this rank's embeddings, contracted slab by slab.

    z (M, D) unit rows and their norms; `own_keys` says that the keys are the first T*B of them.
    """

    def __init__(
        self,
        z: Tensor,
        z_norm: Tensor,
        keys: Keys,
        layout: Layout,
        own_keys: bool,
        ranks: Ranks,
        kernels: RowKernels,
    ) -> None:
        self.z, self.z_norm, self.keys, self.layout = z, z_norm, keys, layout
        self.own_keys, self.ranks, self.kernels = own_keys, ranks, kernels
        self.d = torch.empty_like(z)
        self.dk: Tensor | None = None  # (N, D) of this rank's rows
        self.dk_own: Tensor | None = None  # (T*B, D) of all ranks' rows

    def add(self, G: Tensor, first: int) -> None:
        """G (V, b, N) of images first .. first + b - 1."""
        V, b, N = G.shape
        if b == self.layout.B and G.is_contiguous():
            self._add_whole(G.view(V * b, N))
            return
        z = self.z.view(V, -1, self.layout.D)[:, first : first + b].reshape(V * b, -1)
        rows, keys = G.reshape(V * b, N), self.keys.whole
        self.d.view(V, -1, self.layout.D)[:, first : first + b] = torch.mm(rows, keys).view(V, b, -1)
        if self.own_keys:
            if self.dk is None:
                self.dk = torch.zeros_like(keys)
            self.dk.addmm_(rows.T, z)

    def _add_whole(self, G: Tensor) -> None:
        """All rows (M, N) at once: key gradients leave for their ranks before dz is made."""
        if self.own_keys and self.layout.W == 1:
            self._add_symmetric(G)
            return
        n = self.layout.T * self.layout.B
        if self.own_keys:
            self.dk_own = self.ranks.scatter(lambda rank: torch.mm(G[:, rank * n : (rank + 1) * n].T, self.z))
        for number, (column, block) in enumerate(self.keys.blocks()):
            columns = G[:, column : column + len(block)]
            torch.mm(columns, block, out=self.d) if number == 0 else self.d.addmm_(columns, block)

    def _add_symmetric(self, G: Tensor) -> None:
        """One rank whose rows are the keys: G k + Gᵀ z is one product with H = G + Gᵀ of those rows.

        z = k' + centre there, so H z = H k' + rowsum(H) centre, and k' keeps the products small near collapse.
        """
        keys, N = self.keys.whole, self.layout.N
        torch.mm(G[N:], keys, out=self.d[N:])
        H = G[:N]
        sums = self.kernels.symmetrize_(H)
        d = torch.mm(H, keys, out=self.d[:N])
        d.addr_(sums, self.keys.centre)
        if len(G) > N:
            d.addmm_(G[N:].T, self.z[N:])

    def finish(self) -> Tensor:
        """dz (M, D) float32, back through the L2 normalisation."""
        n = self.layout.T * self.layout.B
        if self.dk is not None:
            blocks = self.dk.split(n)
            self.dk_own = self.ranks.scatter(lambda rank: blocks[rank])
        if self.dk_own is not None:
            self.d[:n] += self.dk_own
        return self.kernels.project_(self.d, self.z, self.z_norm)
