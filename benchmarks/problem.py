"""The data of a benchmark, its float64 truth, and the work that no implementation can leave out.

Letters are those of bam_kernels/layout.py. Scores are in the public order of columns unless said otherwise.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bam_kernels import reference
from bam_kernels.layout import Layout
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK, OneRank
from bam_kernels.simulated import SimulatedRanks

IMAGES_PER_CLUSTER = 16


class Images:
    """Images whose embeddings lie in clusters with a power-law spectrum; two have the given cosine in the mean."""

    def __init__(self, images: int, D: int, device: torch.device, *, cosine: float = 0.0, seed: int = 0) -> None:
        self.cosine, self.generator = cosine, torch.Generator(device).manual_seed(seed)
        self.spectrum = torch.arange(1, D + 1, device=device, dtype=torch.float32) ** -0.5
        centres = self._draw(max(images // IMAGES_PER_CLUSTER, 2))
        cluster = torch.randint(len(centres), (images,), generator=self.generator, device=device)
        self.means = self._draw(images).mul_(0.7).add_(centres[cluster])
        self.means -= self.means.mean(0)
        self.common = torch.nn.functional.normalize(self._draw(1), dim=-1)

    def views(self, count: int, images: int | None = None) -> Tensor:
        """(count, images, D) float32 embeddings, their lengths between 1 and 3, of the first images or of all."""
        means = self.means[:images]
        x = self._draw(count, len(means)).mul_(0.4).add_(means)
        x.div_(x.norm(dim=-1, keepdim=True)).mul_(math.sqrt(1 - self.cosine))
        x.add_(self.common, alpha=math.sqrt(self.cosine))
        return x.mul_(1 + 2 * torch.rand(count, len(means), 1, generator=self.generator, device=x.device))

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, len(self.spectrum), generator=self.generator, device=self.spectrum.device)
        return drawn.mul_(self.spectrum)


def parse_shape(text: str) -> tuple[int, int, int]:
    """ "2048x8192x256" -> M, N, D."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"shapes: a shape is MxNxD, three positive integers, got {text!r}")
    M, N, D = map(int, parts)
    return M, N, D


def layout_of(M: int, N: int, D: int, *, V: int, L: int, T: int, R: int = 0) -> Layout:
    """One process, or rank 0's share of W ranks where M rows alone have fewer than N keys. R: a teacher's views."""
    if M % V:
        raise ValueError(f"shapes: M={M} rows are not a multiple of views={V}")
    B = M // V
    if N % (T * B):
        raise ValueError(f"shapes: N={N} keys are not a multiple of key_views * B = {T} * {B}")
    if max(L, T) > V:
        raise ValueError(f"target_views={L} and key_views={T} must be at most views={V}")
    if R and not max(L, T) <= R <= V:
        raise ValueError(f"teacher_views={R} must be at least target_views={L} and key_views={T}, at most views={V}")
    return Layout(B=B, V=V, L=L, T=T, D=D, R=R, W=N // (T * B))


@dataclass(frozen=True)
class Problem:
    """student (M, D) and teacher (R*B, D) or None: rank 0's embeddings; keys (N, D): unit rows of all ranks.

    Of W > 1 ranks the others are simulated: their keys are given, reductions stay local.
    """

    layout: Layout
    options: Options
    student: Tensor
    teacher: Tensor | None
    keys: Tensor

    @staticmethod
    def made(layout: Layout, options: Options, device: torch.device, *, cosine: float = 0.0) -> "Problem":
        V, B, T, D = layout.V, layout.B, layout.T, layout.D
        images = Images(B * layout.W, D, device, cosine=cosine)
        keys = images.views(T)
        student = torch.cat((keys[:, :B], images.views(V - T, B)))
        teacher = None
        if layout.R:
            noise = Images(B * layout.W, D, device, seed=1)
            spread = 0.1 * math.sqrt(1 - cosine)
            keys += noise.views(T).mul_(spread)
            further = student[T : layout.R] + spread * noise.views(layout.R - T, B)
            teacher = torch.cat((keys[:, :B], further)).view(layout.R * B, D)
        unit = reference.normalize(keys.view(layout.N, D))[0]
        return Problem(layout, options, student.view(layout.M, D), teacher, unit)

    @cached_property
    def gathered_keys(self) -> Tensor:
        return self.layout.to_gathered(self.keys.T).T.contiguous()

    def ranks(self, *, keep_sent: bool = True) -> OneRank | SimulatedRanks:
        layout = self.layout
        return ONE_RANK if layout.W == 1 else SimulatedRanks(layout.W, 0, self.gathered_keys, keep_sent=keep_sent)

    def all_keys(self, own: Tensor) -> Tensor:
        """keys (N, D) with those of this rank, its own (T*B, D) unit rows, in the graph of `own`."""
        layout, D = self.layout, self.layout.D
        others = self.keys.view(layout.T, layout.W, layout.B, D)[:, 1:].to(own.dtype)
        return torch.cat((own.view(layout.T, 1, layout.B, D), others), 1).reshape(layout.N, D)

    def scores(self) -> tuple[Tensor, Tensor | None]:
        """Source scores (M, N) and a teacher's target scores (R*B, N), float32."""
        source = reference.normalize(self.student)[0] @ self.keys.T
        return source, None if self.teacher is None else reference.normalize(self.teacher)[0] @ self.keys.T


@dataclass(frozen=True)
class Truth:
    """P and the gradient with respect to the input, public order; None where there is none to be had."""

    P: Tensor | None
    gradient: Tensor | None


def relative_error(x: Tensor | None, truth: Tensor | None) -> float | None:
    """Frobenius norm of the difference over that of the truth; None where there is nothing to compare."""
    if x is None or truth is None:
        return None
    return ((x.to(truth) - truth).norm() / truth.norm()).item()


def truth_of_sinkhorn(scores: Tensor, layout: Layout, options: Options) -> Truth:
    log_K = scores.double() / options.epsilon
    log_K.masked_fill_(layout.positive_mask(len(scores), scores.device), -math.inf)
    f, g, _ = reference.log_sinkhorn(log_K, options.iterations)
    return Truth((log_K + f[:, None] + g).exp_(), None)


def truth_of_scores(source: Tensor, target: Tensor | None, layout: Layout, options: Options) -> Truth:
    leaf = source.double().requires_grad_()
    rows = leaf if target is None else target.double()
    loss, _ = reference.loss_from_scores(leaf, rows, layout, options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        return Truth(reference.log_targets(rows, layout, options)[0].exp_(), gradient)


def truth_of_embeddings(problem: Problem) -> Truth:
    leaf = problem.student.double().requires_grad_()
    teacher = None if problem.teacher is None else problem.teacher.double()
    named = loss_options(problem, keep_sent=False)
    (gradient,) = torch.autograd.grad(reference.bam_loss(leaf, teacher, **named), leaf)
    return Truth(reference.bam_targets(leaf.detach(), teacher, **named), gradient)


def loss_options(problem: Problem, *, keep_sent: bool = True) -> dict[str, object]:
    """The problem's options as `bam_loss` takes them."""
    layout, o = problem.layout, problem.options
    return {
        "views": layout.V,
        "target_views": layout.L,
        "key_views": layout.T,
        "temperature": o.temperature,
        "epsilon": o.epsilon,
        "iterations": o.iterations,
        "top_k": o.top_k,
        "group": problem.ranks(keep_sent=keep_sent),
    }


@dataclass(frozen=True)
class Work:
    """Bytes to and from memory, exponentials, and flops of matrix products.

    Bytes: each score once per step that depends on all of the step before. A cache may hold some of them: the floor
    takes the rate of a copy of the scores' own size.
    """

    bytes: int
    exps: int
    flops: int

    def floor_ms(self, copy_gbs: float, exp_per_s: float, gemm_gflops: float) -> float:
        """Products, then the slower of memory and exponentials, which can overlap."""
        return 1e3 * (self.flops / (gemm_gflops * 1e9) + max(self.bytes / (copy_gbs * 1e9), self.exps / exp_per_s))


def sinkhorn_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """The first column step, then per iteration a row step and, from the same read, the next column step."""
    reads = iterations + 1
    return Work(reads * layout.M * layout.N * score_bytes, reads * layout.M * layout.N, 0)


def loss_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """`iterations` reads of the target problem's rows; then target rows and source rows read once, G written.

    The last row step is part of that read. Without a teacher the target rows are source rows.
    """
    N, rows = layout.N, layout.R * layout.B or layout.M
    reads = iterations * rows + layout.M + (layout.L * layout.B if layout.R else 0)
    exps = iterations * rows + layout.L * layout.B + layout.M
    return Work((reads * score_bytes + layout.M * 4) * N, exps * N, 0)


def whole_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """From scores, and the products: scores 2MND (a teacher's too), dz 2MND, without a teacher dk 2MND.

    Where the keys are the first N rows, dz and dk of those rows are one product with G + Gᵀ.
    """
    scores = loss_work(layout, iterations, score_bytes)
    M, N, D = layout.M, layout.N, layout.D
    third = layout.R * layout.B if layout.R else M - N if layout.W == 1 else M
    products = (2 * M + third) * N
    return Work(scores.bytes, scores.exps, 2 * products * D)


def products_work(layout: Layout) -> Work:
    """Scores, dz = G k, and dk = Gᵀ z or, with a teacher, the target scores."""
    third = layout.R * layout.B if layout.R else layout.M
    return Work(0, 0, 2 * (2 * layout.M + third) * layout.N * layout.D)
