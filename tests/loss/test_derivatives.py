"""Derivatives of every order and mode: the reference's against finite differences, the kernels' or their error."""

import pytest
import torch
from derivative_tests import check_errors, check_scale_of_the_gradient, check_transforms, forward, functions, twice
from problems import features, needs_cpu_kernels
from recorded_operators import RecordedOperators
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, sinkhorn_attention
from bam_kernels.simulated import run_ranks

CPU = torch.device("cpu")
OPTIONS = [{}, {"precision": "exact"}, {"backend": "reference"}]


@needs_cpu_kernels
@pytest.mark.parametrize(
    "options", [{"backend": "cpu"}, {"backend": "auto"}, {"backend": "cpu", "iterations": 1}], ids=str
)
def test_what_the_kernels_have_not_is_an_error(options):
    check_errors(CPU, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transforms(options):
    rtol = 2e-6 if options.get("backend") == "reference" else 0.0  # batched operations of torch round otherwise
    check_transforms(CPU, rtol, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_linear_in_what_comes_in(options):
    check_scale_of_the_gradient(CPU, **options)


@needs_cpu_kernels
def test_a_float16_gradient_is_rounded_in_one_launch():
    """Unless it is recorded. torch's transforms give the same."""
    z, launched = features(2, 6, 5).half().requires_grad_(), []

    def f(x: Tensor) -> Tensor:
        return bam_loss(x, backend="cpu")

    loss, scale = f(z), torch.tensor(3.0, requires_grad=True)
    with RecordedOperators(launched):
        (g,) = torch.autograd.grad(loss, z, scale.detach(), retain_graph=True)
    assert [name for name in launched if name != "detach"] == ["rounded_product"]
    (recorded,) = torch.autograd.grad(loss, z, scale, create_graph=True)
    assert g.dtype == torch.float16 and torch.equal(recorded, g)
    assert torch.autograd.grad(recorded.float().sum(), scale)[0] != 0
    batched = torch.autograd.grad(loss, z, torch.tensor([1.0, 3.0]), is_grads_batched=True)[0]
    assert torch.equal(batched[1], g)
    zs = torch.stack([z.detach(), 2 * z.detach()]).requires_grad_()
    torch.func.vmap(f)(zs).backward(torch.tensor([3.0, 0.0]))
    assert torch.equal(zs.grad[0], g) and not zs.grad[1].any()
    assert torch.equal(torch.func.grad(lambda x: 3 * f(x))(z.detach()), g)


def frozen(P: Tensor, z: Tensor, tau: float = 0.1) -> Tensor:
    """The loss of two views with given targets P (12, 12), written out."""
    unit = z.flatten(0, 1) / z.flatten(0, 1).norm(dim=1, keepdim=True)
    image = torch.arange(12) % 6
    mask = image[:, None] == image
    log_A = (unit @ unit.T / tau).masked_fill(mask, -torch.inf).log_softmax(1).masked_fill(mask, 0.0)
    return -(P.roll(6, 0) * log_A).sum() / 12  # view 0 meets the targets of view 1, and view 1 those of view 0


def differences(f, z: Tensor, t: Tensor) -> Tensor:
    """The derivative of f along t, to fourth order."""
    h = 1e-3
    return (8 * (f(z + h * t) - f(z - h * t)) - (f(z + 2 * h * t) - f(z - 2 * h * t))) / (12 * h)


def gradient(f, z: Tensor) -> Tensor:
    x = z.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def problem() -> tuple[Tensor, Tensor, dict]:
    """z, a direction, and by name the reference and what it must be along the direction: targets stay constants."""
    z, t = features(2, 6, 5).double(), features(2, 6, 5, seed=1).double()
    given = functions(CPU, backend="reference")
    P = bam_targets(z)
    return z, t, {
        "bam_loss": (given["bam_loss"], lambda x: frozen(P, x)),
        "sinkhorn_attention": (given["sinkhorn_attention"],) * 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bam_loss", "sinkhorn_attention"])
@pytest.mark.parametrize("way", ["functional.hvp", "functional.vhp", "functional.hessian", "grad of grad",
                                 "jacrev of jacrev"])  # fmt: skip
def test_second_derivatives_of_the_reference(way, name):
    z, t, both = problem()
    f, truth = both[name]
    assert f(z).item() == pytest.approx(truth(z).item(), abs=1e-12)
    expected = differences(lambda x: gradient(truth, x), z, t)
    actual = twice(f)[way](z, t)
    if actual.dim() > 3:
        actual = (actual.view(60, 60) @ t.flatten()).view_as(z)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["bam_loss", "sinkhorn_attention"])
@pytest.mark.parametrize("way", ["jvp", "jacfwd", "linearize", "dual numbers", "hessian", "forward over reverse"])
def test_forward_mode_of_the_reference(way, name):
    z, t, both = problem()
    f, truth = both[name]
    of_gradient = way in ("hessian", "forward over reverse")
    expected = differences((lambda x: gradient(truth, x)) if of_gradient else truth, z, t)
    actual = forward(f)[way](z, t)
    if way == "jacfwd":
        actual = (actual * t).sum()
    if way == "hessian":
        actual = (actual.view(60, 60) @ t.flatten()).view_as(z)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_through_a_model_with_the_reference():
    """A gradient penalty and a Hessian-vector product of weights, in float32 and float64."""
    z, t = features(2, 6, 5), features(2, 6, 5, seed=1)
    for way in ("through a model", "gradient penalty"):
        single, double = (twice(functions(CPU, backend="reference")["bam_loss"])[way](x, y)
                          for x, y in ((z, t), (z.double(), t.double())))  # fmt: skip
        assert (single - double).abs().max() <= 1e-5 * double.abs().max()


@pytest.mark.parametrize("differentiable", [False, True])
def test_statistics_and_constants_have_no_tangents(differentiable):
    z, t = features(2, 6, 5).double(), features(2, 6, 5, seed=1).double()

    def stats(x: Tensor) -> Tensor:
        return torch.stack(list(vars(bam_loss(x, return_stats=True)[1]).values()))

    assert not torch.func.jvp(stats, (z,), (t,))[1].any()
    _, tangent = torch.func.jvp(lambda x: sinkhorn_attention(x[0], differentiable=differentiable), (z,), (t,))
    assert bool(tangent.any()) == differentiable


@pytest.mark.parametrize("name", ["bam_loss", "sinkhorn_attention"])
def test_second_derivatives_at_a_zero_row(name):
    """The gradient by an all-zero row is zero, and so is every derivative of that gradient."""
    z, t = features(2, 6, 5).double(), features(2, 6, 5, seed=1).double()
    z[0, 1] = 0
    f = functions(CPU, backend="reference")[name]
    for way in ("gradient penalty", "functional.hvp", "grad of grad"):
        found = twice(f)[way](z, t)
        assert found.isfinite().all() and not found[0, 1].any() and found.any()


@pytest.mark.parametrize("W", [1, 2, 3])
def test_second_derivatives_over_ranks(W):
    """Second derivatives of the sum of the ranks' losses: W times those of one process that holds all images."""
    z, t = features(2, 6, 5).double(), features(2, 6, 5, seed=1).double()

    def hvp(x: Tensor, direction: Tensor, **options) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(bam_loss(x, backend="reference", **options), x, create_graph=True)
        return torch.autograd.grad((g * direction).sum(), x)[0]

    def of_rank(group) -> Tensor:
        own = slice(group.rank * 6 // W, (group.rank + 1) * 6 // W)
        return hvp(z[:, own], t[:, own], group=group)

    whole = W * hvp(z, t)
    assert (torch.cat(run_ranks(W, of_rank), 1) - whole).abs().max() <= 1e-11 * whole.abs().max()
