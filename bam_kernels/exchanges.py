"""Collectives of the reference as torch operators: gather, scatter and all-reduce.

Autograd differentiates gather and scatter any number of times, and torch.compile traces them.
layout.py defines the dimension letters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .header import SCHEDULED, Header
from .operators import as_tensor, define, make_differentiable
from .options import check_positive
from .ranks import ONE_RANK, ranks_named


@dataclass(frozen=True)
class Exchanges:
    """Collectives of this process, rank `rank` of W; `name` is the name that `ranks_of` returned."""

    W: int
    rank: int
    name: str

    def agree(self, header: Header, device: torch.device) -> None:
        """Compare headers of all ranks. Raises: ValueError if one reports an error or headers differ, saying what."""
        ranks_named(self.name).agree(header, device)

    def gather(self, own: Tensor, operation: str, problem: dict[str, Any]) -> Tensor:
        """All-gather: keys (N, D) of all ranks, in gathered order, from this rank's keys (n, D).

        The gradient of the result is scattered to the ranks and summed over them.
        problem: options and shapes that must be equal on all ranks. In eager mode the caller has compared them; a
        compiled function compares them here, at every call.
        """
        world = [self.W, self.rank]
        if not torch.compiler.is_compiling():
            return own if self.W == 1 else _differentiable_gather(own, _no_numbers(), "", world, self.name)
        excluded = (*SCHEDULED, "one sum", "B")  # sent as numbers, or following from them or from the keys' shape
        text = ", ".join(f"{key}={value}" for key, value in problem.items() if key not in excluded)
        numbers = as_tensor(*(problem[key] for key in SCHEDULED if key in problem))
        return _differentiable_gather(own, numbers, f"{operation}: {text}", world, self.name)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks, without gradient."""
        return x if self.W == 1 else _all_reduce(x, "sum", [self.W, self.rank], self.name)

    def max(self, x: Tensor) -> Tensor:
        """Maximum of x over the ranks, without gradient."""
        return x if self.W == 1 else _all_reduce(x, "max", [self.W, self.rank], self.name)


ALONE = Exchanges(1, 0, ONE_RANK.name)


# Arguments of all operators below: `world` is [W, rank] at the time the function was compiled or the autograd graph was
# recorded; `name` is the name that `ranks_named` looks up.


def _gather_impl(own: Tensor, numbers: Tensor, problem: str, world: list[int], name: str) -> Tensor:
    """All-gather this rank's rows (n, D) into (N, D), in gathered order.

    Before it, the scheduled options `numbers` are checked, and `numbers` and `problem` are compared between ranks.
    problem "": nothing is checked or compared.
    """
    ranks = ranks_named(name, *world)
    if problem:
        operation, _, text = problem.partition(": ")
        given = dict(zip(SCHEDULED, numbers.tolist(), strict=False))
        for field, number in given.items():
            check_positive(operation, field, number)
        if ranks.W > 1:
            values = dict(pair.split("=", 1) for pair in text.split(", ")) | given
            ranks.agree(Header(operation, values | {"keys": list(own.shape)}), own.device)
    whole = own.new_empty(ranks.W * len(own), own.shape[1])
    for first, rows in ranks.gather(own.contiguous(), lambda unit: unit.to(own.dtype)):
        whole[first : first + len(rows)] = rows
    return whole


def _scatter_impl(whole: Tensor, world: list[int], name: str) -> Tensor:
    """Reduce-scatter: (n, D), the sum over ranks of this rank's block of their tensors `whole` (N, D)."""
    blocks = whole.chunk(world[0])
    return ranks_named(name, *world).scatter(lambda r: blocks[r].clone(memory_format=torch.contiguous_format))


def _all_reduce_impl(x: Tensor, operation: str, world: list[int], name: str) -> Tensor:
    ranks = ranks_named(name, *world)
    own = x.clone(memory_format=torch.contiguous_format)
    return ranks.max(own) if operation == "max" else ranks.sum(own)


def _keep_ranks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.world_and_name = inputs[-2:]
    ctx.ranks = ranks_named(inputs[-1])  # holds the ranks until the backward pass, which their name does not


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _differentiable_scatter(grad, *ctx.world_and_name), None, None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _differentiable_gather(grad, _no_numbers(), "", *ctx.world_and_name), None, None


def _gather_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return _differentiable_gather(tangent, _no_numbers(), "", *ctx.world_and_name)


def _scatter_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return _differentiable_scatter(tangent, *ctx.world_and_name)


def _no_numbers() -> Tensor:
    return torch.empty(0, dtype=torch.float64, device="cpu")


_gather = define(
    "gather(Tensor own, Tensor numbers, str problem, int[] world, str name) -> Tensor",
    _gather_impl,
    lambda own, numbers, problem, world, name: own.new_empty(world[0] * own.shape[0], own.shape[1]),
)
_scatter = define(
    "scatter(Tensor whole, int[] world, str name) -> Tensor",
    _scatter_impl,
    lambda whole, world, name: whole.new_empty(whole.shape[0] // world[0], whole.shape[1]),
)
_all_reduce = define(
    "all_reduce(Tensor x, str operation, int[] world, str name) -> Tensor",
    _all_reduce_impl,
    lambda x, operation, world, name: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_differentiable_gather = make_differentiable(_gather, _gather_backward, _keep_ranks, jvp=_gather_jvp)
_differentiable_scatter = make_differentiable(_scatter, _scatter_backward, _keep_ranks, jvp=_scatter_jvp)
