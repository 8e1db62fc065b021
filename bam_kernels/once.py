"""Gradients that are constants of what they came from: a second derivative is an error, never silently zero."""

from typing import Any

import torch
from torch import Tensor


class _NotDifferentiable(torch.autograd.Function):
    """Passes its first argument on; its own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("bam_kernels: the gradient is differentiable once; a gradient of it was asked for")


def differentiable_once(grad: Tensor) -> Tensor:
    """`grad` of a backward formula, marked where a graph of the backward is being made (create_graph=True)."""
    if not torch.is_grad_enabled():
        return grad
    return _NotDifferentiable.apply(grad.detach(), torch.zeros((), requires_grad=True))
