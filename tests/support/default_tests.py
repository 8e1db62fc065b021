"""What the library computes is bit for bit the same under every default of torch; for every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import features
from torch import Tensor
from torch_defaults import NAMES, Default

from bam_kernels import bam_loss, bam_targets, sinkhorn_attention
from bam_kernels.simulated import SimulatedRanks

# Teacher views, options, and whether products may be rounded: which in 16 bit makes int16 scores of some backends.
PROBLEMS = {
    "exact": (0, {"precision": "exact"}, False),
    "teacher and top-k": (2, {"top_k": 3, "precision": "exact"}, False),
    "slabs": (0, {"memory_budget": 3000, "precision": "exact"}, False),
    "rounded": (2, {}, True),
}
Outcome = Callable[[], list[Tensor]]
ATTENTION = {"mask": "block", "views": 3, "key_views": 2}


class DefaultTests:
    """Needs fixtures `backend` and `device`, and `matmul_precision`."""

    def expected(self, what: tuple[str, ...], outcome: Outcome) -> list[Tensor]:
        """What `outcome` returns under torch's own defaults; `what` says which of the outcomes here it is."""
        return outcome()

    @pytest.mark.parametrize("problem", PROBLEMS)
    @pytest.mark.parametrize("default", NAMES)
    def test_loss_gradient_and_targets(self, backend, device, default, problem, matmul_precision):
        R, options, rounded = PROBLEMS[problem]
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        student, teacher = features(3, 6, 7).to(device), features(R, 6, 7, seed=1).to(device) if R else None

        def outcome() -> list[Tensor]:
            leaf = student.clone().requires_grad_()
            loss, stats = bam_loss(leaf, teacher, backend=backend, return_stats=True, **options)
            loss.backward()
            P = bam_targets(student, teacher, backend=backend, **options)
            return [loss.detach(), leaf.grad, P, *vars(stats).values()]

        assert_same(outcome, Default(default), self.expected(("loss", problem), outcome))

    @pytest.mark.parametrize("output", ["plan", "potentials"])
    @pytest.mark.parametrize("default", NAMES)
    def test_attention(self, backend, device, default, output):
        q, k = features(1, 18, 8)[0].to(device), features(1, 12, 8, seed=1)[0].to(device)
        options = {"backend": backend, "output": output, "precision": "exact", "differentiable": True, **ATTENTION}

        def outcome() -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            result = sinkhorn_attention(*leaves, **options)
            parts = [result] if output == "plan" else list(result)
            grads = torch.autograd.grad(sum((part * part).sum() for part in parts), leaves)
            return [*(part.detach() for part in parts), *grads]

        assert_same(outcome, Default(default), self.expected(("attention", output), outcome))

    @pytest.mark.parametrize("default", NAMES)
    def test_one_rank_of_two(self, backend, device, default):
        student = features(2, 6, 5).to(device)
        keys = torch.nn.functional.normalize(features(4, 6, 5, seed=2).flatten(0, 1), dim=1).to(device)

        def outcome() -> list[Tensor]:
            leaf = student.clone().requires_grad_()
            loss = bam_loss(leaf, group=SimulatedRanks(2, 1, keys), backend=backend, precision="exact", epsilon=1e-3)
            return [loss.detach(), *torch.autograd.grad(loss, leaf)]

        assert_same(outcome, Default(default), self.expected(("one rank of two",), outcome))


def assert_same(outcome: Outcome, default: Callable[[], Any], expected: list[Tensor]) -> None:
    """What `outcome` returns is bit for bit `expected` where `default()` is entered."""
    with default():
        found = outcome()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.device == y.device
        assert torch.equal(x, y) or (x.isnan() & y.isnan()).all()
