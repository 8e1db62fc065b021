"""A whole step as tune.py compares it: `bam_loss` and its gradient, from 16-bit embeddings on a GPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from problem import Problem, layout_of, loss_options, parse_shape  # noqa: E402
from torch import Tensor  # noqa: E402

from bam_kernels import bam_loss  # noqa: E402
from bam_kernels.options import Options  # noqa: E402

INPUTS = 4  # sets of embeddings, taken in turn


def steps_of(
    shape: str, views: int, backend: str, device: torch.device, *, teacher: bool = True, engine: str = "auto"
) -> list[Callable[[], Tensor]]:
    """The same step on several sets of inputs; each call returns the gradient. shape: M x N x D."""
    layout = layout_of(*parse_shape(shape), V=views, L=2, T=2, R=views if teacher else 0)
    problem = Problem.made(layout, Options(), device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    y = problem.teacher.to(dtype) if problem.teacher is not None else None
    named = loss_options(problem)

    def step(leaf: Tensor) -> Tensor:
        loss: Any = bam_loss(leaf, y, backend=backend, engine=engine, **named)
        return torch.autograd.grad(loss * 1024, leaf)[0]

    leaves = [problem.student.to(dtype, copy=True).requires_grad_() for _ in range(INPUTS)]
    return [lambda leaf=leaf: step(leaf) for leaf in leaves]
