"""fp16 rows and keys, int16 scores, their gradient in fp16: against float64, beside plain PyTorch in 16 bit.

The yardstick rounds what autocast rounds: unit rows, scores and their gradient, the last with a gradient scaler.
"""

import math

import pytest
import torch
from problems import GOLDEN_FILES, assert_close, features, load, loss_and_grad
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import triton as backend
from bam_kernels.backends.triton import tiles
from bam_kernels.engine import flash, rows, slab
from bam_kernels.engine.call import Call
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK
from bam_kernels.simulated import SimulatedRanks

kernels = backend.kernels()
ENGINES = {"slab": slab, "flash": flash}
GRADIENT_SCALE = 2.0**16


def relative(x, exact) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def evaluated(engine, student, teacher, ranks=ONE_RANK, **given):
    """Loss, dz and P."""
    options = Options(group=ranks, **given)
    layout = options.layout("bam_loss", student, teacher)
    on_device = student.to(DEVICE), teacher.to(DEVICE) if teacher is not None else None
    call = Call("bam_loss", *on_device, layout, options, ranks, kernels, needs_grad=True, sixteen_bit=True)
    found = ENGINES[engine].evaluate(call)
    P = ENGINES[engine].targets(call)
    return found.loss.cpu(), found.dz.cpu().view(student.shape), P.cpu()


def truth(student, teacher, **given):
    y = teacher.double() if teacher is not None else None
    loss, grad = loss_and_grad(reference.bam_loss, student.double(), y, **given)
    return loss, grad, reference.bam_targets(student.double(), y, **given)


def yardstick(student, teacher, **given):
    """dz and P of PyTorch in 16 bit."""
    options = Options(**given)
    layout = options.layout("bam_loss", student, teacher)
    leaf = student.flatten(0, 1).requires_grad_()
    unit = reference.normalize(leaf)[0]
    z = unit.detach().half().float()
    y = z if teacher is None else reference.normalize(teacher.flatten(0, 1))[0].half().float()
    keys = y[: layout.N]
    scores = (z @ keys.T).half().float().requires_grad_()
    target = (y @ keys.T).half().float()
    loss, _ = reference.loss_from_scores(scores, target, layout, options)
    (G,) = torch.autograd.grad(loss * GRADIENT_SCALE, scores)
    G = G.half().float()
    d = G @ keys
    if teacher is None:
        d[: layout.N] += G.T @ z
    (dz,) = torch.autograd.grad(unit, leaf, d / GRADIENT_SCALE)
    return dz.view(student.shape), reference.log_targets(target, layout, options)[0].exp()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("cosine", "share"), [(0.0, 0.8), (0.9, 0.1), (0.99, 0.01), (0.999, 0.001)])
@pytest.mark.parametrize("R", [0, 2])
def test_below_the_error_of_pytorch_in_16_bit(engine, cosine, share, R):
    """Rounding after the centre is taken off keeps what rows differ in, however much they have in common."""
    student = features(4, 14, 40, cosine=cosine, seed=1)
    teacher = features(R, 14, 40, cosine=cosine, seed=1) if R else None
    _, grad, P = truth(student, teacher)
    _, dz, targets = evaluated(engine, student, teacher)
    plain_dz, plain_P = yardstick(student, teacher)
    assert relative(dz, grad) <= min(share * relative(plain_dz, grad), 8e-4)
    assert relative(targets, P) <= share * relative(plain_P, P)
    assert_close(targets.sum(1), torch.ones(len(P)), 2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_small_epsilon(engine):
    student = features(3, 12, 40, seed=1)
    _, grad, P = truth(student, None, epsilon=0.005)
    _, dz, targets = evaluated(engine, student, None, epsilon=0.005)
    plain_dz, plain_P = yardstick(student, None, epsilon=0.005)
    assert relative(dz, grad) <= relative(plain_dz, grad)
    assert relative(targets, P) <= relative(plain_P, P)


# An image's scores, of one view and of more; some images at once; target scores kept and the source's made in slabs.
@pytest.mark.parametrize(("R", "budget"), [(0, 21 * 6 * 3), (0, 3000), (2, 21 * 10 * 4), (2, 4000)])
def test_slabs_give_what_kept_scores_give(R, budget):
    student, teacher = features(3, 7, 9), features(R, 7, 9, seed=1) if R else None
    given = {"target_views": 2, "key_views": 3 if not R else 2}
    expected = evaluated("slab", student, teacher, **given)
    for actual, whole in zip(evaluated("slab", student, teacher, memory_budget=budget, **given), expected, strict=True):
        assert_close(actual, whole.double(), 1e-3 * whole.abs().max().item())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("R", [0, 2])
def test_one_rank_of_three(engine, R):
    """Alone, with the others' keys given: this rank's columns are in the middle, and keys of others are centred too."""
    W, B, D, given = 3, 7, 24, {"target_views": 2, "key_views": 2}
    student, teacher = features(3, B, D, seed=4), features(R, B, D, seed=6) if R else None
    keys = reference.normalize(features(1, W * 2 * B, D, seed=5)[0].double())[0]
    loss, grad, P = truth(student, teacher, **given, group=SimulatedRanks(W, 1, keys))
    found = evaluated(engine, student, teacher, SimulatedRanks(W, 1, keys.float().to(DEVICE)), **given)
    assert_close(found[0], loss, 2e-4 * loss.item())
    assert relative(found[1], grad) <= 1e-3 and relative(found[2], P) <= 1e-3


@pytest.mark.parametrize("name", ["v3_l1_t3_w1", "v4_l2_t1_teacher_w1", "v2_l2_topk_w1", "hard_collapsed_w1"])
def test_golden(name):
    """float32 embeddings where torch's flag lets products be rounded, through the public functions."""
    problem = load(next(path for path in GOLDEN_FILES if path.stem == name))
    on_device = problem.student.to(DEVICE), problem.teacher.to(DEVICE) if problem.teacher is not None else None
    torch.set_float32_matmul_precision("high")
    try:
        loss, grad = loss_and_grad(bam_loss, *on_device, backend="triton", **problem.options)
        P = bam_targets(*on_device, backend="triton", **problem.options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(loss.cpu(), problem.loss, 2e-3 * problem.loss.abs().item())
    assert 1e-7 < relative(P.cpu(), problem.target) <= 2e-3  # products were rounded
    assert relative(grad.cpu(), problem.grad) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_embeddings_in_strides_of_their_own(dtype):
    """The truth is that of the embeddings as they are: they are not rounded again."""
    student = features(3, 9, 32, seed=2).to(dtype)
    _, grad, _ = truth(student, None)
    strided = student.permute(2, 1, 0).contiguous().permute(2, 1, 0).to(DEVICE)
    assert not strided.is_contiguous()
    _, dz = loss_and_grad(bam_loss, strided, backend="triton")
    assert dz.dtype == dtype and dz.shape == student.shape
    rounding = torch.finfo(dtype).eps
    assert relative(dz.cpu(), grad) <= 1e-3 + rounding


@pytest.mark.parametrize("engine", ENGINES)
def test_collapsed_features(engine):
    """Equal rows: every product is of the centre's rounding alone, and the loss is that of uniform attention."""
    student = features(1, 1, 24, seed=3).expand(2, 11, 24)
    loss, dz, P = evaluated(engine, student, None)
    assert_close(loss, math.log(22 - 2), 1e-4)
    assert torch.isfinite(dz).all() and dz.abs().max() <= 1e-4
    assert_close(P.sum(1), torch.ones(22), 2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_repeatable_to_the_bit(engine, monkeypatch):
    monkeypatch.setattr(tiles, "PROGRAMS", 4)
    student = features(2, 9, 16)
    first, second = (evaluated(engine, student, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_what_is_not_finite_gives_a_loss_that_is_not(engine, where, monkeypatch):
    """As on a GPU, where nothing waits to look at the input."""
    monkeypatch.setattr(rows, "check_finite", lambda *_: None)
    student, teacher = features(2, 5, 16), features(2, 5, 16, seed=1)
    (student if where == "student" else teacher)[1, 3, 2] = math.inf
    loss, _, _ = evaluated(engine, student, teacher)
    assert loss.isnan()


def test_exact_products_on_request():
    student = features(2, 6, 16).half()
    _, grad, _ = truth(student, None)
    _, dz = loss_and_grad(bam_loss, student.to(DEVICE), backend="triton", precision="exact")
    assert relative(dz.cpu(), grad) <= 2e-3  # rounded to the type of the input alone
    loss = bam_loss(student.float().to(DEVICE), backend="triton", precision="exact").cpu()
    assert_close(loss, reference.bam_loss(student.double()), 1e-5 * loss.item())
