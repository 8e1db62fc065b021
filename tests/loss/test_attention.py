"""sinkhorn_attention with the C++ row kernels, its plan, potentials and gradients, against the float64 reference."""

import pytest
import torch
from problems import COSINES, assert_close, features, needs_cpu_kernels, norm_above_floor
from row_problems import rows_of_any_norm
from torch import Tensor

from bam_kernels import reference, sinkhorn_attention
from bam_kernels.engine import attention, plan

pytestmark = needs_cpu_kernels
EXACT = {"backend": "cpu", "precision": "exact"}
POTENTIALS = {"output": "potentials"}

# Rows m, keys n (0: the rows themselves) and what leaves some of them out.
PROBLEMS = {
    "none": (33, 0, {}),
    "none, keys": (34, 51, {}),
    "one row": (1, 7, {}),
    "one key": (7, 1, {}),
    "self": (33, 0, {"mask": "self"}),
    "two rows, self": (2, 0, {"mask": "self"}),
    "block": (36, 0, {"mask": "block", "views": 3}),
    "block of one view": (17, 0, {"mask": "block"}),
    "block, fewer keys": (36, 0, {"mask": "block", "views": 3, "key_views": 2}),
    "block, keys": (36, 12, {"mask": "block", "views": 3, "key_views": 1}),
    "block, more keys": (24, 60, {"mask": "block", "views": 2, "key_views": 5}),
}
problems = pytest.mark.parametrize("problem", PROBLEMS)
normalized = pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "rows as given"])


def rows(m: int, n: int, D: int = 16, cosine: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """q (m, D), k (n, D) or None."""
    return features(1, m, D, cosine=cosine)[0], features(1, n, D, cosine=cosine, seed=1)[0] if n else None


def in_float64(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return q.double(), k.double() if k is not None else None


def rounding(q: Tensor, k: Tensor | None, epsilon: float, normalize: bool) -> float:
    """Several roundings of the largest score over epsilon, and of the exponentials."""
    largest = 1.0 if normalize else (q.norm(dim=1).max() * (q if k is None else k).norm(dim=1).max()).item()
    return 6 * 2**-24 * largest / epsilon + 2e-6


def check_values(q: Tensor, k: Tensor | None, **options) -> None:
    """The plan relative to its elements, the potentials absolutely: they are logarithms."""
    bound = rounding(q, k, options["epsilon"], options["normalize"])
    expected = reference.sinkhorn_attention(*in_float64(q, k), **options)
    P = sinkhorn_attention(q, k, **options, **EXACT)
    assert P.dtype == torch.float32
    assert_close(P, expected, bound * (expected + 1e-4))
    f, g = sinkhorn_attention(q, k, **options, **POTENTIALS, **EXACT)
    assert f.dtype == g.dtype == torch.float32
    expected_f, expected_g = reference.sinkhorn_attention(*in_float64(q, k), **options, **POTENTIALS)
    assert_close(f, expected_f, bound)
    assert_close(g, expected_g, bound)


@problems
@normalized
@pytest.mark.parametrize("iterations", [1, 3])
def test_values(problem, normalize, iterations):
    m, n, options = PROBLEMS[problem]
    check_values(*rows(m, n), epsilon=0.05, iterations=iterations, normalize=normalize, **options)


@pytest.mark.parametrize("problem", ["none, keys", "self", "block, fewer keys"])
@normalized
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [1e-3, 5e-3, 1.0])
def test_small_epsilon_and_near_collapse(problem, normalize, cosine, epsilon):
    m, n, options = PROBLEMS[problem]
    check_values(*rows(m, n, cosine=cosine), epsilon=epsilon, normalize=normalize, **options)


@problems
@normalized
def test_definition_and_rows(problem, normalize):
    """P = exp(s/epsilon + f_i + g_j) over what is not masked, and its rows sum to one."""
    m, n, options = PROBLEMS[problem]
    q, k = rows(m, n)
    options = options | {"normalize": normalize, "epsilon": 0.2}
    P = sinkhorn_attention(q, k, **options, **EXACT).double()
    f, g = sinkhorn_attention(q, k, **options, **POTENTIALS, **EXACT)
    q, k = in_float64(q, k)
    k = q[: P.shape[1]] if k is None else k
    if normalize:
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    from_potentials = (q @ k.T / 0.2 + f[:, None].double() + g.double()).exp()
    i, j = torch.arange(len(q))[:, None], torch.arange(len(k))
    if "mask" in options:
        images = len(q) // options.get("views", 1)
        masked = i % images == j % images
        from_potentials = from_potentials.masked_fill(masked, 0.0)
        assert (P[masked] == 0).all()
    assert_close(P, from_potentials, 3 * rounding(q, k, 0.2, normalize))
    assert_close(P.sum(1), torch.ones(len(q)), 1e-6)


def test_columns_are_balanced_after_many_iterations():
    q, k = rows(34, 51)
    P = sinkhorn_attention(q, k, epsilon=0.5, iterations=50, **EXACT)
    assert_close(P.sum(0), torch.full((51,), 34 / 51), 1e-5)


@pytest.mark.parametrize("D", [1, 15, 17, 130])
def test_features(D):
    """One, a vector of 16 less and plus one, a tail after several vectors."""
    check_values(*rows(9, 13, D), epsilon=0.05, normalize=True)


def test_many_rows():
    """Enough scores for more than one thread."""
    check_values(*rows(131, 139), epsilon=0.05, normalize=True)


def test_potentials_in_slabs(monkeypatch):
    """Scores that do not fit are made again in every sweep: here ten rows of 51 at a time, and a shorter last slab."""
    made = []

    def plan_slabs(*args, **named):
        made.append(plan.plan_slabs(*args, **named | {"budget": named["budget"] or 10 * 51 * 4}))
        return made[-1]

    q, k = rows(34, 51)
    whole = sinkhorn_attention(q, k, **POTENTIALS, **EXACT)
    monkeypatch.setattr(attention, "plan_slabs", plan_slabs)
    in_slabs = sinkhorn_attention(q, k, **POTENTIALS, **EXACT)
    assert [(p.cached, p.sweep_rows) for p in made] == [(False, 10)]
    for a, b in zip(in_slabs, whole, strict=True):
        assert_close(a, b.double(), 1e-5)


def test_rows_of_any_norm():
    check_values(rows_of_any_norm(16), rows_of_any_norm(16).roll(5, 0), epsilon=0.05, normalize=True)


def test_outlier_and_duplicates():
    q, _ = rows(17, 0, cosine=0.9)
    q[4] = 0.1 * q[4] - q[0]
    q[7] = q[2]
    for epsilon in (1e-3, 0.05):
        check_values(q, None, epsilon=epsilon, mask="self", normalize=True)


# Gradient


def gradients(function, q: Tensor, k: Tensor | None, weights, **options) -> list[Tensor]:
    """Of Σ weights * outputs with respect to q and, where given, k."""
    leaves = [x.detach().requires_grad_() for x in (q, k) if x is not None]
    outputs = function(*leaves, differentiable=True, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    terms = [(w.to(x.dtype) * x).sum() for w, x in zip(weights, outputs, strict=True) if w is not None]
    return list(torch.autograd.grad(sum(terms), leaves))


def check_gradients(q: Tensor, k: Tensor | None, output: str, used: tuple[bool, ...] = (True, True), **options) -> None:
    """Bound: P and the potentials are exponentials and logarithms of s/epsilon, so gradients are of size 1/epsilon."""
    generator = torch.Generator().manual_seed(5)
    outputs = reference.sinkhorn_attention(*in_float64(q, k), output=output, **options)
    outputs = [outputs] if output == "plan" else outputs
    weights = [
        torch.randn(x.shape, generator=generator) if use else None for x, use in zip(outputs, used, strict=False)
    ]
    epsilon = options["epsilon"]
    expected = gradients(reference.sinkhorn_attention, *in_float64(q, k), weights, output=output, **options)
    actual = gradients(sinkhorn_attention, q, k, weights, output=output, **options, **EXACT)
    bound = rounding(q, k, epsilon, options["normalize"])
    for grad, expected_grad, x in zip(actual, expected, (q, k), strict=False):
        assert grad.dtype == x.dtype
        assert_close(grad, expected_grad, bound * expected_grad.abs().max().item() + 3e-7 / epsilon)


@problems
@normalized
@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_gradients(problem, normalize, output):
    m, n, options = PROBLEMS[problem]
    check_gradients(*rows(m, n), output, epsilon=0.05, normalize=normalize, **options)


@pytest.mark.parametrize("problem", ["none, keys", "self", "block, fewer keys"])
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("epsilon", [1e-3, 5e-3, 1.0])
@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_gradients_at_small_epsilon_and_near_collapse(problem, cosine, epsilon, output):
    m, n, options = PROBLEMS[problem]
    check_gradients(*rows(m, n, cosine=cosine), output, epsilon=epsilon, normalize=True, **options)


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_gradients_through_iterations(iterations, output):
    check_gradients(*rows(9, 13), output, epsilon=0.1, iterations=iterations, normalize=True)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["f", "g"])
def test_gradient_of_one_potential(used):
    check_gradients(*rows(9, 13), "potentials", used, epsilon=0.1, normalize=True)


def test_gradient_of_a_zero_row_is_zero():
    q, k = rows(9, 13)
    q[3] = 0
    k[5] = 0
    weights = [torch.randn(9, 13, generator=torch.Generator().manual_seed(5))]
    dq, dk = gradients(sinkhorn_attention, q, k, weights, **EXACT)
    assert (dq[3] == 0).all() and (dk[5] == 0).all()
    check_gradients(q, k, "plan", epsilon=0.05, normalize=True)


def test_gradients_by_rows_of_any_norm():
    """The gradient by a row is the gradient by its unit row, divided by the row's norm; 0 for norms below 1e-12."""
    given = [rows_of_any_norm(16), rows_of_any_norm(16).roll(5, 0)]
    norms = [norm_above_floor(x) for x in given]
    weights = [torch.randn(12, 12)]
    unit = [x.double() / norm for x, norm in zip(given, norms, strict=True)]
    expected = gradients(reference.sinkhorn_attention, *unit, weights, epsilon=0.05)
    actual = gradients(sinkhorn_attention, *given, weights, epsilon=0.05, **EXACT)
    for grad, norm, truth in zip(actual, norms, expected, strict=True):
        assert_close(grad.double() * norm, truth, 2e-5 * truth.abs().max() + 2**-149 * norm)


def test_gradient_with_respect_to_one_argument():
    q, k = rows(9, 13)
    weights = torch.randn(9, 13, generator=torch.Generator().manual_seed(5))
    both = gradients(sinkhorn_attention, q, k, [weights], **EXACT)
    for of_q in (True, False):
        leaves = q.clone().requires_grad_(of_q), k.clone().requires_grad_(not of_q)
        (sinkhorn_attention(*leaves, differentiable=True, **EXACT) * weights).sum().backward()
        assert torch.equal(leaves[not of_q].grad, both[not of_q]) and leaves[of_q].grad is None


@pytest.mark.parametrize("output", ["plan", "potentials"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_not_differentiable(output, backend):
    """Without `differentiable` the result is a constant; with it, the values are the same."""
    q, k = (x.requires_grad_() for x in rows(9, 13))
    constant = sinkhorn_attention(q, k, output=output, backend=backend)
    differentiable = sinkhorn_attention(q, k, output=output, backend=backend, differentiable=True)
    with torch.no_grad():
        without_grad = sinkhorn_attention(q, k, output=output, backend=backend, differentiable=True)
    if output == "plan":
        constant, differentiable, without_grad = [constant], [differentiable], [without_grad]
    for a, b, c in zip(constant, differentiable, without_grad, strict=True):
        assert not a.requires_grad and b.requires_grad and not c.requires_grad
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradient_of_a_gradient_is_right_or_an_error():
    """A penalty on the gradient reaches q; a partial second derivative would be neither."""
    q, k = rows(9, 13)

    def penalty(function, q: Tensor, k: Tensor, **options) -> Tensor:
        q = q.detach().requires_grad_()
        P = function(q, k, differentiable=True, **options)
        (grad,) = torch.autograd.grad(P.square().sum(), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    expected = penalty(reference.sinkhorn_attention, *in_float64(q, k))
    try:
        actual = penalty(sinkhorn_attention, q, k, **EXACT)
    except RuntimeError as error:
        assert "differentia" in str(error)
    else:
        assert_close(actual, expected, 1e-3 * expected.abs().max().item())


# Forms of input


@pytest.mark.parametrize("normalize", [True, False])
def test_non_contiguous_input(normalize):
    q, k = rows(9, 13)
    weights = [torch.randn(9, 13, generator=torch.Generator().manual_seed(5))]
    transposed = q.T.contiguous().T, k.repeat_interleave(2, 0)[::2]
    for x, y in zip(transposed, (q, k), strict=True):
        assert not x.is_contiguous() and torch.equal(x, y)
    P = sinkhorn_attention(q, k, normalize=normalize, **EXACT)
    assert torch.equal(sinkhorn_attention(*transposed, normalize=normalize, **EXACT), P)
    expected = gradients(sinkhorn_attention, q, k, weights, normalize=normalize, **EXACT)
    by_columns = [weight.T.contiguous().T for weight in weights]
    for given in ((transposed, weights), ((q, k), by_columns)):
        actual = gradients(sinkhorn_attention, *given[0], given[1], normalize=normalize, **EXACT)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input(dtype):
    """Float32 results; gradients rounded once, to the input's type."""
    q, k = (x.to(dtype) for x in rows(9, 13))
    check_values(q, k, epsilon=0.05, normalize=True)
    weights = [torch.randn(9, 13, generator=torch.Generator().manual_seed(5))]
    expected = gradients(reference.sinkhorn_attention, *in_float64(q, k), weights)
    for grad, of_float64 in zip(gradients(sinkhorn_attention, q, k, weights, **EXACT), expected, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, of_float64, torch.finfo(dtype).eps * of_float64.abs() + 1e-5)


def test_types_may_differ_under_autocast():
    q, k = rows(9, 13)
    q = q.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        P = sinkhorn_attention(q, k, **EXACT)
    assert_close(P, reference.sinkhorn_attention(*in_float64(q, k)), 1e-5)


def test_input_is_left_alone():
    """Rows taken as given are read where they are."""
    q, k = rows(9, 13)
    q_before, k_before = q.clone(), k.clone()
    weights = [torch.ones(9), torch.ones(13)]
    gradients(sinkhorn_attention, q, k, weights, normalize=False, **POTENTIALS, **EXACT)
    assert torch.equal(q, q_before) and torch.equal(k, k_before)


def test_auto_takes_the_cpu_kernels_and_float64_the_reference():
    q, k = rows(33, 13)
    assert torch.equal(sinkhorn_attention(q, k), sinkhorn_attention(q, k, backend="cpu"))
    P = sinkhorn_attention(*in_float64(q, k))
    assert P.dtype == torch.float64 and torch.equal(P, reference.sinkhorn_attention(*in_float64(q, k)))


def test_bitwise_repeatable():
    q, k = rows(131, 139)
    weights = [torch.randn(131, 139, generator=torch.Generator().manual_seed(5))]
    first = [sinkhorn_attention(q, k, **EXACT), *gradients(sinkhorn_attention, q, k, weights, **EXACT)]
    again = [sinkhorn_attention(q, k, **EXACT), *gradients(sinkhorn_attention, q, k, weights, **EXACT)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("keys", [True, False])
def test_products_beyond_float32_are_refused(keys):
    """Rows that are not normalised may have scores that are not numbers: no zeros for an answer."""
    q = 3e19 * torch.eye(4, 5)
    k = q.clone() if keys else None
    with pytest.raises(
        ValueError, match=r"products of q and k over epsilon=0.05 may be 1\.8e\+4[12], and float32 holds"
    ):
        sinkhorn_attention(q * 1e1, k, normalize=False, backend="cpu")
    assert sinkhorn_attention(q * 1e-2, k, normalize=False, backend="cpu").isfinite().all()
    assert sinkhorn_attention(q * 1e18, k, backend="cpu").isfinite().all()
