"""A benchmark's data, its result in float64, and the least work (bytes, exponentials, flops) that computes it.

Letters of dimensions are defined in bam_kernels/layout.py. Columns of scores are in public order unless stated.
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
    """Random images whose embeddings form clusters with a power-law spectrum and have a given mean cosine."""

    def __init__(self, images: int, D: int, device: torch.device, *, cosine: float = 0.0, seed: int = 0) -> None:
        self.cosine, self.generator = cosine, torch.Generator(device).manual_seed(seed)
        self.spectrum = torch.arange(1, D + 1, device=device, dtype=torch.float32) ** -0.5
        centres = self._draw(max(images // IMAGES_PER_CLUSTER, 2))
        cluster = torch.randint(len(centres), (images,), generator=self.generator, device=device)
        self.means = self._draw(images).mul_(0.7).add_(centres[cluster])
        self.means -= self.means.mean(0)
        self.common = torch.nn.functional.normalize(self._draw(1), dim=-1)

    def views(self, count: int, images: int | None = None) -> Tensor:
        """Draw (count, images, D) float32 embeddings with norms from 1 to 3, of the first `images` images or of all."""
        means = self.means[:images]
        x = self._draw(count, len(means)).mul_(0.4).add_(means)
        x.div_(x.norm(dim=-1, keepdim=True)).mul_(math.sqrt(1 - self.cosine))
        x.add_(self.common, alpha=math.sqrt(self.cosine))
        return x.mul_(1 + 2 * torch.rand(count, len(means), 1, generator=self.generator, device=x.device))

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, len(self.spectrum), generator=self.generator, device=self.spectrum.device)
        return drawn.mul_(self.spectrum)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read M, N, D from text such as "2048x8192x256"."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"shapes: a shape is MxNxD, three positive integers, got {text!r}")
    M, N, D = map(int, parts)
    return M, N, D


def layout_of(M: int, N: int, D: int, *, V: int, L: int, T: int, R: int = 0) -> Layout:
    """The layout of one process, or of rank 0 among W ranks if there are more keys than its own T*B.

    R is the number of a teacher's views, 0 without a teacher.
    """
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
    """Rank 0's embeddings, student (M, D) and teacher (R*B, D) or None, and the unit keys (N, D) of all ranks.

    With W > 1 the other ranks are simulated: their keys are here already, and reductions stay local.
    """

    layout: Layout
    options: Options
    student: Tensor
    teacher: Tensor | None
    keys: Tensor

    @staticmethod
    def generate(layout: Layout, options: Options, device: torch.device, *, cosine: float = 0.0) -> "Problem":
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
        """All keys (N, D), in which this rank's unit rows `own` (T*B, D) stay part of the autograd graph."""
        layout, D = self.layout, self.layout.D
        others = self.keys.view(layout.T, layout.W, layout.B, D)[:, 1:].to(own.dtype)
        return torch.cat((own.view(layout.T, 1, layout.B, D), others), 1).reshape(layout.N, D)

    def scores(self) -> tuple[Tensor, Tensor | None]:
        """Float32 source scores (M, N) and, with a teacher, target scores (R*B, N)."""
        source = reference.normalize(self.student)[0] @ self.keys.T
        return source, None if self.teacher is None else reference.normalize(self.teacher)[0] @ self.keys.T


@dataclass(frozen=True)
class Truth:
    """Target P and the gradient by the input, columns in public order; None for what does not exist."""

    P: Tensor | None
    gradient: Tensor | None


def relative_error(x: Tensor | None, truth: Tensor | None) -> float | None:
    """|x - truth| / |truth| in Frobenius norms; None if either is missing."""
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
    """Keyword arguments of `bam_loss` for the problem."""
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
    """Bytes to and from memory, exponentials, and flops of matrix products that a computation cannot avoid.

    A step that needs all results of the step before reads each score once. A cache may hold some scores, so the floor
    uses the rate of a copy as large as the scores.
    """

    bytes: int
    exps: int
    flops: int

    def floor_ms(self, copy_gbs: float, exp_per_s: float, gemm_gflops: float) -> float:
        """Least time: the products, then the longer of memory traffic and exponentials, which can overlap."""
        return 1e3 * (self.flops / (gemm_gflops * 1e9) + max(self.bytes / (copy_gbs * 1e9), self.exps / exp_per_s))


def sinkhorn_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """Work of Sinkhorn on (M, N) scores: one read for the first column step, then one read per iteration.

    Each later read serves a row step and the next column step.
    """
    reads = iterations + 1
    return Work(reads * layout.M * layout.N * score_bytes, reads * layout.M * layout.N, 0)


def loss_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """Work from scores to the loss and G: `iterations` reads for Sinkhorn, then one read of all rows, and G written.

    The last read includes the last row step. Without a teacher the target rows are the source rows.
    """
    N, rows = layout.N, layout.R * layout.B or layout.M
    reads = iterations * rows + layout.M + (layout.L * layout.B if layout.R else 0)
    exps = iterations * rows + layout.L * layout.B + layout.M
    return Work((reads * score_bytes + layout.M * 4) * N, exps * N, 0)


def whole_work(layout: Layout, iterations: int, score_bytes: int = 4) -> Work:
    """Work from embeddings to the loss and dz: the result of `loss_work` and three products of 2MND flops.

    The products are the source scores, dz, and the teacher's target scores or, without a teacher, dk. Without a teacher
    this rank's keys are its first rows, for which dz and dk are one product with G + Gᵀ.
    """
    scores = loss_work(layout, iterations, score_bytes)
    M, N, D = layout.M, layout.N, layout.D
    own = N // layout.W
    third = layout.R * layout.B * N if layout.R else M * N - own * own
    products = 2 * M * N + third
    return Work(scores.bytes, scores.exps, 2 * products * D)


def products_work(layout: Layout) -> Work:
    """Work of the products alone: scores, dz = G k, and dk = Gᵀ z or, with a teacher, the target scores."""
    third = layout.R * layout.B if layout.R else layout.M
    return Work(0, 0, 2 * (2 * layout.M + third) * layout.N * layout.D)
