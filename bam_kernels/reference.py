"""BAM in plain PyTorch: the specification, written to be read. Any float type, any device.

layout.py defines the dimension letters; tau is the temperature of the source attention, eps the Sinkhorn
regularisation. 16-bit input is computed in float32. Names and signatures equal those of the public functions. All
derivatives are autograd's, of any order, forward and reverse; the targets are constants in each derivative.

Source: Shalam and Korman, "Unsupervised Representation Learning by Balanced Self Attention Matching", ECCV 2024.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .agreement import agree_with_ranks
from .exchanges import ALONE, Exchanges
from .header import NonFinite
from .layout import Layout
from .operators import anchor_gradient, define, wants_gradient
from .options import AttentionOptions, Options, check_finite, options_of
from .precision import product
from .ranks import ranks_of
from .stats import BAMStats

NORM_FLOOR = 1e-12


def bam_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    views: int | None = None,
    target_views: int | None = None,
    key_views: int | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    top_k: int = 0,
    mask_positives: bool = True,
    target_rows: str = "teacher",
    group: Any = None,
    backend: str = "auto",
    engine: str = "auto",
    precision: str = "default",
    memory_budget: int | None = None,
    regather: bool = False,
    non_finite: str = "error",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BAMStats]:
    """loss = mean_{t<L} mean_{v != t} mean_i ( -Σ_j P_t,ij log A_v,ij ), differentiable by autograd.

    `bam_kernels.bam_loss` explains the options. `backend`, `engine` and `memory_budget` concern kernels; here they are
    only checked.
    """
    options = Options(
        views,
        target_views,
        key_views,
        temperature,
        epsilon,
        iterations,
        top_k,
        mask_positives,
        target_rows,
        group,
        backend,
        engine,
        precision,
        memory_budget,
        regather,
        non_finite,
    ).checked("bam_loss")
    return loss(student, teacher, options.layout("bam_loss", student, teacher), options, return_stats)


def loss(
    student: Tensor, teacher: Tensor | None, layout: Layout, options: Options, wants_stats: bool
) -> Tensor | tuple[Tensor, BAMStats]:
    """`bam_loss` after its arguments have been checked."""
    ranks = Exchanges(*ranks_of("bam_loss", options.group))
    try:
        source, target = _scores("bam_loss", student, teacher, layout, options, ranks)
    except NonFinite:
        loss = student.flatten().to(_dtype(student)).sum() * math.nan
        return (loss, BAMStats(*loss.detach().expand(6))) if wants_stats else loss
    loss, stats = loss_from_scores(source, target, layout, options, ranks, wants_stats=wants_stats)
    return (loss, stats) if stats is not None else loss


def loss_from_scores(
    source: Tensor,
    target: Tensor,
    layout: Layout,
    options: Options,
    ranks: Exchanges = ALONE,
    *,
    wants_stats: bool = False,
) -> tuple[Tensor, BAMStats | None]:
    """The loss and its statistics from source scores (M, N) and target scores (rows, N); P carries no gradient."""
    with torch.no_grad():
        log_P, column_residual = log_targets(target.detach(), layout, options, ranks)
        P = log_P.exp().view(layout.L, layout.B, layout.N)
    log_A = _log_source(source, layout, options).view(layout.V, layout.B, layout.N)
    loss = source.new_zeros(())
    for v in range(layout.V):
        for t in layout.target_terms(v):
            loss = loss - layout.pair_weight * (P[t] * log_A[v]).sum(-1).mean()
    if not wants_stats:
        return loss, None
    with torch.no_grad():
        return loss, _stats(loss.detach(), P, log_A.detach(), column_residual, layout, options)


def bam_targets(student: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
    """Targets P (L*B, N) of `bam_loss` with equal options; columns in public order (view, rank, image)."""
    resolved = options_of("bam_targets", options)
    return targets(student, teacher, resolved.layout("bam_targets", student, teacher), resolved)


@torch.no_grad()
def targets(student: Tensor, teacher: Tensor | None, layout: Layout, options: Options) -> Tensor:
    """`bam_targets` after its arguments have been checked."""
    ranks = Exchanges(*ranks_of("bam_targets", options.group))
    try:
        _, target = _scores("bam_targets", student.detach(), teacher, layout, options, ranks)
    except NonFinite:
        return student.new_full((layout.L * layout.B, layout.N), math.nan, dtype=_dtype(student))
    return log_targets(target, layout, options, ranks)[0].exp()


def _dtype(x: Tensor) -> torch.dtype:
    """Dtype of computation for input x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalise x over the last dimension, with norms of at least 1e-12; returns (unit rows, largest |x_i|).

    Norms are computed of x / max_i |x_i|, so that they neither overflow nor underflow. A row whose norm is below 1e-12
    has gradient 0.
    """
    most = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(most > 0, most, 1.0)
    small = _norm(x.detach() / scale) * scale < NORM_FLOOR
    scaled = torch.where(small, 1.0, x / scale)  # its norm has derivatives of every order
    return torch.where(small, x.detach() / NORM_FLOOR, scaled / _norm(scaled).to(x.dtype)), most


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)


def _check_finite(name: str, argument: str, x: Tensor) -> None:
    """Call `check_finite` through an operator, because x may be a fake tensor or an element of torch.func.vmap."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _finite_operator(x, name, argument)


_finite_operator = define(
    "check_finite(Tensor x, str name, str argument) -> ()",
    lambda x, name, argument: check_finite(name, argument, x),
    lambda x, name, argument: None,
)


def log_sinkhorn(log_K: Tensor, iterations: int, ranks: Exchanges = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn-Knopp in log space: log P_ij = log K_ij + f_i + g_j, columns first, rows last.

    Starts from f = 0; `iterations` times g_j = -log Σ_i exp(log K_ij + f_i), f_i = -log Σ_j exp(log K_ij + g_j).
    The sum over i runs over the rows of all ranks, of which each rank holds its own; the columns j are all keys.
    Returns f (m,), g (n,), and the column sums (n,) of P that entered the last column step (NaN if iterations = 1).
    """
    f = log_K.new_zeros(log_K.shape[0])
    g = log_K.new_full((log_K.shape[1],), math.nan)
    for _ in range(iterations):
        before, g = g, -_column_logsumexp(log_K + f[:, None], ranks)
        f = -torch.logsumexp(log_K + g, dim=1)
    return f, g, torch.exp(before - g)


def _column_logsumexp(x: Tensor, ranks: Exchanges) -> Tensor:
    """log Σ_i exp(x_ij) over the rows i of all ranks."""
    own = torch.logsumexp(x, dim=0)
    if ranks.W == 1:
        return own
    most = ranks.max(own)
    return most + torch.log(ranks.sum(torch.exp(own - most)))


def _embeddings(name: str, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Unit rows of student (M, D) and teacher (R*B, D) or None, in float32 or float64."""
    z, most = normalize(student.flatten(0, -2).to(_dtype(student)))
    _check_finite(name, "student", most)
    if teacher is None:
        return z, None
    y, most = normalize(teacher.detach().flatten(0, -2).to(_dtype(student)))
    _check_finite(name, "teacher", most)
    return z, y


def _scores(
    name: str, student: Tensor, teacher: Tensor | None, layout: Layout, options: Options, ranks: Exchanges
) -> tuple[Tensor, Tensor]:
    """Source scores z kᵀ (M, N), and target scores: z kᵀ or y kᵀ (R*B, N). Columns in public order."""
    header = options.header(layout, student, teacher, "reference", wants_gradient(student))
    with agree_with_ranks(ranks, name, header, student.device):
        z, y = _embeddings(name, anchor_gradient(student), teacher)
    own = (z if y is None else y)[: layout.T * layout.B]
    keys = layout.to_public(ranks.gather(own, name, header).T)
    source = product(z, keys, options.precision)
    if y is None or options.target_rows == "student":
        return source, source
    return source, product(y, keys, options.precision)


def log_targets(scores: Tensor, layout: Layout, options: Options, ranks: Exchanges = ALONE) -> tuple[Tensor, Tensor]:
    """Sinkhorn and top-k on scores (rows, N): returns log P (L*B, N) of the target views, and the column residual."""
    log_K = scores / options.epsilon
    if options.mask_positives:
        log_K = log_K.masked_fill(layout.positive_mask(scores.shape[0], scores.device), -math.inf)
    f, g, c = log_sinkhorn(log_K, options.iterations, ranks)
    kept = layout.L * layout.B
    log_P = log_K[:kept] + f[:kept, None] + g
    if 0 < options.top_k < layout.N:
        log_P = _keep_top_k(log_P, layout, options.top_k)
    return log_P, (c / c.mean() - 1).abs().max()


def _keep_top_k(log_P: Tensor, layout: Layout, k: int) -> Tensor:
    """Keep the k columns with the largest mean P in all target views of an image; renormalise in log space."""
    per_view = log_P.view(layout.L, layout.B, layout.N)
    order = per_view.exp().mean(0).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(per_view[0], dtype=torch.bool).scatter_(-1, order[:, :k], True)
    return per_view.masked_fill(~kept, -math.inf).log_softmax(-1).view_as(log_P)


def _log_source(scores: Tensor, layout: Layout, options: Options) -> Tensor:
    """log A (M, N) of scores (M, N), with 0 at masked positives, which then add nothing to the loss."""
    logits = scores / options.temperature
    if not options.mask_positives:
        return logits.log_softmax(-1)
    mask = layout.positive_mask(layout.M, scores.device)
    return logits.masked_fill(mask, -math.inf).log_softmax(-1).masked_fill(mask, 0.0)


def _stats(
    loss: Tensor, P: Tensor, log_A: Tensor, column_residual: Tensor, layout: Layout, options: Options
) -> BAMStats:
    target_entropy = torch.special.entr(P).sum(-1).mean()
    A = log_A.exp()
    if options.mask_positives:
        A = A.masked_fill(layout.positive_mask(layout.M, A.device).view_as(A), 0.0)
    attended = layout.N - layout.T if options.mask_positives else layout.N
    uniform_loss = loss.new_full((), attended, dtype=torch.float64).log().to(loss.dtype)
    return BAMStats(
        target_entropy=target_entropy,
        source_entropy=-(A * log_A).sum(-1).mean(),
        kl=loss.detach() - target_entropy,
        column_residual=column_residual,
        uniform_loss=uniform_loss,
        collapse_gap=uniform_loss - loss.detach(),
    )


def sinkhorn_attention(
    q: Tensor,
    k: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    mask: str = "none",
    views: int = 1,
    key_views: int | None = None,
    normalize: bool = True,
    output: str = "plan",
    differentiable: bool = False,
    group: Any = None,
    backend: str = "auto",
    precision: str = "default",
) -> Tensor | tuple[Tensor, Tensor]:
    """P = exp(s/epsilon + f_i + g_j), s = q kᵀ, or its natural-log potentials (f, g); differentiable by autograd.

    `bam_kernels.sinkhorn_attention` explains the options.
    """
    options = AttentionOptions(
        epsilon,
        iterations,
        mask,
        views,
        key_views,
        normalize,
        output,
        differentiable,
        group,
        backend,
        precision,
    )
    options = options.with_python_numbers("sinkhorn_attention")
    return attention(q, k, options.layout("sinkhorn_attention", q, k), options)


def attention(q: Tensor, k: Tensor | None, layout: Layout, options: AttentionOptions) -> Tensor | tuple[Tensor, Tensor]:
    """`sinkhorn_attention` after its arguments have been checked."""
    ranks = Exchanges(*ranks_of("sinkhorn_attention", options.group))
    if not options.differentiable:
        q, k = q.detach(), k.detach() if k is not None else None
    q, k = anchor_gradient(q), anchor_gradient(k) if k is not None else None
    header = options.header(layout, q, k, "reference")
    with agree_with_ranks(ranks, "sinkhorn_attention", header, q.device):
        rows = _attention_rows("q", q, options.normalize)
        own = rows[: layout.T * layout.B] if k is None else _attention_rows("k", k, options.normalize)
    keys = layout.to_public(ranks.gather(own, "sinkhorn_attention", header).T)
    log_K = product(rows, keys, options.precision) / options.epsilon
    if options.mask != "none":
        log_K = log_K.masked_fill(layout.positive_mask(rows.shape[0], rows.device), -math.inf)
    f, g, _ = log_sinkhorn(log_K, options.iterations, ranks)
    return (log_K + f[:, None] + g).exp() if options.output == "plan" else (f, g)


def _attention_rows(argument: str, x: Tensor, unit: bool) -> Tensor:
    x = x.to(_dtype(x))
    rows, most = normalize(x)
    _check_finite("sinkhorn_attention", argument, most)
    return rows if unit else x
