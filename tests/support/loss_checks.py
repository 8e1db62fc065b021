"""Checks of a GPU backend through the public functions, against the published outputs and the float64 reference."""

from pathlib import Path
from typing import Any

import torch
from problems import FLOAT32, assert_close, features, load, loss_and_grad

from bam_kernels import bam_loss, bam_targets, reference, sinkhorn_attention
from bam_kernels.simulated import SimulatedRanks


def check_golden(path: Path, device: torch.device, options: dict[str, Any]) -> None:
    """Loss, gradient and targets of a published problem. `options` name the backend."""
    problem = load(path)
    student = problem.student.to(device)
    teacher = problem.teacher.to(device) if problem.teacher is not None else None
    loss, grad = loss_and_grad(bam_loss, student, teacher, **options, **problem.options)
    problem.check_loss(loss.cpu(), FLOAT32)
    problem.check_grad(grad.cpu(), FLOAT32)
    problem.check_target(bam_targets(student, teacher, **options, **problem.options).cpu(), FLOAT32)


def check_one_rank_of_two(R: int, device: torch.device, exact: dict[str, Any]) -> None:
    """Loss and gradient of rank 1, with the keys of rank 0 given, since an interpreter has a single thread."""
    student, keys = features(3, 6, 5), torch.nn.functional.normalize(features(4, 6, 5, seed=2).flatten(0, 1), dim=1)
    teacher = features(R, 6, 5, seed=1) if R else None
    results = []
    for function, dtype, options in ((reference.bam_loss, torch.float64, {}), (bam_loss, torch.float32, exact)):
        group = SimulatedRanks(2, 1, keys.to(device, dtype))
        y = teacher.to(device, dtype) if R else None
        results.append(loss_and_grad(function, student.to(device, dtype), y, group=group, **options))
    (expected_loss, expected_grad), (loss, grad) = results
    assert_close(loss.cpu(), expected_loss.cpu(), 1e-5)
    assert_close(grad.cpu(), expected_grad.cpu(), 1e-5)


def check_attention(output: str, device: torch.device, exact: dict[str, Any]) -> None:
    """Plan or potentials of the balanced attention, and their gradients."""
    q, k = features(1, 18, 8)[0].to(device), features(1, 12, 8, seed=1)[0].to(device)
    options = {"mask": "block", "views": 3, "key_views": 2, "output": output, "differentiable": True}

    def gradients(function, dtype, **more):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        result = function(*leaves, **options, **more)
        parts = [result] if output == "plan" else list(result)
        total = sum((part * torch.linspace(-1, 1, part.numel(), device=device).view_as(part)).sum() for part in parts)
        return [part.detach() for part in parts], torch.autograd.grad(total, leaves)

    parts, grads = gradients(sinkhorn_attention, torch.float32, **exact)
    expected, expected_grads = gradients(reference.sinkhorn_attention, torch.float64)
    for actual, truth in zip((*parts, *grads), (*expected, *expected_grads), strict=True):
        assert (actual - truth).norm() <= 2e-5 * truth.norm()
