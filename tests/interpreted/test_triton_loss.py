"""backend="triton" through the public functions, against the published implementation's outputs and the reference."""

import pytest
import torch
from derivative_tests import FEW, check_errors
from problems import FLOAT32, GOLDEN_FILES, assert_close, check_rows_of_any_norm, features, load, loss_and_grad
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, bam_targets, reference, sinkhorn_attention
from bam_kernels.simulated import SimulatedRanks

# The interpreter takes a second for each: there those of one rank alone.
FILES = [path for path in GOLDEN_FILES if DEVICE.type != "cpu" or path.stem.endswith("_w1")]
EXACT = {"backend": "triton", "precision": "exact"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    problem = load(path)
    student = problem.student.to(DEVICE)
    teacher = problem.teacher.to(DEVICE) if problem.teacher is not None else None
    loss, grad = loss_and_grad(bam_loss, student, teacher, **EXACT, **problem.options)
    problem.check_loss(loss.cpu(), FLOAT32)
    problem.check_grad(grad.cpu(), FLOAT32)
    problem.check_target(bam_targets(student, teacher, **EXACT, **problem.options).cpu(), FLOAT32)


@pytest.mark.parametrize("R", [0, 2])
def test_flash_engine(R):
    student, teacher = features(3, 7, 9), features(R, 7, 9, seed=1) if R else None
    on_device = student.to(DEVICE), teacher.to(DEVICE) if R else None
    expected = loss_and_grad(reference.bam_loss, student.double(), teacher.double() if R else None)
    for actual, truth in zip(loss_and_grad(bam_loss, *on_device, engine="flash", **EXACT), expected, strict=True):
        assert_close(actual.cpu(), truth, 1e-5)
    P = bam_targets(*on_device, engine="flash", **EXACT)
    assert_close(P.cpu(), bam_targets(student.double(), teacher.double() if R else None), 1e-5)


@pytest.mark.parametrize("engine", ["slab", "flash"])
@pytest.mark.parametrize("R", [0, 2])
def test_rows_of_any_norm(engine, R):
    """float32 scores, and those of fp16 rows."""
    check_rows_of_any_norm(torch.float32, R, DEVICE, (1e-6, 2e-6), engine=engine, **EXACT)
    check_rows_of_any_norm(torch.bfloat16, R, DEVICE, (2e-4, 2**-8), engine=engine, backend="triton")


def test_flash_engine_says_what_it_cannot():
    student = features(2, 5, 4).to(DEVICE)
    with pytest.raises(ValueError, match='engine="flash" keeps all columns, got top_k=3'):
        bam_loss(student, engine="flash", top_k=3, **EXACT)
    with pytest.raises(ValueError, match='engine="flash" takes up to 512 features, got D=513'):
        bam_loss(features(2, 3, 513).to(DEVICE), engine="flash", **EXACT)


@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_attention(output):
    q, k = features(1, 18, 8)[0].to(DEVICE), features(1, 12, 8, seed=1)[0].to(DEVICE)
    options = {"mask": "block", "views": 3, "key_views": 2, "output": output, "differentiable": True}

    def gradients(function, dtype, **more):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        result = function(*leaves, **options, **more)
        parts = [result] if output == "plan" else list(result)
        total = sum((part * torch.linspace(-1, 1, part.numel(), device=DEVICE).view_as(part)).sum() for part in parts)
        return [part.detach() for part in parts], torch.autograd.grad(total, leaves)

    parts, grads = gradients(sinkhorn_attention, torch.float32, **EXACT)
    expected, expected_grads = gradients(reference.sinkhorn_attention, torch.float64)
    for actual, truth in zip((*parts, *grads), (*expected, *expected_grads), strict=True):
        assert (actual - truth).norm() <= 2e-5 * truth.norm()


@pytest.mark.parametrize("R", [0, 2])
def test_one_rank_of_two(R):
    """Alone, with the other rank's keys given: the interpreter takes one thread at a time."""
    student, keys = features(3, 6, 5), torch.nn.functional.normalize(features(4, 6, 5, seed=2).flatten(0, 1), dim=1)
    teacher = features(R, 6, 5, seed=1) if R else None
    results = []
    for function, dtype, options in ((reference.bam_loss, torch.float64, {}), (bam_loss, torch.float32, EXACT)):
        group = SimulatedRanks(2, 1, keys.to(DEVICE, dtype))
        y = teacher.to(DEVICE, dtype) if R else None
        results.append(loss_and_grad(function, student.to(DEVICE, dtype), y, group=group, **options))
    (expected_loss, expected_grad), (loss, grad) = results
    assert_close(loss.cpu(), expected_loss.cpu(), 1e-5)
    assert_close(grad.cpu(), expected_grad.cpu(), 1e-5)


def test_derivatives():
    """What the kernels have not is an error."""
    check_errors(DEVICE, FEW, **EXACT)
