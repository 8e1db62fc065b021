"""Derivatives that every backend's kernels must have, and those that must be an error and never silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import features
from torch import Tensor, func

from bam_kernels import BAMLoss, bam_loss, bam_targets, sinkhorn_attention

Function = Callable[[Tensor], Tensor]


def functions(device: torch.device, **options: Any) -> dict[str, Function]:
    """(2, 6, 5) -> a number, by the loss and by a differentiable attention."""
    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).to(device)

    def attention(z: Tensor) -> Tensor:
        return (sinkhorn_attention(z[0], z[1], differentiable=True, **options) * weights.to(z.dtype)).sum()

    return {"bam_loss": lambda z: bam_loss(z, **options), "sinkhorn_attention": attention}


def twice(f: Function) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Ways to ask for a derivative of the gradient: of z and a direction t."""

    def through_a_model(z: Tensor, t: Tensor) -> Tensor:
        weight = torch.eye(5, dtype=z.dtype, device=z.device, requires_grad=True)
        (g,) = torch.autograd.grad(f((z @ weight).tanh()), weight, create_graph=True)
        return torch.autograd.grad((g * t[0, :5]).sum(), weight)[0]

    def penalty(z: Tensor, t: Tensor) -> Tensor:
        x = z.clone().requires_grad_()
        loss = f(x)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.norm()).backward()
        return x.grad

    functional = torch.autograd.functional
    return {
        "through a model": through_a_model,
        "gradient penalty": penalty,
        "functional.hessian": lambda z, t: functional.hessian(f, z),
        "functional.hvp": lambda z, t: functional.hvp(f, z, t)[1],
        "functional.vhp": lambda z, t: functional.vhp(f, z, t)[1],
        "grad of grad": lambda z, t: func.grad(lambda x: (func.grad(f)(x) * t).sum())(z),
        "jacrev of jacrev": lambda z, t: func.jacrev(func.jacrev(f))(z),
    }


def forward(f: Function) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Ways to ask for a forward-mode derivative."""

    def dual(z: Tensor, t: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            out = f(torch.autograd.forward_ad.make_dual(z, t))
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    return {
        "jvp": lambda z, t: func.jvp(f, (z,), (t,))[1],
        "jacfwd": lambda z, t: func.jacfwd(f)(z),
        "hessian": lambda z, t: func.hessian(f)(z),
        "forward over reverse": lambda z, t: func.jvp(func.grad(f), (z,), (t,))[1],
        "linearize": lambda z, t: func.linearize(f, z)[1](t),
        "dual numbers": dual,
    }


FEW = ("through a model", "functional.hessian", "jvp")


def check_errors(device: torch.device, ways: tuple[str, ...] = (), **options: Any) -> None:
    """No derivative is silently zero or wrong where the kernels have none; asked for in these ways, or in all."""
    z, t = features(2, 6, 5).to(device), features(2, 6, 5, seed=1).to(device)

    def chosen(asked: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(way, ask) for way, ask in asked.items() if not ways or way in ways]

    for name, f in functions(device, **options).items():
        for way, ask in chosen(twice(f)):
            with pytest.raises(RuntimeError, match="the gradient of a kernel is not differentiable"):
                pytest.fail(f"{name}, {way}: {ask(z, t)}")
        for way, ask in chosen(forward(f)):
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                pytest.fail(f"{name}, {way}: {ask(z, t)}")


def check_transforms(device: torch.device, rtol: float = 0.0, **options: Any) -> None:
    """torch.func's transforms give what autograd gives for one tensor after another, bit for bit without rtol."""

    def equal(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool(((a - b).abs() <= rtol * b.abs().max()).all())

    zs = features(3, 12, 5).view(3, 2, 6, 5).to(device)

    def plain(f: Function, z: Tensor) -> Tensor:
        x = z.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    for f in functions(device, **options).values():
        grads = torch.stack([plain(f, z) for z in zs])
        assert equal(func.grad(f)(zs[0]), grads[0])
        assert equal(func.jacrev(f)(zs[0]), grads[0])
        assert equal(func.vmap(f)(zs), torch.stack([f(z) for z in zs]))
        assert equal(func.vmap(func.grad(f))(zs), grads)
        assert equal(func.grad(lambda x, f=f: func.vmap(f)(x).sum())(zs), grads)
        batch = zs.clone().requires_grad_()
        func.vmap(f)(batch).sum().backward()
        assert equal(batch.grad, grads)
        assert equal(func.vmap(f, in_dims=3)(zs.movedim(0, 3)), torch.stack([f(z) for z in zs]))
        assert equal(torch.autograd.functional.jacobian(f, zs[0], vectorize=True), grads[0])
    targets = torch.stack([bam_targets(z, **options) for z in zs])
    assert equal(func.vmap(lambda z: bam_targets(z, **options))(zs), targets)
    assert not func.jvp(lambda z: bam_targets(z, **options), (zs[0],), (zs[1],))[1].any()

    jacobian = func.jacrev(lambda q: sinkhorn_attention(q, differentiable=True, **options)[:2])(zs[0, 0])
    q = zs[0, 0].clone().requires_grad_()
    P = sinkhorn_attention(q, differentiable=True, **options)
    rows = [torch.autograd.grad(P[i, j], q, retain_graph=True)[0] for i in range(2) for j in range(6)]
    assert equal(jacobian.view(12, 6, 5), torch.stack(rows))

    layer = torch.nn.Linear(5, 4).to(device)
    loss = BAMLoss(return_stats=True, **options)

    def of_parameters(parameters: dict[str, Tensor]) -> tuple[Tensor, Any]:
        return loss(func.functional_call(layer, parameters, (zs[0],)))

    found, stats = func.grad(of_parameters, has_aux=True)(dict(layer.named_parameters()))
    loss(layer(zs[0]))[0].backward()
    assert all(equal(found[name], p.grad) for name, p in layer.named_parameters())
    assert stats.kl.isfinite()


def check_scale_of_the_gradient(device: torch.device, **options: Any) -> None:
    """The loss's gradient is linear in what comes in, and differentiable by that."""
    z = features(2, 6, 5).to(device).requires_grad_()
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(bam_loss(z, **options), z)
    (scaled,) = torch.autograd.grad(bam_loss(z, **options) * scale, z, create_graph=True)
    assert torch.allclose(scaled, 3 * g)
    assert torch.allclose(torch.autograd.grad((scaled * g).sum(), scale)[0], (g * g).sum())
