"""bam_loss, bam_targets, BAMLoss and BAMStats with the C++ row kernels, against float64."""

import math
from contextlib import suppress
from dataclasses import fields

import pytest
import torch
from problems import (
    COSINES,
    FLOAT32,
    Problem,
    assert_close,
    check_rows_of_any_norm,
    features,
    golden,
    load,
    loss_and_grad,
    loss_arguments,
    needs_cpu_kernels,
)
from recorded_operators import RecordedOperators

from bam_kernels import BAMLoss, BAMStats, bam_loss, bam_targets, reference
from bam_kernels.backends import choose, cpu
from bam_kernels.engine import slab
from bam_kernels.layout import Layout
from bam_kernels.options import Options
from bam_kernels.precision import float32_products, product_precision

pytestmark = needs_cpu_kernels
EXACT = {"backend": "cpu", "precision": "exact"}


# Accuracy


def budget(problem: Problem, kind: str) -> int | None:
    """Bytes for: all scores; the target scores and one image of source scores; three images; one image."""
    V, B, _ = problem.student.shape
    L, row_bytes = problem.options["target_views"], 4 * problem.options["key_views"] * B
    if kind == "all":
        return None
    if kind == "targets":
        teachers = problem.teacher is not None and problem.options["target_rows"] == "teacher"
        return ((len(problem.teacher) if teachers else V) * B + V) * row_bytes
    return {"three images": 3, "one image": 1}[kind] * (V + L) * row_bytes


@pytest.fixture
def plans(monkeypatch) -> list:
    """The plans of the slab engine during the test."""
    made = []

    def plan_slabs(*args, **named):
        made.append(original(*args, **named))
        return made[-1]

    original = slab.plan_slabs
    monkeypatch.setattr(slab, "plan_slabs", plan_slabs)
    return made


@golden
@pytest.mark.parametrize("kind", ["all", "targets", "three images", "one image"])
def test_golden(golden, kind, plans):
    """Also where slabs of scores are made again in every sweep; three images leave a shorter last slab."""
    problem = load(golden)
    options = problem.options | EXACT | {"memory_budget": budget(problem, kind)}
    loss, grad = loss_and_grad(bam_loss, problem.student, problem.teacher, **options)
    assert loss.dtype == grad.dtype == torch.float32
    problem.check_loss(loss, FLOAT32)
    problem.check_grad(grad, FLOAT32)
    problem.check_target(bam_targets(problem.student, problem.teacher, **options), FLOAT32)
    recomputed = kind.endswith(("image", "images"))
    assert [plan.cached for plan in plans] == [not recomputed, not recomputed]
    assert kind == "all" or all(plan.match_images < problem.student.shape[1] for plan in plans if not plan.cached)


def check_against_float64(student, teacher=None, loss_floor=1e-7, **options):
    """Bounds: a few roundings of the scores, which P magnifies by 1/epsilon, and of G's entries 1/(B N tau)."""
    in_float64 = student.double(), teacher.double() if teacher is not None else None
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, *in_float64, **options)
    loss, grad = loss_and_grad(bam_loss, student, teacher, **options, **EXACT)
    P = bam_targets(student, teacher, **options, **EXACT)
    epsilon, floor = options.get("epsilon", 0.05), 1e-6 / (student.shape[1] * math.sqrt(P.shape[1]))
    assert_close(loss, expected_loss, 1e-6 * expected_loss.abs().item() + loss_floor)
    assert_close(grad, expected_grad, 2e-5 * expected_grad.abs().max().item() + floor)
    assert_close(P, reference.bam_targets(*in_float64, **options), 1e-7 + 4e-8 / epsilon)


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [1e-3, 5e-3, 0.05, 1.0])
@pytest.mark.parametrize("R", [0, 2])
def test_small_epsilon_and_near_collapse(R, epsilon, cosine):
    student = features(3, 33, 16, cosine=cosine)
    teacher = features(R, 33, 16, cosine=cosine, seed=1) if R else None
    check_against_float64(student, teacher, epsilon=epsilon)


SHAPES = [
    (1, 2, 1),  # one number a row, one key a row attends to
    (1, 3, 2),  # fewer columns than a vector
    (2, 8, 16),  # columns and features fill vectors of 16
    (2, 9, 17),  # one more
    (3, 31, 7),  # primes; features less than a vector
    (3, 24, 130),  # a tail after several vectors of features
    (2, 67, 33),  # enough elements for more than one thread
]


@pytest.mark.parametrize("V,B,D", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"key_views": 1, "top_k": 3}, {"mask_positives": False, "iterations": 1}], ids=str
)
def test_shapes(V, B, D, options):
    # A row that attends to one key has no loss: a difference of numbers up to 1/tau = 10, half a unit of which is 5e-7.
    loss_floor = 5e-7 if (V, B) == (1, 2) else 1e-7
    check_against_float64(features(V, B, D), loss_floor=loss_floor, **options)


@pytest.mark.parametrize("V,R,options", [
    (4, 2, {}),
    (2, 5, {}),
    (2, 5, {"key_views": 4}),
    (4, 1, {"target_rows": "student", "target_views": 3, "key_views": 1}),
    (3, 2, {"target_rows": "student", "top_k": 5}),
    (1, 1, {"top_k": 2}),
], ids=str)  # fmt: skip
def test_teacher(V, R, options):
    check_against_float64(features(V, 11, 9), features(R, 11, 9, seed=1), **options)


@pytest.mark.parametrize("epsilon", [1e-3, 0.05])
def test_outlier_and_duplicates(epsilon):
    """An image opposite to all others, and two that are the same: nothing else is lost to underflow."""
    student = features(2, 9, 16, cosine=0.9)
    student[:, 4] = -student[:, 0] + 0.1 * student[:, 4]
    student[:, 7] = student[:, 2]
    check_against_float64(student, epsilon=epsilon)


@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize(("dtype", "grad_error"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_rows_of_any_norm(dtype, grad_error, R):
    check_rows_of_any_norm(dtype, R, torch.device("cpu"), (1e-6, grad_error), **EXACT)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_ties_go_to_the_lower_public_column(k):
    """Equal rows of ones: centred keys are exactly zero, so all unmasked columns tie."""
    P = bam_targets(torch.ones(2, 5, 4), top_k=k, **EXACT)
    for row in range(10):
        lowest = [column for column in range(10) if column % 5 != row % 5][:k]
        assert P[row].nonzero().flatten().tolist() == lowest


@pytest.mark.parametrize("top_k", [14, 15, 100])
def test_top_k_of_all_columns_changes_nothing(top_k):
    student = features(2, 7, 5)
    assert bam_loss(student, top_k=top_k, **EXACT).item() == bam_loss(student, **EXACT).item()
    assert bam_loss(student, top_k=3, **EXACT).item() != bam_loss(student, **EXACT).item()


# Properties


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [1e-3, 0.05])
@pytest.mark.parametrize("top_k", [0, 2])
def test_rows_of_targets_sum_to_one(cosine, epsilon, top_k):
    P = bam_targets(features(3, 17, 16, cosine=cosine), epsilon=epsilon, top_k=top_k, **EXACT)
    assert_close(P.double().sum(1), torch.ones(34), 1e-6)
    assert (P >= 0).all()
    assert (P.view(2, 17, 2, 17).diagonal(dim1=1, dim2=3) == 0).all()


@pytest.mark.parametrize("V,L,T,mask", [(2, 2, 2, True), (1, 1, 1, True), (4, 2, 1, True), (2, 2, 2, False)])
@pytest.mark.parametrize("epsilon", [1e-3, 0.05])
def test_collapsed_features(V, L, T, mask, epsilon):
    """All rows equal: the loss is log(N - T), log N without the mask, and no row moves."""
    B = 19
    student = features(1, 1, 13).expand(V, B, 13).clone()
    options = {"target_views": L, "key_views": T, "mask_positives": mask, "epsilon": epsilon}
    loss, grad = loss_and_grad(bam_loss, student, **options, **EXACT)
    assert_close(loss, math.log(T * B - T if mask else T * B), 1e-6)
    assert_close(grad, torch.zeros(V, B, 13), 1e-8)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"mask_positives": False}, {"epsilon": 1e-3}], ids=str)
def test_loss_is_at_least_the_entropy_of_the_targets(options):
    student = features(3, 17, 16)
    loss, stats = bam_loss(student, **options, **EXACT, return_stats=True)
    assert loss >= stats.target_entropy - 1e-6 and stats.kl >= -1e-6
    P = bam_targets(student, **options, **EXACT).double()
    assert_close(stats.target_entropy, torch.special.entr(P).sum(1).mean(), 1e-5)


def test_permuting_images_permutes_the_gradient():
    student, teacher = features(3, 17, 16), features(2, 17, 16, seed=1)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    for rows in (None, teacher):
        loss, grad = loss_and_grad(bam_loss, student, rows, **EXACT)
        permuted = rows[:, order] if rows is not None else None
        permuted_loss, permuted_grad = loss_and_grad(bam_loss, student[:, order], permuted, **EXACT)
        assert_close(permuted_loss, loss, 1e-6)
        assert_close(permuted_grad, grad[:, order], 1e-6)


def test_one_step_along_the_gradient_lowers_the_loss():
    """By |grad|^2 times the step: the gradient against the loss itself, not against the reference."""
    student, teacher = features(2, 9, 8), features(2, 9, 8, seed=1)
    loss, grad = loss_and_grad(bam_loss, student, teacher, **EXACT)
    step = 1e-2 / grad.norm()
    moved = bam_loss(student - step * grad, teacher, **EXACT)
    assert_close(loss - moved, step * grad.double().square().sum(), 0.05 * (loss - moved).item())


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"iterations": 1}, {"mask_positives": False}, {"target_rows": "student"}], ids=str
)
@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize("cosine", [0.0, 0.9])  # the column furthest from the mean: the largest, the smallest
def test_stats(cosine, R, options):
    student = features(4, 17, 16, cosine=cosine)
    teacher = features(R, 17, 16, cosine=cosine, seed=1) if R else None
    expected_loss, expected = reference.bam_loss(
        student.double(), teacher.double() if R else None, **options, return_stats=True
    )
    loss, stats = bam_loss(student.requires_grad_(), teacher, **options, **EXACT, return_stats=True)
    assert isinstance(stats, BAMStats) and loss.requires_grad
    assert loss.item() == bam_loss(student, teacher, **options, **EXACT).item()
    assert_close(loss.detach(), expected_loss, 1e-5)
    for field in fields(stats):
        value, expected_value = getattr(stats, field.name), getattr(expected, field.name)
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
        if expected_value.isnan():
            assert field.name == "column_residual" and options == {"iterations": 1} and value.isnan()
        else:
            assert_close(value, expected_value, 1e-5)


# Reproducibility


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"memory_budget": 4 * 202 * 2 * 20}], ids=str)
def test_bitwise_repeatable(options):
    """Two threads' work at 101 images, whole or twenty at a time."""
    student = features(2, 101, 16)
    first = loss_and_grad(bam_loss, student, **options, **EXACT)
    again = loss_and_grad(bam_loss, student.clone(), **options, **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_any_number_of_threads_gives_the_same_bits(threads, fixed, teacher, top_k):
    """From given scores: a library product may itself depend on the threads."""
    layout = Layout(B=131, V=3, L=2, T=2, D=1, R=2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(layout.M, layout.N, generator=generator) * 2 - 1
    target = torch.rand(layout.R * layout.B, layout.N, generator=generator) * 2 - 1 if teacher else None
    options, step = Options(top_k=top_k), 1.0
    if fixed:
        step = 1 / 32000
        scores = (scores / step).round().short()
        target = (target / step).round().short() if teacher else None
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        evaluated, G = slab.from_scores(
            scores.clone(),
            layout,
            options,
            cpu.kernels(),
            target_scores=target.clone() if teacher else None,
            step=step,
        )
        results.append((evaluated.loss, evaluated.stats, G))
    for loss, stats, G in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(stats, results[0][1]) and torch.equal(G, results[0][2])
    if not fixed:
        leaf = scores.double().requires_grad_()
        target = target.double() if teacher else leaf.detach()
        expected, _ = reference.loss_from_scores(leaf, target, layout, options)
        expected.backward()
        assert_close(results[0][0], expected.detach(), 1e-6)
        assert_close(results[0][2], leaf.grad, 1e-6 * leaf.grad.abs().max().item())


# Operators of torch that compute nothing.
ROOM_AND_VIEWS = {
    "permute",
    "empty",
    "new_empty",
    "empty_like",
    "unbind",
    "slice",
    "alias",
    "view",
    "flatten",
    "numpy_T",
    "reshape",
    "to",
}


@pytest.mark.parametrize("teacher", [False, True])
def test_between_kernels_torch_does_products_alone(monkeypatch, teacher):
    evaluate, names = slab.evaluate, []

    def recorded(call):
        with RecordedOperators(names):
            return evaluate(call)

    monkeypatch.setattr(slab, "evaluate", recorded)
    student = features(4, 33, 16).requires_grad_()
    bam_loss(student, features(4, 33, 16) if teacher else None, backend="cpu").backward()
    # Scores of both, and the gradient; without a teacher scores, G + Gᵀ times keys, and what other rows give and get.
    computed = ["mm", "mm", "mm"] if teacher else ["mm", "mm", "mm", "addmm_"]
    assert [name for name in names if name not in ROOM_AND_VIEWS] == computed


# Forms of input


def test_auto_takes_the_cpu_kernels():
    student = features(2, 33, 16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert choose("bam_loss", Options(), torch.device("cpu"), dtype) == "cpu"
    assert choose("bam_loss", Options(), torch.device("cpu"), torch.float64) == "reference"
    assert bam_loss(student).item() == bam_loss(student, backend="cpu").item()
    assert bam_loss(student.double()).dtype == torch.float64
    assert bam_targets(student.double()).dtype == torch.float64


def test_two_or_three_dimensions():
    student, teacher = features(3, 7, 5), features(2, 7, 5, seed=1)
    loss, grad = loss_and_grad(bam_loss, student, teacher, **EXACT)
    for z, y in (
        (student.flatten(0, 1), teacher.flatten(0, 1)),
        (student.flatten(0, 1), teacher),
        (student, teacher.flatten(0, 1)),
    ):
        other_loss, other_grad = loss_and_grad(bam_loss, z, y, views=3, **EXACT)
        assert other_loss.item() == loss.item()
        assert other_grad.shape == z.shape and torch.equal(other_grad.view_as(grad), grad)


def every_second(x, dim):
    """x as every second slice of a larger tensor."""
    larger = x.repeat_interleave(2, dim)
    return larger[(slice(None),) * dim + (slice(None, None, 2),)]


@pytest.mark.parametrize("form", [
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # as (B, V, D) in memory
    lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    lambda x: every_second(x, 0),
    lambda x: every_second(x, 1),
    lambda x: every_second(x, 2),
], ids=["images first", "features first", "some views", "some images", "some features"])  # fmt: skip
def test_non_contiguous_input(form):
    student, teacher = features(3, 7, 5), features(2, 7, 5, seed=1)
    assert not form(student).is_contiguous() and torch.equal(form(student), student)
    loss, grad = loss_and_grad(bam_loss, student, teacher, **EXACT)
    other_loss, other_grad = loss_and_grad(bam_loss, form(student), form(teacher), **EXACT)
    assert other_loss.item() == loss.item() and torch.equal(other_grad, grad)
    assert torch.equal(bam_targets(form(student), **EXACT), bam_targets(student, **EXACT))


def test_rows_that_share_memory():
    student = features(2, 7, 5)
    shared = student[:1].expand(3, 7, 5)
    loss, grad = loss_and_grad(bam_loss, shared, **EXACT)
    expected_loss, expected_grad = loss_and_grad(bam_loss, shared.clone(), **EXACT)
    assert loss.item() == expected_loss.item() and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision,tolerance", [("exact", 1e-6), ("default", 5e-3)])
def test_16_bit_input(dtype, precision, tolerance):
    """A float32 loss; the gradient is rounded once, to the input's type. default: 16-bit products are allowed."""
    student, teacher = features(3, 33, 16).to(dtype), features(2, 33, 16, seed=1).to(dtype)
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, student.double(), teacher.double())
    loss, grad = loss_and_grad(bam_loss, student, teacher, backend="cpu", precision=precision)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_close(loss, expected_loss, tolerance)
    rounding = torch.finfo(dtype).eps * expected_grad.abs() + torch.finfo(dtype).smallest_normal
    assert_close(grad, expected_grad, rounding + tolerance * expected_grad.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_may_differ_under_autocast(dtype):
    student, teacher = features(2, 9, 8).to(dtype), features(2, 9, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = loss_and_grad(bam_loss, student, teacher, **EXACT)
        P = bam_targets(student, teacher, **EXACT)
    expected_loss, expected_grad = loss_and_grad(reference.bam_loss, student.double(), teacher.double())
    assert grad.dtype == dtype and loss.dtype == P.dtype == torch.float32
    assert_close(loss, expected_loss, 1e-6)
    assert_close(grad, expected_grad, torch.finfo(dtype).eps * expected_grad.abs() + 1e-6)
    assert_close(P, reference.bam_targets(student.double(), teacher.double()), 1e-6)


@pytest.mark.parametrize("flag", ["high", "medium"])
@pytest.mark.parametrize("precision", ["exact", "default"])
def test_global_precision_flag(matmul_precision, monkeypatch, precision, flag):
    """exact: products at "highest" and the same bits, whether or not this processor has anything lower.

    Split products are none of torch's, which are at "highest" beside them.
    """
    within = []

    def evaluate(*args, **named):
        within.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return original(*args, **named)

    original = slab.evaluate
    student = features(2, 65, 32, cosine=0.9)
    torch.set_float32_matmul_precision("highest")
    expected = loss_and_grad(bam_loss, student, backend="cpu", precision=precision)
    monkeypatch.setattr(slab, "evaluate", evaluate)
    torch.set_float32_matmul_precision(flag)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_grad(bam_loss, student, backend="cpu", precision=precision)
    is_highest = precision == "exact" or cpu.kernels().can_split_products
    assert within == [("highest" if is_highest else flag, False)]
    assert torch.get_float32_matmul_precision() == flag
    if precision == "exact":
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_newer_precision_flag(matmul_precision, flag):
    """torch.backends' own flag, after which the older interface may raise, is heeded and left as it was."""
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this torch has the older interface alone")
    student = features(2, 17, 8)
    expected = loss_and_grad(bam_loss, student)
    before = products.fp32_precision
    torch.set_float32_matmul_precision("highest" if flag == "tf32" else "high")
    products.fp32_precision = flag
    try:
        assert float32_products(torch.device("cuda")) == {"ieee": "highest", "tf32": "high"}[flag]
        for precision in ("default", "exact"):
            loss, grad = loss_and_grad(bam_loss, student, precision=precision)
            assert_close(loss, expected[0], 1e-6)
            assert_close(grad, expected[1], 1e-6)
            assert products.fp32_precision == flag
        with product_precision(torch.device("cuda"), "exact"):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == flag
    finally:
        products.fp32_precision = before


def test_products_of_float16_add_in_float32():
    """Whatever torch's flag says, which is left as it was, also after an error."""
    products, within = torch.backends.cuda.matmul, []
    before = products.allow_fp16_accumulation
    try:
        for flag in (True, False):
            products.allow_fp16_accumulation = flag
            for precision in ("default", "exact"):
                with suppress(ZeroDivisionError), product_precision(torch.device("cuda"), precision):
                    within.append(products.allow_fp16_accumulation)
                    raise ZeroDivisionError
                assert products.allow_fp16_accumulation == flag
    finally:
        products.allow_fp16_accumulation = before
    assert within == [False] * 4


# Gradient


def operator(student, teacher, needs_grad):
    """torch.ops.bam_kernels.loss with default options, and exact products."""
    arguments = loss_arguments(student, teacher, precision="exact")
    return torch.ops.bam_kernels.loss(student, teacher, *arguments, needs_grad)


@pytest.mark.parametrize("R", [0, 2])
def test_gradient_is_not_computed_for_nothing(R):
    student, teacher = features(3, 7, 5), features(R, 7, 5, seed=1) if R else None
    loss, stats, dz = operator(student, teacher, True)
    loss_alone, stats_alone, nothing = operator(student, teacher, False)
    assert dz.shape == (3, 7, 5) and nothing.numel() == 0
    assert loss.item() == loss_alone.item() == bam_loss(student, teacher, **EXACT).item()
    assert torch.equal(stats, stats_alone)
    assert torch.equal(dz, loss_and_grad(bam_loss, student, teacher, **EXACT)[1])


def test_gradient_is_computed_only_for_a_student_that_wants_it(monkeypatch):
    wanted = []

    def evaluate(call):
        wanted.append(call.needs_grad)
        return original(call)

    original = slab.evaluate
    monkeypatch.setattr(slab, "evaluate", evaluate)
    student, teacher = features(3, 7, 5), features(2, 7, 5, seed=1).requires_grad_()
    bam_loss(student, teacher, **EXACT)
    bam_loss(student.requires_grad_(), teacher, **EXACT)
    with torch.no_grad():
        bam_loss(student, teacher, **EXACT)
    assert wanted == [False, True, False]


def test_gradient_goes_to_the_student_alone():
    student, teacher = features(3, 7, 5).requires_grad_(), features(2, 7, 5, seed=1).requires_grad_()
    bam_loss(student, teacher, **EXACT).backward()
    assert student.grad is not None and teacher.grad is None
    assert not bam_loss(student.detach(), teacher, **EXACT).requires_grad
    assert not bam_targets(student, teacher, **EXACT).requires_grad
    with torch.no_grad():
        assert not bam_loss(student, teacher, **EXACT).requires_grad
    with torch.inference_mode():
        assert bam_loss(student, **EXACT).item() == bam_loss(student.detach(), **EXACT).item()


def test_gradient_flows_on():
    """Through the layers that made the embeddings; twice over the same leaf."""
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    inputs = features(3, 7, 6)
    bam_loss(inputs @ weight, **EXACT).backward()
    bam_loss(inputs @ weight, **EXACT).backward()
    leaf = weight.detach().double().requires_grad_()
    (2 * reference.bam_loss(inputs.double() @ leaf)).backward()
    assert_close(weight.grad, leaf.grad, 1e-5 * leaf.grad.abs().max().item())


def test_scaled_loss():
    """A gradient scaler's power of two reaches a float16 gradient before it is rounded, however small it is."""
    student = (10000 * features(2, 9, 8)).half()
    _, expected = loss_and_grad(reference.bam_loss, student.double())
    assert (expected.abs() < torch.finfo(torch.float16).smallest_normal).all()
    expected *= 2**16
    _, grad = loss_and_grad(lambda z: 2**16 * bam_loss(z, **EXACT), student)
    assert_close(grad, expected, 1e-3 * expected.abs() + 1e-5 * expected.abs().max())


@pytest.mark.parametrize("scale_requires_grad", [False, True])
def test_gradient_is_differentiable_once(scale_requires_grad):
    """A gradient penalty is an error; it must not count as a constant."""
    student = features(2, 7, 5).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=scale_requires_grad)
    loss = scale * bam_loss(student, **EXACT)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        (loss + grad.square().sum()).backward()


# BAMLoss


@pytest.mark.parametrize("options", [
    {},
    {"views": 3},
    {"temperature": 0.2, "epsilon": 0.01, "iterations": 2, "top_k": 2, "mask_positives": False},
    {"target_views": 1, "key_views": 1, "target_rows": "student"},
    {"backend": "reference"},
    {"memory_budget": 10**6, "engine": "slab", "precision": "exact", "backend": "cpu"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("R", [0, 2])
def test_module_is_bam_loss(options, R):
    student, teacher = features(3, 7, 5), features(R, 7, 5, seed=1) if R else None
    expected_loss, expected_grad = loss_and_grad(bam_loss, student, teacher, **options)
    loss, grad = loss_and_grad(BAMLoss(**options), student, teacher)
    assert loss.item() == expected_loss.item() and torch.equal(grad, expected_grad)
    loss, stats = BAMLoss(**options, return_stats=True)(student, teacher)
    assert loss.item() == expected_loss.item()
    _, expected_stats = bam_loss(student, teacher, **options, return_stats=True)
    assert [getattr(stats, f.name).item() for f in fields(stats)] == [
        getattr(expected_stats, f.name).item() for f in fields(stats)
    ]


def test_module_holds_no_state():
    module = BAMLoss()
    assert not list(module.parameters()) and not module.state_dict()


def test_epsilon_schedule():
    student = features(2, 7, 5)
    module = BAMLoss(epsilon=lambda step: 0.1 / (1 + step), iterations=2)
    for step in (0, 3):
        expected = bam_loss(student, epsilon=0.1 / (1 + step), iterations=2)
        assert module(student, step=step).item() == expected.item()
    assert BAMLoss(epsilon=0.1)(student, step=3).item() == bam_loss(student, epsilon=0.1).item()


def test_module_shows_the_options_that_are_not_default():
    assert repr(BAMLoss()) == "BAMLoss()"
    assert repr(BAMLoss(epsilon=0.05, temperature=0.1)) == "BAMLoss()"
    shown = repr(BAMLoss(views=4, epsilon=0.02, top_k=8, mask_positives=False, backend="cpu"))
    for part in ("views=4", "epsilon=0.02", "top_k=8", "mask_positives=False", "backend=cpu"):
        assert part in shown
    assert "temperature" not in shown
    assert repr(BAMLoss(return_stats=True)) == "BAMLoss(return_stats=True)"
    assert "linear_decay" in repr(BAMLoss(epsilon=linear_decay))


def linear_decay(step: int) -> float:
    return max(0.05, 0.1 - 0.01 * step)
