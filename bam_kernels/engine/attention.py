"""Balanced attention computed with row kernels, and its gradient through the unrolled iterations.

m rows q, N keys k, D features. Scores are products with centred keys, k - centre, so row potentials inside this module
include q·centre/eps.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..agreement import agree_with_ranks
from ..backends.interface import LOG2_E, Potential, RowKernels, UnitRows
from ..layout import Layout
from ..options import AttentionOptions
from ..ranks import ONE_RANK, Ranks
from .plan import plan_slabs
from .rows import Keys, check_norms
from .scores import Scores, TargetScores
from .slab import balance


@dataclass
class _Rows:
    q: UnitRows
    k: UnitRows
    start: Potential
    target: TargetScores


def _prepare(
    q: Tensor,
    k: Tensor | None,
    layout: Layout,
    options: AttentionOptions,
    ranks: Ranks,
    kernels: RowKernels,
    budget: int | None,
) -> _Rows:
    masked = options.mask != "none"
    with agree_with_ranks(ranks, "sinkhorn_attention", options.header(layout, q, k, kernels.backend), q.device):
        plan = plan_slabs(
            "sinkhorn_attention",
            rows=len(q),
            images=len(q),
            columns=layout.N,
            target_views=1,
            source_views=1,
            shared=True,
            sixteen_bit=False,
            ranks=layout.W,
            regather=False,
            budget=budget,
            device=q.device,
        )
        q_rows = _rows("q", q, options.normalize, kernels)
        k_rows = q_rows.views(layout.T, layout.B) if k is None else _rows("k", k, options.normalize, kernels)
        if not options.normalize:
            _check_products(q_rows.norm, k_rows.norm, options.epsilon)
    keys = Keys(k_rows, kernels.mean_row(k_rows.read), ranks)
    scores = Scores(keys, layout, masked, plan, kernels)
    start = kernels.centre_potential(q_rows.read, keys.centre, options.epsilon)
    return _Rows(q_rows, k_rows, start, TargetScores(q_rows.read, scores, plan))


def _rows(argument: str, x: Tensor, normalize: bool, kernels: RowKernels) -> UnitRows:
    rows = kernels.normalize(x)
    check_norms("sinkhorn_attention", argument, rows.norm, kernels)
    return rows if normalize else rows._replace(read=x.float().contiguous())


def _check_products(q_norm: Tensor, k_norm: Tensor, epsilon: float) -> None:
    """Raise if q·k/epsilon may overflow float32, judged by the norms of rows.

    Checks CPU tensors only: on other devices the check would wait for the device.
    """
    if q_norm.device.type != "cpu":
        return
    largest, most = (q_norm.max() * k_norm.max()).item() / epsilon, torch.finfo(torch.float32).max
    if not largest < most:
        raise ValueError(
            f"sinkhorn_attention: products of q and k over epsilon={epsilon} may be {largest:.1e}, and float32 holds "
            f"up to {most:.1e}; give shorter rows or normalize=True"
        )


def forward(
    q: Tensor,
    k: Tensor | None,
    layout: Layout,
    options: AttentionOptions,
    ranks: Ranks,
    kernels: RowKernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute P (m, N), empty unless output is "plan", and the natural-log potentials f (m,) and g (N,).

    All are float32, columns in public order.
    Raises: ValueError on non-finite rows, too small a budget, and ranks that differ.
    """
    wants_plan, epsilon = options.output == "plan", options.epsilon
    rows = _prepare(q, k, layout, options, ranks, kernels, sys.maxsize if wants_plan else None)
    m, target = len(q), rows.target
    row = Potential(*(part.clone() for part in rows.start))
    col, _ = balance(target, row, epsilon, options.iterations, ranks, cosines=options.normalize)
    for first, scores in target.sweep():
        last = first + len(scores)
        kernels.match(
            scores[None],
            None,
            layout,
            col,
            row.exponent[None, first:last],
            epsilon=epsilon,
            temperature=1.0,
            targets=scores[None],
            row_out=row.rows(first, last),
        )
    f = row.natural_log() - rows.start.natural_log()
    plan = target.kept if wants_plan and target.kept is not None else f.new_empty(0, dtype=torch.float32)
    assert not wants_plan or plan.shape == (m, layout.N)
    if wants_plan:
        plan = layout.to_public(plan)
    return plan, f.float(), layout.to_public(col.natural_log().float())


def backward(
    q: Tensor,
    k: Tensor | None,
    layout: Layout,
    options: AttentionOptions,
    kernels: RowKernels,
    plan: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Gradients dq (m, D) and dk (n, D) from the gradients of (P, f, g), on one rank.

    With k None, dk is added to dq and an empty tensor is returned in its place.
    """
    rows = _prepare(q, k, layout, options, ONE_RANK, kernels, sys.maxsize)
    ds = _score_gradient(rows, options.epsilon, options.iterations, plan, grads)
    dq, dk = ds @ rows.k.read, ds.T @ rows.q.read
    if k is None:
        dq[: layout.N].add_(dk)
        dk = dk[:0, 0]
    elif options.normalize:
        dk = kernels.project_(dk, rows.k)
    if options.normalize:
        dq = kernels.project_(dq, rows.q)
    return dq, dk


def _score_gradient(
    rows: _Rows,
    epsilon: float,
    iterations: int,
    plan: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """dL/ds (m, N), by reverse mode through f_t = -LSE_j(x + g_t) and g_t = -LSE_i(x + f_{t-1}), x = s/eps.

    dL/dx starts as dL/dP * P. Every half step, in reverse, subtracts from dL/dx its softmax matrix times the gradient
    of its potential.
    """
    target, kernels = rows.target, rows.target.scores.kernels
    scores, steps = _unrolled(rows, epsilon, iterations)
    grad_plan, grad_f, grad_g = grads
    scale = LOG2_E / epsilon
    dx = torch.zeros_like(scores) if grad_plan is None or plan is None else (grad_plan.float() * plan).contiguous()
    df, dg = dx.sum(1), dx.sum(0)
    if grad_f is not None:
        df += grad_f
    if grad_g is not None:
        dg += grad_g
    for f_before, g, f in reversed(steps):
        dg -= kernels.plan_products(scores, scale, f, g, None, df)[1]
        kernels.plan_subtract_(dx, scores, scale, f, g, df, None)
        df = -kernels.plan_products(scores, scale, f_before, g, dg, None)[0]
        kernels.plan_subtract_(dx, scores, scale, f_before, g, None, dg)
        dg = torch.zeros_like(dg)
    assert target.kept is scores
    return dx.div_(epsilon)


def _unrolled(
    rows: _Rows, epsilon: float, iterations: int
) -> tuple[Tensor, list[tuple[Potential, Potential, Potential]]]:
    """Scores (m, N), and the potentials (f_{t-1}, g_t, f_t) of every iteration t."""
    target, kernels = rows.target, rows.target.scores.kernels
    row = Potential(*(part.clone() for part in rows.start))
    col, _ = balance(target, row, epsilon, 1, ONE_RANK)
    ((_, scores),) = target.sweep()
    c = torch.empty_like(col.mantissa)
    steps = []
    f_before = rows.start
    for t in range(iterations):
        if t > 0:
            kernels.divide_potential_(col, c)
        kernels.sinkhorn_pass(scores, LOG2_E / epsilon, row, col, c, accumulate=False)
        g, f = Potential(*(part.clone() for part in col)), Potential(*(part.clone() for part in row))
        steps.append((f_before, g, f))
        f_before = f
    return scores, steps
