"""The reference in float64: the published implementation's numbers, the definition in loops, and hazards."""

import inspect
import math
from dataclasses import fields

import pytest
import torch
from problems import COSINES, FLOAT64, assert_close, features, golden, load, loss_and_grad
from torch import Tensor

import bam_kernels
from bam_kernels import reference
from bam_kernels.layout import Layout
from bam_kernels.options import Options


@golden
def test_golden(golden):
    problem = load(golden)
    student = problem.student.double()
    teacher = problem.teacher.double() if problem.teacher is not None else None
    loss, grad = loss_and_grad(reference.bam_loss, student, teacher, **problem.options)
    assert loss.dtype == grad.dtype == torch.float64
    problem.check_loss(loss, FLOAT64)
    problem.check_grad(grad, FLOAT64)
    problem.check_target(reference.bam_targets(student, teacher, **problem.options), FLOAT64)


def definition(student: Tensor, teacher: Tensor | None, options: Options) -> tuple[float, list, dict[str, float]]:
    """Loss, P (L*B rows) and statistics as the definitions read, one number at a time: no logarithmic domain."""
    V, B, D = student.shape
    L, T = options.target_views, options.key_views

    def unit(x: Tensor) -> list[list[float]]:
        rows = x.reshape(-1, D).tolist()
        return [[a / math.hypot(*row) for a in row] for row in rows]

    def score(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def attends(row: int, column: int) -> bool:
        return not options.mask_positives or row % B != column % B

    z = unit(student)
    y = z if teacher is None else unit(teacher)
    keys = y[: T * B]
    target_rows = z if teacher is None or options.target_rows == "student" else y
    rows, N = len(target_rows), len(keys)

    P = [
        [math.exp(score(target_rows[i], keys[j]) / options.epsilon) if attends(i, j) else 0.0 for j in range(N)]
        for i in range(rows)
    ]
    for _ in range(options.iterations):
        column_sums = [sum(P[i][j] for i in range(rows)) for j in range(N)]
        P = [[P[i][j] / column_sums[j] for j in range(N)] for i in range(rows)]
        P = [[p / sum(row) for p in row] for row in P]
    P = P[: L * B]
    if options.top_k:
        for i in range(B):
            mean = [sum(P[t * B + i][j] for t in range(L)) / L for j in range(N)]
            kept = sorted(range(N), key=lambda j: (-mean[j], j))[: options.top_k]
            for t in range(L):
                mass = sum(P[t * B + i][j] for j in kept)
                P[t * B + i] = [P[t * B + i][j] / mass if j in kept else 0.0 for j in range(N)]

    A = []
    for i in range(V * B):
        e = [math.exp(score(z[i], keys[j]) / options.temperature) if attends(i, j) else 0.0 for j in range(N)]
        A.append([x / sum(e) for x in e])

    def cross_entropy(p: list[float], a: list[float]) -> float:
        return -sum(p_j * math.log(a_j) for p_j, a_j in zip(p, a, strict=True) if p_j > 0)

    of_targets = []
    for t in range(L):
        sources = [0] if V == 1 else [v for v in range(V) if v != t]
        of_views = [sum(cross_entropy(P[t * B + i], A[v * B + i]) for i in range(B)) / B for v in sources]
        of_targets.append(sum(of_views) / len(of_views))
    loss = sum(of_targets) / L
    target_entropy = sum(cross_entropy(p, p) for p in P) / len(P)
    uniform_loss = math.log(N - T if options.mask_positives else N)
    mean_sum = sum(column_sums) / N
    stats = {
        "target_entropy": target_entropy,
        "source_entropy": sum(cross_entropy(a, a) for a in A) / len(A),
        "kl": loss - target_entropy,
        "column_residual": max(abs(c / mean_sum - 1) for c in column_sums) if options.iterations > 1 else math.nan,
        "uniform_loss": uniform_loss,
        "collapse_gap": uniform_loss - loss,
    }
    return loss, P, stats


# V, L, T, R, B and options: each regime of views, with and without a teacher, and what an option changes.
REGIMES = {
    "one view": (1, 1, 1, 0, 4, {}),
    "two views": (2, 2, 2, 0, 3, {}),
    "local views": (4, 2, 2, 0, 3, {}),
    "one target, more keys": (3, 1, 3, 0, 3, {}),
    "fewer keys than targets": (3, 2, 1, 0, 3, {}),
    "all views are targets": (3, 3, 2, 0, 3, {}),
    "two images": (2, 2, 2, 0, 2, {}),
    "one image, no mask": (2, 2, 2, 0, 1, {"mask_positives": False}),
    "one row": (1, 1, 1, 0, 1, {"mask_positives": False}),
    "no mask": (2, 2, 2, 0, 3, {"mask_positives": False}),
    "one iteration": (2, 2, 2, 0, 3, {"iterations": 1}),
    "many iterations": (2, 2, 2, 0, 3, {"iterations": 20}),
    "sharp": (2, 2, 2, 0, 3, {"epsilon": 0.02, "temperature": 0.03}),
    "top 1": (2, 2, 2, 0, 4, {"top_k": 1}),
    "top 3": (4, 3, 2, 0, 4, {"top_k": 3}),
    "teacher": (2, 2, 2, 2, 3, {}),
    "teacher of fewer views": (4, 2, 1, 2, 3, {"top_k": 2}),
    "teacher of more views": (2, 2, 3, 5, 3, {}),
    "teacher's keys": (3, 2, 2, 2, 3, {"target_rows": "student"}),
    "teacher's keys, more targets than its views": (3, 3, 1, 1, 3, {"target_rows": "student"}),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_definition(regime):
    V, L, T, R, B, named = REGIMES[regime]
    named = {"target_views": L, "key_views": T} | named
    student = features(V, B, 5).double()
    teacher = features(R, B, 5, seed=1).double() if R else None
    expected, P, expected_stats = definition(student, teacher, Options(**named))
    loss, stats = reference.bam_loss(student, teacher, **named, return_stats=True)
    assert_close(loss, expected, 1e-12)
    assert_close(reference.bam_targets(student, teacher, **named), torch.tensor(P, dtype=torch.float64), 1e-12)
    for field in fields(stats):
        value = getattr(stats, field.name)
        assert value.dim() == 0 and not value.requires_grad
        expected_value = expected_stats[field.name]
        if math.isnan(expected_value):
            assert value.isnan()
        else:
            assert_close(value, expected_value, 1e-11)


@pytest.mark.parametrize("regime", ["one view", "local views", "teacher", "top 3", "teacher's keys"])
def test_defaults_of_views(regime):
    """L = min(V, 2), or min(V, R, 2) with a teacher; T = L."""
    V, _, _, R, B, _ = REGIMES[regime]
    student, teacher = features(V, B, 5).double(), features(R, B, 5, seed=1).double() if R else None
    views = min(V, R, 2) if R else min(V, 2)
    given = reference.bam_loss(student, teacher, target_views=views, key_views=views)
    assert reference.bam_loss(student, teacher).item() == given.item()
    flat = None if teacher is None else teacher.flatten(0, 1)
    assert reference.bam_loss(student.flatten(0, 1), flat, views=V).item() == given.item()


# Gradient


@pytest.mark.parametrize("options", [{}, {"key_views": 1}, {"mask_positives": False}, {"top_k": 3}], ids=str)
def test_numerical_gradient_with_teacher(options):
    """With the teacher's rows as targets P does not depend on the student, so finite differences are the gradient."""
    student = features(3, 4, 5).double().requires_grad_()
    teacher = features(2, 4, 5, seed=1).double()
    assert torch.autograd.gradcheck(lambda z: reference.bam_loss(z, teacher, **options), student, rtol=1e-6)


@pytest.mark.parametrize("V", [1, 3])
def test_numerical_gradient_with_constant_targets(V):
    """Without a teacher the gradient is that of the loss with P frozen: through rows and keys, not through P."""
    layout = Layout(B=4, V=V, L=min(V, 2), T=min(V, 2), D=5)
    z = features(V, 4, 5).double().flatten(0, 1)

    def scores(x: Tensor) -> Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return unit @ unit[: layout.N].T

    def frozen(x: Tensor) -> Tensor:
        return reference.loss_from_scores(scores(x), scores(z), layout, Options())[0]

    assert torch.autograd.gradcheck(frozen, z.clone().requires_grad_(), rtol=1e-6)
    _, expected = loss_and_grad(frozen, z)
    _, grad = loss_and_grad(reference.bam_loss, z, views=V)
    assert_close(grad, expected, 1e-12)


def test_no_gradient_to_teacher():
    student, teacher = features(2, 4, 5).requires_grad_(), features(2, 4, 5, seed=1).requires_grad_()
    reference.bam_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    assert not reference.bam_loss(student.detach(), teacher).requires_grad
    assert not reference.bam_targets(student, teacher).requires_grad


# Rows of unusual length


@pytest.mark.parametrize("view", [0, 2], ids=["key", "no key"])
def test_zero_row_has_cosine_zero_and_gradient_zero(view):
    """A zero row is like one orthogonal to all others: its only other cosine, with itself, is masked."""
    student = features(3, 4, 5).double()
    wider = torch.cat([student, torch.zeros(3, 4, 1)], dim=2)
    student[view, 1] = 0
    wider[view, 1] = torch.tensor([0, 0, 0, 0, 0, 1.0])
    loss, grad = loss_and_grad(reference.bam_loss, student)
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, wider)
    assert_close(loss, expected_loss, 1e-14)
    assert (grad[view, 1] == 0).all()
    expected_grad[view, 1] = 0
    assert_close(grad, expected_grad[..., :5], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e20, 1e-9])
def test_lengths_cancel(dtype, length):
    """Squares of 1e20 overflow float32; 1e-9 is short and above the floor."""
    student = features(2, 4, 5).double()
    scale = torch.ones(2, 4, 1, dtype=torch.float64)
    scale[0, 1] = scale[1, 2] = length
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, student)
    loss, grad = loss_and_grad(reference.bam_loss, (student * scale).to(dtype))
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(loss, expected_loss, relative)
    assert_close(grad.double() * scale, expected_grad, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_norm_floor(dtype):
    """A row of length 1e-20 is divided by the floor, 1e-12: cosines of 1e-8, gradient 0."""
    student = features(2, 4, 5).to(dtype)
    zero = student.clone()
    student[1, 2] *= 1e-20
    zero[1, 2] = 0
    loss, grad = loss_and_grad(reference.bam_loss, student)
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, zero)
    assert (grad[1, 2] == 0).all()
    assert_close(loss, expected_loss, 1e-6)
    assert_close(grad, expected_grad, 1e-6)


def test_non_finite_input_is_an_error():
    student = features(2, 4, 5)
    student[1, 2, 3] = math.inf
    with pytest.raises(ValueError, match=r"bam_loss: student has 1 row\(s\) with non-finite values.*row 6"):
        reference.bam_loss(student)


# Types, ties, small epsilon


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_is_computed_in_float32(dtype):
    student, teacher = features(2, 5, 8).to(dtype), features(2, 5, 8, seed=1).to(dtype)
    loss, grad = loss_and_grad(reference.bam_loss, student, teacher)
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, student.float(), teacher.float())
    assert loss.dtype == torch.float32 and loss.item() == expected_loss.item()
    assert grad.dtype == dtype and torch.equal(grad, expected_grad.to(dtype))
    assert reference.bam_targets(student, teacher).dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_ties_go_to_the_lower_public_column(k):
    """Equal scores: every unmasked column has the same P in every row."""
    layout = Layout(B=4, V=2, L=2, T=2, D=1)
    log_P, _ = reference.log_targets(torch.zeros(8, 8, dtype=torch.float64), layout, Options(top_k=k))
    for row, kept in enumerate((log_P > -math.inf).tolist()):
        lowest = [column for column in range(8) if column % 4 != row % 4][:k]
        assert [column for column in range(8) if kept[column]] == lowest
    assert_close(log_P.exp().sum(1), torch.ones(8), 1e-14)


@pytest.mark.parametrize("top_k", [8, 9, 100])
def test_top_k_of_all_columns_changes_nothing(top_k):
    student = features(2, 4, 5).double()
    assert reference.bam_loss(student, top_k=top_k).item() == reference.bam_loss(student).item()


def test_top_k_renormalises_mass_that_underflows():
    """Two views of an image disagree: the columns kept for one hold less than e^-745 of the other's row."""
    layout = Layout(B=3, V=2, L=2, T=1, D=1)
    scores = torch.zeros(6, 3, dtype=torch.float64)
    scores[0] = torch.tensor([0.0, 2.0, 0.0])
    scores[3] = torch.tensor([0.0, 0.0, 1.0])
    whole, _ = reference.log_targets(scores, layout, Options(epsilon=5e-4))
    log_P, _ = reference.log_targets(scores, layout, Options(epsilon=5e-4, top_k=1))
    P = log_P.exp().view(2, 3, 3)
    assert whole.exp()[3, 1] == 0 and P[1, 0, 1] == 1
    assert_close(P.sum(-1), torch.ones(2, 3), 1e-12)


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 10.0])
def test_properties(epsilon, cosine):
    """Rows of P sum to one; no loss is below the entropy of its targets."""
    student = features(3, 7, 16, cosine=cosine).double()
    loss, stats = reference.bam_loss(student, epsilon=epsilon, return_stats=True)
    P = reference.bam_targets(student, epsilon=epsilon)
    assert_close(P.sum(1), torch.ones(14), 1e-12)
    assert loss >= stats.target_entropy - 1e-12
    assert (P.view(2, 7, 2, 7).diagonal(dim1=1, dim2=3) == 0).all()


def test_same_signatures_as_the_public_functions():
    for name in ("bam_loss", "bam_targets", "sinkhorn_attention"):
        public = inspect.signature(getattr(bam_kernels, name))
        assert inspect.signature(getattr(reference, name)) == public


SIZES = [
    (torch.float32, 3e38),
    (torch.bfloat16, 3e38),
    (torch.float64, 1e300),
    (torch.float64, 1e160),
    (torch.float32, 1e25),
    (torch.float32, 1e-8),
]


@pytest.mark.parametrize("dtype,size", SIZES)
@pytest.mark.parametrize("R", [0, 2])
def test_norms_beyond_the_type(R, dtype, size):
    """Finite rows of 100 features whose norm, or whose squares, the type cannot hold; a row's length does not matter to
    the loss, and divides its gradient."""
    student = features(2, 8, 100).sign().double()
    student[0, 3] *= torch.linspace(0, 1, 100)  # entries of all sizes
    student[1, 5] *= 1e-3
    teacher = features(R, 8, 100, seed=1).sign().double() if R else None
    expected = loss_and_grad(reference.bam_loss, student.to(dtype).double(), teacher)
    given = (student.to(dtype).double() * size).to(dtype)
    loss, grad = loss_and_grad(reference.bam_loss, given, (teacher * size).to(dtype) if R else None)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert_close(loss, expected[0], tolerance * expected[0].item())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # gradients of rows this long are denormal
    bound = tolerance * expected[1].abs().amax(-1, keepdim=True) + smallest * size
    assert ((grad.double() * size - expected[1]).abs() <= bound).all()


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_a_backward_pass_under_autocast_loses_no_digits(precision, matmul_precision):
    """Products of the gradient are those that the options say, wherever the backward pass is called."""
    z, weights = features(2, 20, 64), features(1, 20, 20, seed=1)[0]
    functions = {
        "loss": lambda x: reference.bam_loss(x, precision=precision),
        "attention": lambda x: (reference.sinkhorn_attention(
            x[0], x[1], differentiable=True, precision=precision) * weights).sum(),
    }  # fmt: skip
    for function in functions.values():
        expected, inside, second = (z.clone().requires_grad_() for _ in range(3))
        (g,) = torch.autograd.grad(function(expected), expected, create_graph=True)
        g.pow(2).sum().backward()
        value = function(inside)
        if precision == "exact":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            value.backward()
            (h,) = torch.autograd.grad(function(second), second, create_graph=True)
            h.pow(2).sum().backward()
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(inside.grad, g) and torch.equal(h, g) and torch.equal(second.grad, expected.grad)
