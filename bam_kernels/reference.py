"""BAM in plain PyTorch: the specification, written to be read. Any float type, any device.

Letters are those of layout.py; tau is the temperature of the source attention, eps the Sinkhorn regularisation.
16-bit input is computed in float32. Same names and signatures as the public functions.

Source: Shalam and Korman, "Unsupervised Representation Learning by Balanced Self Attention Matching", ECCV 2024.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .agreement import agreed
from .layout import Layout
from .options import AttentionOptions, Options, check_finite, options_of
from .precision import product_precision
from .ranks import ONE_RANK, Ranks, gather, ranks_named, ranks_of
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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BAMStats]:
    """loss = mean_{t<L} mean_{v != t} mean_i ( -Σ_j P_t,ij log A_v,ij ), differentiable by autograd.

    `bam_kernels.bam_loss` says what the options mean. `backend`, `engine` and `memory_budget` say how kernels
    compute and are only checked here.
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
    )
    options.check("bam_loss")
    layout = options.layout("bam_loss", student, teacher)
    ranks = ranks_named(ranks_of("bam_loss", group)[2])
    source, target = _scores("bam_loss", student, teacher, layout, options, ranks)
    loss, stats = loss_from_scores(source, target, layout, options, ranks, wants_stats=return_stats)
    return (loss, stats) if stats is not None else loss


def loss_from_scores(
    source: Tensor,
    target: Tensor,
    layout: Layout,
    options: Options,
    ranks: Ranks = ONE_RANK,
    *,
    wants_stats: bool = False,
) -> tuple[Tensor, BAMStats | None]:
    """The loss and its statistics from source scores (M, N) and target scores (rows, N); P carries no gradient."""
    with torch.no_grad():
        log_P, column_residual = log_targets(target, layout, options, ranks)
        P = log_P.exp().view(layout.L, layout.B, layout.N)
    log_A = _log_source(source, layout, options).view(layout.V, layout.B, layout.N)
    loss = source.new_zeros(())
    for v in range(layout.V):
        for t in layout.target_terms(v):
            loss = loss - layout.pair_weight * (P[t] * log_A[v]).sum(-1).mean()
    if not wants_stats:
        return loss, None
    with torch.no_grad():
        return loss, _stats(loss, P, log_A, column_residual, layout, options)


@torch.no_grad()
def bam_targets(student: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
    """The targets P (L*B, N) of `bam_loss` with the same options, columns in public order."""
    resolved = options_of("bam_targets", options)
    layout = resolved.layout("bam_targets", student, teacher)
    ranks = ranks_named(ranks_of("bam_targets", resolved.group)[2])
    _, target = _scores("bam_targets", student, teacher, layout, resolved, ranks)
    return log_targets(target, layout, resolved, ranks)[0].exp()


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/|x| over the last dimension and |x|, the norm floored at 1e-12. A row below the floor has gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    kept = torch.where(norm < NORM_FLOOR, x.detach(), x)
    return kept / norm.clamp_min(NORM_FLOOR).to(x.dtype), norm


def log_sinkhorn(log_K: Tensor, iterations: int, ranks: Ranks = ONE_RANK) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn-Knopp in log space: log P_ij = log K_ij + f_i + g_j, columns first, rows last.

    Starts from f = 0; `iterations` times g_j = -log Σ_i exp(log K_ij + f_i), f_i = -log Σ_j exp(log K_ij + g_j).
    The rows i are those of all ranks, each of which holds its own; the columns j are all keys.
    Returns f (m,), g (n,), and the column sums (n,) of P that entered the last column step (NaN if iterations = 1).
    """
    f = log_K.new_zeros(log_K.shape[0])
    g = log_K.new_full((log_K.shape[1],), math.nan)
    for _ in range(iterations):
        before, g = g, -_column_logsumexp(log_K + f[:, None], ranks)
        f = -torch.logsumexp(log_K + g, dim=1)
    return f, g, torch.exp(before - g)


def _column_logsumexp(x: Tensor, ranks: Ranks) -> Tensor:
    """log Σ_i exp(x_ij) over the rows i of all ranks."""
    own = torch.logsumexp(x, dim=0)
    if ranks.W == 1:
        return own
    most = ranks.max(own.clone())
    return most + torch.log(ranks.sum(torch.exp(own - most)))


def _embeddings(name: str, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Unit rows of student (M, D) and teacher (R*B, D), float32 at least."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    z, norm = normalize(student.flatten(0, -2).to(dtype))
    check_finite(name, "student", norm)
    if teacher is None:
        return z, None
    y, norm = normalize(teacher.detach().flatten(0, -2).to(dtype))
    check_finite(name, "teacher", norm)
    return z, y


def _scores(
    name: str, student: Tensor, teacher: Tensor | None, layout: Layout, options: Options, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Source scores z kᵀ (M, N) and target scores, the same or y kᵀ (R*B, N), columns in public order."""
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    header = options.header(layout, student, teacher, "reference", needs_grad)
    with product_precision(student.device, options.precision):
        with agreed(ranks, name, header, student.device):
            z, y = _embeddings(name, student, teacher)
        keys = layout.to_public(gather((z if y is None else y)[: layout.T * layout.B], ranks).T).T
        source = z @ keys.T
        return source, source if y is None or options.target_rows == "student" else y @ keys.T


def log_targets(scores: Tensor, layout: Layout, options: Options, ranks: Ranks = ONE_RANK) -> tuple[Tensor, Tensor]:
    """log P (L*B, N) of the target views and the column residual: Sinkhorn on all rows of (rows, N) scores, top-k."""
    log_K = scores / options.epsilon
    if options.mask_positives:
        log_K = log_K.masked_fill(layout.positive_mask(len(scores), scores.device), -math.inf)
    f, g, c = log_sinkhorn(log_K, options.iterations, ranks)
    kept = layout.L * layout.B
    log_P = log_K[:kept] + f[:kept, None] + g
    if 0 < options.top_k < layout.N:
        log_P = _keep_top_k(log_P, layout, options.top_k)
    return log_P, (c / c.mean() - 1).abs().max()


def _keep_top_k(log_P: Tensor, layout: Layout, k: int) -> Tensor:
    """Keep, in all target views of an image, the k columns with the largest mean P; renormalise in log space."""
    per_view = log_P.view(layout.L, layout.B, layout.N)
    order = per_view.exp().mean(0).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(per_view[0], dtype=torch.bool).scatter_(-1, order[:, :k], True)
    return per_view.masked_fill(~kept, -math.inf).log_softmax(-1).view_as(log_P)


def _log_source(scores: Tensor, layout: Layout, options: Options) -> Tensor:
    """log A (M, N) of (M, N) scores, with 0 at the masked positives: they weigh nothing in the loss."""
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
    uniform_loss = loss.new_full((), math.log(attended))
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

    `bam_kernels.sinkhorn_attention` says what the options mean.
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
    return attention(q, k, options.layout("sinkhorn_attention", q, k), options)


def attention(q: Tensor, k: Tensor | None, layout: Layout, options: AttentionOptions) -> Tensor | tuple[Tensor, Tensor]:
    """`sinkhorn_attention` after its arguments have been checked."""
    ranks = ranks_named(ranks_of("sinkhorn_attention", options.group)[2])
    with torch.set_grad_enabled(options.differentiable and torch.is_grad_enabled()):
        with product_precision(q.device, options.precision):
            with agreed(ranks, "sinkhorn_attention", options.header(layout, q, k, "reference"), q.device):
                rows = _attention_rows("q", q, options.normalize)
                own = rows[: layout.T * layout.B] if k is None else _attention_rows("k", k, options.normalize)
            keys = layout.to_public(gather(own, ranks).T).T
            log_K = rows @ keys.T / options.epsilon
        if options.mask != "none":
            log_K = log_K.masked_fill(layout.positive_mask(len(rows), rows.device), -math.inf)
        f, g, _ = log_sinkhorn(log_K, options.iterations, ranks)
        return (log_K + f[:, None] + g).exp() if options.output == "plan" else (f, g)


def _attention_rows(argument: str, x: Tensor, unit: bool) -> Tensor:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows, norm = normalize(x)
    check_finite("sinkhorn_attention", argument, norm)
    return rows if unit else x
