"""The loss by the flash engine: against the published implementation's float64 outputs and the float64 reference."""

import math

import pytest
import torch
from problems import FLOAT32, GOLDEN_FILES, assert_close, features, load
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import reference
from bam_kernels.backends import triton as backend
from bam_kernels.backends.triton import tiles
from bam_kernels.engine import flash
from bam_kernels.engine.call import Call
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK
from bam_kernels.simulated import SimulatedRanks

kernels = backend.kernels()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """One chunk, of as many blocks as there are: small problems then loop."""
    monkeypatch.setattr(tiles, "PROGRAMS", 1)


def options(**given) -> Options:
    return Options(**({"target_views": 2, "key_views": 2, "precision": "exact"} | given))


def evaluated(student, teacher, given: Options, *, needs_grad=True, ranks=ONE_RANK):
    """Loss, dz and P on the CPU, and the statistics."""
    layout = given.layout("bam_loss", student, teacher)
    student = student.to(DEVICE)
    teacher = teacher.to(DEVICE) if teacher is not None else None
    call = Call("bam_loss", student, teacher, layout, given, ranks, kernels, needs_grad)
    found = flash.evaluate(call)
    P = flash.targets(call)
    dz = found.dz.cpu().view(student.shape) if found.dz is not None else None
    return found.loss.cpu(), dz, P.cpu(), found.stats.cpu()


# The interpreter takes a second for each: there those of one rank alone.
FILES = [path for path in GOLDEN_FILES if "topk" not in path.stem]
FILES = [path for path in FILES if DEVICE.type != "cpu" or path.stem.endswith("_w1")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    problem = load(path)
    loss, dz, P, _ = evaluated(problem.student, problem.teacher, options(**problem.options))
    problem.check_loss(loss, FLOAT32)
    problem.check_target(P, FLOAT32)
    problem.check_grad(dz, FLOAT32)


# Images, features and views that are no multiple of a tile; what is particular of each is its id.
PROBLEMS = {
    "one view, two images": dict(V=1, R=0, B=2, D=1, L=1, T=1),
    "one view, a teacher": dict(V=1, R=1, B=17, D=17, L=1, T=1),
    "a prime, more keys than targets": dict(V=3, R=0, B=13, D=15, L=1, T=3),
    "more targets than keys": dict(V=4, R=0, B=5, D=16, L=3, T=1),
    "teacher rows": dict(V=3, R=3, B=7, D=31, L=2, T=1),
    "student rows, more targets than the teacher's views": dict(V=3, R=1, B=7, D=31, L=2, T=1, target_rows="student"),
    "features, rows and keys in two blocks, least eps": dict(
        V=2, R=0, B=33, D=67, L=2, T=2, iterations=2, epsilon=1e-3
    ),
    "rows and keys in two chunks": dict(V=2, R=0, B=33, D=16, L=2, T=2, iterations=2, programs=4),
    # Every score is far below 0, that of a key beyond the last.
    "two images, a low temperature": dict(V=2, R=0, B=2, D=3, L=2, T=2, temperature=2e-3),
    "no mask, least eps": dict(V=2, R=0, B=15, D=16, L=2, T=2, mask_positives=False, epsilon=1e-3),
    "mean cosine 0.99": dict(V=2, R=0, B=16, D=32, L=2, T=2, cosine=0.99),
    "mean cosine 0.99, a teacher, least eps": dict(V=2, R=2, B=9, D=32, L=2, T=2, cosine=0.99, epsilon=1e-3),
}


def problem_of(V, R, B, D, L, T, cosine=0.0, programs=1, **rest):
    student = features(V, B, D, cosine=cosine, seed=1)
    teacher = features(R, B, D, cosine=cosine, seed=2) if R else None
    return student, teacher, dict(target_views=L, key_views=T, precision="exact", **rest)


@pytest.mark.parametrize("dimensions", PROBLEMS.values(), ids=PROBLEMS)
def test_against_the_reference(dimensions, monkeypatch):
    monkeypatch.setattr(tiles, "PROGRAMS", dimensions.get("programs", 1))
    student, teacher, given = problem_of(**dimensions)
    loss, dz, P, stats = evaluated(student, teacher, Options(**given))
    y = teacher.double() if teacher is not None else None
    (expected, expected_stats), grad = reference_of(student.double(), y, given)
    expected_P = reference.bam_targets(student.double(), y, **given)
    least = given.get("epsilon", 0.05) / 0.05
    # Where the loss is 0 it is the difference of scores over tau, which round.
    assert_close(loss, expected, 1e-5 * expected.abs().item() + 1e-6)
    # Scores round: their error over eps is that of P.
    assert_close(P, expected_P, 1e-5 / least)
    assert_close(P.sum(1), torch.ones(len(P)), 2e-5)
    assert_close(dz, grad, 1e-4 * grad.abs().max().item() + 1e-7)
    assert_close(stats[:2], torch.stack(expected_stats[:2]), 1e-4)


def reference_of(student, teacher, given):
    leaf = student.requires_grad_()
    loss, stats = reference.bam_loss(leaf, teacher, **given, return_stats=True)
    (grad,) = torch.autograd.grad(loss, leaf)
    return (loss.detach(), list(vars(stats).values())), grad


def test_collapsed_features():
    student = features(1, 1, 24, seed=3).expand(2, 11, 24)
    loss, dz, _, stats = evaluated(student, None, options())
    assert_close(loss, math.log(22 - 2), 1e-5)
    assert dz.abs().max() <= 1e-6 and stats[5].abs() <= 1e-5


def test_own_columns_among_those_of_other_ranks():
    """One rank of three alone: its positives are in the middle of the gathered keys, two views of them apart."""
    W, B, D, given = 3, 7, 19, {"target_views": 2, "key_views": 2, "precision": "exact", "epsilon": 0.02}
    student = features(3, B, D, seed=4)
    keys = reference.normalize(features(1, W * 2 * B, D, seed=5)[0].double())[0]
    ranks, on_device = SimulatedRanks(W, 1, keys), SimulatedRanks(W, 1, keys.to(DEVICE))
    loss, dz, P, _ = evaluated(student, None, Options(**given, group=on_device), ranks=on_device)
    (expected, _), grad = reference_of(student.double(), None, dict(given, group=ranks))
    assert_close(loss, expected, 1e-5 * expected.abs().item())
    assert_close(P, reference.bam_targets(student.double(), **given, group=ranks), 2e-5)
    assert_close(dz, grad, 1e-4 * grad.abs().max().item())


def test_repeatable_to_the_bit(monkeypatch):
    monkeypatch.setattr(tiles, "PROGRAMS", 8)
    student, _, given = problem_of(V=2, R=0, B=17, D=16, L=2, T=2, iterations=2)
    first, second = (evaluated(student, None, Options(**given)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_where_none_is_wanted():
    student, _, given = problem_of(V=2, R=0, B=3, D=4, L=2, T=2)
    loss, dz, _, _ = evaluated(student, None, Options(**given), needs_grad=False)
    expected, _, _, _ = evaluated(student, None, Options(**given))
    assert dz is None and torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("D", "given", "words"), [(8, {"top_k": 3}, "got top_k=3"), (513, {}, "up to 512 features, got D=513")]
)
def test_what_it_cannot_do_is_an_error(D, given, words):
    with pytest.raises(ValueError, match=words):
        evaluated(features(2, 3, D), None, options(**given))
