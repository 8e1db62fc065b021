"""How exact the CPU engine is where float32 is strained: small eps, near collapse, outliers, duplicates.

Truth is float64; the yardstick is the reference in float32 on the same input.
"""

import math

import pytest
import torch
from problems import COSINES, features, needs_cpu_kernels

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import cpu
from bam_kernels.backends.interface import Positives
from bam_kernels.engine import slab
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK

pytestmark = needs_cpu_kernels
V, B, D = 4, 48, 128


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def problem(cosine: float, with_teacher: bool):
    student = features(V, B, D, cosine=cosine, seed=1)
    return student, features(2, B, D, cosine=cosine, seed=1) if with_teacher else None


def evaluated(function, targets, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, target_views=2, precision="exact", **options)
    (dz,) = torch.autograd.grad(loss, student)
    return loss.detach(), dz, targets(student.detach(), teacher, target_views=2, precision="exact", **options)


def exact(student, teacher, **options):
    return evaluated(
        reference.bam_loss,
        reference.bam_targets,
        student.double(),
        teacher.double() if teacher is not None else None,
        **options,
    )


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [0.05, 0.005, 1e-3])
def test_at_most_twice_the_error_of_the_float32_reference(epsilon, cosine, with_teacher):
    student, teacher = problem(cosine, with_teacher)
    loss, dz, P = exact(student, teacher, epsilon=epsilon)
    _, dz_reference, P_reference = evaluated(
        reference.bam_loss, reference.bam_targets, student, teacher, epsilon=epsilon
    )
    loss_cpu, dz_cpu, P_cpu = evaluated(bam_loss, bam_targets, student, teacher, epsilon=epsilon, backend="cpu")
    assert relative_error(P_cpu, P) <= 2 * relative_error(P_reference, P) + 1e-7
    assert relative_error(dz_cpu, dz) <= 2 * relative_error(dz_reference, dz) + 1e-7
    assert abs(loss_cpu.item() / loss.item() - 1) <= 1e-5


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_targets_from_the_same_float32_scores(epsilon, cosine):
    student, _ = problem(cosine, False)
    z = torch.nn.functional.normalize(student.flatten(0, 1), dim=-1)
    options = Options(views=V, target_views=2, epsilon=epsilon)
    layout = options.layout("test", student, None)
    scores = z @ z[: layout.N].T
    log_P, _ = reference.log_targets(scores.double(), layout, options)
    kernels = cpu.kernels()
    kernels.mask_positives_(scores, Positives(layout, 0, len(scores)))
    row = cpu.Potential.one(layout.M)
    col, _ = slab.balance(slab.KeptScores(scores, 1.0, kernels), row, epsilon, 3, ONE_RANK)
    P = torch.empty(2, B, layout.N)
    rows = scores.view(V, B, -1)[:2]
    guess = row.exponent.view(V, B)[:2]
    kernels.match(rows, None, layout, col, guess, epsilon=epsilon, temperature=0.1, targets=P)
    assert relative_error(P.view_as(log_P), log_P.exp()) <= 1e-5


@pytest.mark.parametrize("epsilon", [0.05, 0.005, 1e-3])
def test_an_outlier_row_is_finite_and_exact(epsilon):
    student = features(2, 12, 16, cosine=0.95, seed=2)
    student[:, 5] = -student[:, 5]
    loss, dz, P = exact(student, None, epsilon=epsilon)
    loss_cpu, dz_cpu, P_cpu = evaluated(bam_loss, bam_targets, student, None, epsilon=epsilon, backend="cpu")
    assert abs(loss_cpu.item() / loss.item() - 1) <= 1e-4
    assert relative_error(P_cpu, P) <= 5e-4
    assert relative_error(dz_cpu, dz) <= 5e-4


def test_duplicates_share_their_mass_equally():
    student = features(2, 10, 16, seed=3)
    student[:, 7] = student[:, 2]
    P = bam_targets(student, epsilon=1e-3, backend="cpu")
    columns = P.view(2, 10, 2, 10)
    others = [i for i in range(10) if i not in (2, 7)]
    assert torch.equal(columns[:, others][..., 2], columns[:, others][..., 7])


@pytest.mark.parametrize("mask_positives", [True, False])
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_collapsed_features_give_the_uniform_loss(epsilon, mask_positives):
    student = torch.randn(1, 1, 20).expand(3, 16, 20)
    loss = bam_loss(student, target_views=2, epsilon=epsilon, mask_positives=mask_positives, backend="cpu")
    assert abs(loss.item() - math.log(30 if mask_positives else 32)) <= 1e-6


@pytest.mark.parametrize("magnitude", [1e-9, 1e18])
def test_the_length_of_embeddings_does_not_matter(magnitude):
    student = features(2, 9, 24, seed=4)
    loss, dz, _ = evaluated(bam_loss, bam_targets, student, None, backend="cpu")
    scaled, dz_scaled, _ = evaluated(bam_loss, bam_targets, student * magnitude, None, backend="cpu")
    assert abs(scaled.item() / loss.item() - 1) <= 1e-6
    assert relative_error(dz_scaled.double() * magnitude, dz.double()) <= 1e-5


def test_long_rows_are_summed_as_exactly_as_short_ones():
    # 40,000 equal columns: one running float32 sum a lane would be off by 1e-4.
    kernels, n = cpu.kernels(), 40_000
    row, c = cpu.Potential.one(4), torch.empty(n)
    kernels.sinkhorn_pass(torch.full((4, n), 0.1), 1.0, row, cpu.Potential.one(n), c, accumulate=False)
    assert ((row.natural_log() + 0.1 * math.log(2) + math.log(n)).abs() <= 3e-6).all()
    assert (c * n / 4 - 1).abs().max() <= 3e-6
