"""What the reference exchanges with other ranks, as operators: autograd differentiates them, more than once, and
torch.compile traces them. Letters are those of layout.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .header import Header
from .operators import define, differentiable
from .ranks import ONE_RANK, Ranks, ranks_named


@dataclass(frozen=True)
class Exchanges:
    """W ranks, this one `rank`; `name` as `ranks_of` gives it."""

    W: int
    rank: int
    name: str

    def agree(self, header: Header, device: torch.device) -> None:
        """As `Ranks.agree`."""
        ranks_named(self.name).agree(header, device)

    def gather(self, own: Tensor, problem: str, scales: tuple[float, ...]) -> Tensor:
        """(N, D) in gathered order from (n, D); its gradient is scattered and summed over the ranks.

        problem, scales: what must be equal on all ranks. A compiled function, which keeps what it was compiled with,
        compares it here; else it has been compared before.
        """
        compiling = torch.compiler.is_compiling()
        if self.W == 1 and not compiling:
            return own
        told = torch.tensor(scales, dtype=torch.float64, device="cpu")
        return _differentiable_gather(own, told, problem if compiling else "", [self.W, self.rank], self.name)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, without gradient."""
        return x if self.W == 1 else _all_reduce(x, False, [self.W, self.rank], self.name)

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, without gradient."""
        return x if self.W == 1 else _all_reduce(x, True, [self.W, self.rank], self.name)


ALONE = Exchanges(1, 0, ONE_RANK.name)


def _gather_impl(own: Tensor, scales: Tensor, problem: str, place: list[int], name: str) -> Tensor:
    ranks = ranks_named(name, *place)
    if problem and ranks.W > 1:
        values = {"shape": list(own.shape), "type": str(own.dtype), "problem": problem, "scales": scales.tolist()}
        ranks.agree(Header("a compiled function", values), own.device)
    whole = own.new_empty(ranks.W * len(own), own.shape[1])
    for first, rows in ranks.gather(own.contiguous(), lambda unit: unit.to(own.dtype)):
        whole[first : first + len(rows)] = rows
    return whole


def _scatter_impl(whole: Tensor, place: list[int], name: str) -> Tensor:
    """Σ over ranks of this rank's (n, D) of their (N, D)."""
    blocks = whole.chunk(place[0])
    return ranks_named(name, *place).scatter(lambda r: blocks[r].clone(memory_format=torch.contiguous_format))


def _all_reduce_impl(x: Tensor, most: bool, place: list[int], name: str) -> Tensor:
    ranks: Ranks = ranks_named(name, *place)
    own = x.clone(memory_format=torch.contiguous_format)
    return ranks.max(own) if most else ranks.sum(own)


def _keep_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.place = inputs[-2:]
    ctx.ranks = ranks_named(inputs[-1])  # which a name alone would not keep until the backward pass


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _differentiable_scatter(grad, *ctx.place), None, None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    place, name = ctx.place
    return _differentiable_gather(grad, grad.new_empty(0), "", place, name), None, None


_gather = define(
    "gather(Tensor own, Tensor scales, str problem, int[] place, str name) -> Tensor",
    _gather_impl,
    lambda own, scales, problem, place, name: own.new_empty(place[0] * own.shape[0], own.shape[1]),
)
_scatter = define(
    "scatter(Tensor whole, int[] place, str name) -> Tensor",
    _scatter_impl,
    lambda whole, place, name: whole.new_empty(whole.shape[0] // place[0], whole.shape[1]),
)
_all_reduce = define(
    "all_reduce(Tensor x, bool most, int[] place, str name) -> Tensor",
    _all_reduce_impl,
    lambda x, most, place, name: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_differentiable_gather = differentiable(_gather, _gather_backward, _keep_place)
_differentiable_scatter = differentiable(_scatter, _scatter_backward, _keep_place)
