"""Index algebra of BAM: which row is which view of which image, and which keys are its positives.

B  images on this rank          V  student views per image      M = V*B    rows on this rank
W  ranks, r this rank           L  target views (first L)       N = T*B*W  keys of all ranks
D  features                     T  key views (first T)          R  teacher views (0: no teacher)

Rows are view-major: row v*B + i is view v of image i. The public order of columns is view, rank, image:
column t*(B*W) + r*B + i. Inside the engines columns stay in gathered order, rank-major: r*(T*B) + t*B + i.
With one rank the two orders are equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The dimensions of one problem and the index arithmetic that follows from them."""

    B: int
    V: int
    L: int
    T: int
    D: int
    R: int = 0
    W: int = 1
    rank: int = 0

    @property
    def M(self) -> int:
        return self.V * self.B

    @property
    def N(self) -> int:
        return self.T * self.B * self.W

    @property
    def own_columns(self) -> int:
        """Index of the first of this rank's T*B columns, in gathered order."""
        return self.rank * self.T * self.B

    def view(self, row: int) -> int:
        return row // self.B

    def image(self, row: int) -> int:
        return row % self.B

    def public_column(self, view: int, rank: int, image: int) -> int:
        return (view * self.W + rank) * self.B + image

    def gathered_column(self, view: int, rank: int, image: int) -> int:
        return (rank * self.T + view) * self.B + image

    def positive_mask(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """Mask (rows, N) bool, columns in public order: True where row v*B + i meets a key of its own image.

        For the reference; kernels compute the mask column by column with equal arithmetic.
        """
        image = torch.arange(rows, dtype=torch.int64, device=device) % self.B + self.rank * self.B
        column_image = torch.arange(self.N, dtype=torch.int64, device=device) % (self.B * self.W)
        return image[:, None] == column_image[None, :]

    def to_public(self, columns: Tensor) -> Tensor:
        """Reorder the last dimension (N) from gathered to public order."""
        if self.W == 1:
            return columns
        shape = columns.shape[:-1]
        return columns.view(*shape, self.W, self.T, self.B).transpose(-3, -2).reshape(*shape, self.N)

    def to_gathered(self, columns: Tensor) -> Tensor:
        """Reorder the last dimension (N) from public to gathered order."""
        if self.W == 1:
            return columns
        shape = columns.shape[:-1]
        return columns.view(*shape, self.T, self.W, self.B).transpose(-3, -2).reshape(*shape, self.N)

    def target_terms(self, v: int) -> list[int]:
        """The target views that source view v is matched to: all t < L with t != v; for V = 1, view 0."""
        return [0] if self.V == 1 else [t for t in range(self.L) if t != v]

    @property
    def pair_weight(self) -> float:
        """1 / number of (target, source) pairs: P̄_v = pair_weight * Σ_{t in target_terms(v)} P_t."""
        return 1.0 if self.V == 1 else 1.0 / (self.L * (self.V - 1))
