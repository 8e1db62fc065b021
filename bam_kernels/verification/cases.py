"""Problems of fixed seed that force every form of the GPU kernels: inputs, float64 results, and the calls to compare.

tests/verification/test_forms.py lists the forms, and fails if no problem forces one of them. layout.py defines the
dimension letters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..loss import bam_loss, bam_targets
from ..ranks import ONE_RANK
from ..simulated import SimulatedRanks
from ..sinkhorn import sinkhorn_attention
from ..ways import WAYS

GRADIENT_SCALE = 1024.0  # keeps gradients of float16 embeddings within the normal numbers of float16


class Bound(NamedTuple):
    """Largest error of a number, as a share of the number and of the largest number beside it."""

    relative: float
    floor: float


def _bounds(loss: float, gradient: float, plan: float) -> dict[str, Bound]:
    """Bounds of all results. Numbers of a plan are of any size, and each must be right; sums may cancel."""
    of_loss, of_gradient, of_plan = Bound(loss, 0.0), Bound(gradient, gradient), Bound(plan, 1e-9)
    return {
        "loss": of_loss,
        "loss without gradient": of_loss,
        "gradient": of_gradient,
        "targets": of_plan,
        "weighted sum": of_gradient,
        "gradients": of_gradient,
        "plan": of_plan,
    }


# Three times the largest errors of emulated CUDA kernels and interpreted Triton kernels, or more; tensor cores cut
# float32 to 10 bits of mantissa, where float16 is rounded.
BOUNDS = {
    torch.float32: _bounds(loss=5e-6, gradient=2.5e-5, plan=1e-4),
    torch.float16: _bounds(loss=2e-4, gradient=8e-3, plan=3.5e-2),
    torch.bfloat16: _bounds(loss=2e-4, gradient=1e-2, plan=3.5e-2),
    "tf32": _bounds(loss=5e-3, gradient=3e-2, plan=8e-2),
}


class Variant(NamedTuple):
    """Dtype of embeddings, and options of the computation alone. Float32 without "exact" is rounded in products."""

    dtype: torch.dtype
    options: dict[str, Any]
    bounds: dict[str, Bound]


@dataclass(frozen=True)
class Problem:
    """Embeddings of one of W simulated ranks, on which `bam_loss` and `bam_targets` are computed.

    sizes, toy      pairs of numbers B and W
    budget          share of the bytes of float32 target scores within which the slab engine computes it a second time
    top_k           for an even number of images it is computed with the largest weights alone as well
    tf32            the flash engine also computes it with products that tensor cores round
    only_cuda       it forces forms of CUDA kernels alone
    """

    V: int
    R: int
    D: int
    sizes: tuple[tuple[int, int], ...]
    toy: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float16
    options: dict[str, Any] = field(default_factory=dict)
    budget: float = 0.0
    top_k: bool = False
    tf32: bool = False
    only_cuda: bool = False

    @property
    def T(self) -> int:
        return min(self.R or self.V, 2)

    def variants(self, way: str, B: int, W: int) -> Iterator[tuple[dict[str, Any], list[Variant]]]:
        """Options that decide what is right, each with the variants that a way computes."""
        budgets: list[dict[str, Any]] = [{}]
        if self.budget and way != "flash":
            rows, keys = (self.R or self.V) * B, self.T * B * W
            budgets.append({"memory_budget": int(self.budget * 4 * rows * keys)})
        sixteen_bit = BOUNDS[self.dtype if self.dtype != torch.float32 else torch.float16]
        variants = [
            Variant(torch.float32, {"precision": "exact"}, BOUNDS[torch.float32]),
            Variant(self.dtype, {}, sixteen_bit),
        ]
        if self.tf32 and way == "flash":
            variants.append(Variant(torch.float32, {"regather": True}, BOUNDS["tf32"]))
        options = [self.options]
        if self.top_k and way != "flash" and B * W % 2 == 0:
            # All keys of the image close to a row's own. With this epsilon the weights of all others are far smaller,
            # so that rounding does not decide which are kept.
            options.append(self.options | {"top_k": self.T, "epsilon": 0.2})
        for right in options:
            yield right, [v._replace(options=v.options | budget) for v in variants for budget in budgets]


MASK_OFF = {"mask_positives": False}
PROBLEMS = {
    # All iterations in one launch of CUDA kernels, over a cluster of blocks. Rows of 130 and 42 columns are not a whole
    # number of 16 bytes.
    "one launch": Problem(
        3, 0, 64, ((64, 1), (65, 1), (20, 1), (21, 1)), ((4, 1), (10, 1)), budget=0.6, top_k=True, tf32=True
    ),
    "teacher": Problem(4, 2, 128, ((40, 48),), ((6, 3),), budget=0.65),
    "no mask": Problem(
        3, 2, 200, ((40, 72),), ((6, 3),), torch.bfloat16, MASK_OFF | {"target_rows": "student"}, budget=0.4
    ),
    "crops": Problem(5, 2, 300, ((26, 11),), ((8, 3),), torch.float32, {"epsilon": 0.02}, budget=0.6),
    "one view": Problem(1, 0, 33, ((33, 3),), ((7, 3),), options=MASK_OFF),
    # 7650 and 5610 keys, five targets an image: less room on chip for the rows of an image than elsewhere.
    "many targets": Problem(
        5, 0, 64, ((17, 225), (17, 165)), ((6, 3),), options={"target_views": 5, "key_views": 2}, only_cuda=True
    ),
    # 16,048 and 16,086 keys: rows over clusters of blocks on Hopper and newer, long rows elsewhere.
    "rows over clusters": Problem(3, 2, 64, ((17, 472), (21, 383)), ((4, 9), (8, 65), (9, 57)), top_k=True),
    # 140,160 and 131,094 keys: beyond clusters of blocks.
    "long rows": Problem(2, 2, 64, ((8, 8760), (9, 7283)), ((4, 9), (9, 61)), top_k=True),
}
ATTENTION = "attention"  # beside these problems: `sinkhorn_attention` and its gradient
Results = dict[str, Tensor]


class Run(NamedTuple):
    """One way to compute the results of a case, and how far they may be off."""

    label: str
    compute: Callable[[], Results]
    bounds: dict[str, Bound]


class Case(NamedTuple):
    """One size of a problem with options: its float64 results, and the runs that must agree with them."""

    truth: Callable[[], Results]
    runs: list[Run]


def names(way: str) -> list[str]:
    """Names of the problems of a way."""
    names = [name for name, problem in PROBLEMS.items() if way == "cuda" or not problem.only_cuda]
    return [*names, *([ATTENTION] if way != "flash" else [])]


def cases(name: str, way: str, device: torch.device, *, toy: bool) -> Iterator[Case]:
    """Cases of a problem on `device`, in toy sizes or full sizes."""
    if name == ATTENTION:
        yield from _attention_cases(way, device, toy)
        return
    problem = PROBLEMS[name]
    sizes = problem.toy if toy else problem.sizes
    # Forms of Triton kernels do not follow from sizes, and each size takes many compilations.
    for B, W in sizes if way == "cuda" else sizes[:1]:
        yield from _loss_cases(problem, B, W, way, device)


def _loss_cases(problem: Problem, B: int, W: int, way: str, device: torch.device) -> Iterator[Case]:
    z, y = inputs(problem, B, W)
    keys = torch.nn.functional.normalize(embeddings(problem.T, B * W, problem.D, 30), dim=-1)
    keys = keys.unflatten(1, (W, B)).transpose(0, 1).flatten(0, 2)  # in gathered order

    def ranks(keys: Tensor) -> Any:
        return SimulatedRanks(W, rank_of(W), keys, keep_sent=True) if W > 1 else ONE_RANK

    exact = z.double(), y.double() if y is not None else None, ranks(keys.double())
    group = ranks(keys.to(device))
    for right, variants in problem.variants(way, B, W):
        runs = []
        for variant in variants:
            on_device = z.to(device, variant.dtype), y.to(device, variant.dtype) if y is not None else None
            options = right | variant.options
            described = [f"B={B}", f"W={W}", str(variant.dtype).removeprefix("torch.")]
            described += [f"{key}={value}" for key, value in options.items()]
            options |= WAYS[way]._asdict()
            runs.append(Run(", ".join(described), partial(_computed, *on_device, group, options), variant.bounds))
        yield Case(partial(_results, reference.bam_loss, reference.bam_targets, *exact, right), runs)


def _computed(z: Tensor, y: Tensor | None, group: Any, options: dict[str, Any]) -> Results:
    """Results of the kernels."""
    with rounded_products() if z.dtype == torch.float32 else nullcontext():
        return _results(bam_loss, bam_targets, z, y, group, options)


@contextmanager
def rounded_products() -> Iterator[None]:
    """Allow products of float32 to be rounded in the block, so that the kernels take float32 rows in 16 bit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rank_of(W: int) -> int:
    """The rank that is simulated: neither the first nor the last of more than two."""
    return W // 2


def inputs(problem: Problem, B: int, W: int) -> tuple[Tensor, Tensor | None]:
    """Student, and teacher or None, of the simulated rank."""
    first = rank_of(W) * B

    def own(views: int, seed: int) -> Tensor:
        return embeddings(views, B * W, problem.D, seed)[:, first : first + B].to(problem.dtype)

    return own(problem.V, 10), own(problem.R, 20) if problem.R else None


def _results(
    loss: Callable[..., Any],
    targets: Callable[..., Any],
    z: Tensor,
    y: Tensor | None,
    group: Any,
    options: dict[str, Any],
) -> Results:
    """Loss with and without gradient, gradient and targets."""
    student, named = z.clone().requires_grad_(), options | {"group": group}
    found = loss(student, y, **named)
    (dz,) = torch.autograd.grad(found * GRADIENT_SCALE, student)
    return {
        "loss": found.detach(),
        "loss without gradient": loss(z, y, **named),
        "gradient": dz.double() / GRADIENT_SCALE,
        "targets": targets(z, y, **named),
    }


def _attention_cases(way: str, device: torch.device, toy: bool) -> Iterator[Case]:
    """Square attention without its own keys, and attention to many keys: a weighted sum of P, its gradients, and P."""
    attend, D = partial(sinkhorn_attention, backend=WAYS[way].backend, precision="exact"), 40
    for m, n in ((6, 0), (3, 520)) if toy else ((61, 0), (8, 16_014)):
        q = embeddings(1, 2 * m, D, 10)[0, ::2]  # one of each pair: no row has next to all its weight in one key
        k = embeddings(1, n, D, 20)[0] if n else None
        weights = embeddings(1, m, n or m, 30)[0]
        tensors = (q, k, weights)
        run = Run(f"{m} rows, {n or m} keys", partial(_attended, attend, device, *tensors), BOUNDS[torch.float32])
        yield Case(partial(_attended, reference.sinkhorn_attention, torch.float64, *tensors), [run])


def _attended(
    attend: Callable[..., Any], place: torch.device | torch.dtype, q: Tensor, k: Tensor | None, weights: Tensor
) -> Results:
    leaves = [x.to(place).requires_grad_() for x in (q, k) if x is not None]
    P = attend(*leaves, mask="self" if k is None else "none", differentiable=True)
    total = (P * weights.to(P)).sum()
    gradients = torch.cat(torch.autograd.grad(total, leaves))
    return {"weighted sum": total.detach(), "gradients": gradients, "plan": P.detach()}


def embeddings(views: int, images: int, D: int, seed: int) -> Tensor:
    """Embeddings (views, images, D) float32, on the CPU: images 2i and 2i + 1 are close, views of an image closer."""

    def rows(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(*shape, D, generator=generator, dtype=torch.float32, device="cpu")
        return torch.nn.functional.normalize(x, dim=-1)

    pairs = rows(0, 1, -(-images // 2)).repeat_interleave(2, 1)[:, :images]
    return 3 * (pairs + 0.4 * rows(seed + 1, 1, images) + 0.3 * rows(seed + 2, views, images))
