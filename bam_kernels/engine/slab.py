"""The slab engine: a matrix product computes a slab of scores, some rows by all N keys, and row kernels do the rest.

If the memory budget holds all target scores, they are computed once and kept; else the kernels run over slabs that are
computed again in every sweep. layout.py defines the dimension letters; z, y, k are unit rows. Keys are centred, which
adds a constant to every row of scores. It cancels in P, A, the loss and dz if the first column step starts from the row
potential exp(z·centre/eps).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..agreement import agree_with_ranks
from ..backends.interface import GRADIENT_FACTOR, LOG2_E, Positives, Potential, RowKernels
from ..layout import Layout
from ..options import Options
from ..precision import LEAST_EPSILON_OF_ONE_SUM
from ..ranges import named_range
from ..ranks import ONE_RANK, Ranks
from .call import Call
from .gradient import Gradient
from .plan import SlabPlan, plan_slabs
from .rows import Rows, checked_rows, rows_and_keys
from .scores import KeptScores, Scores, SourceScores, Sweeps, TargetScores
from .sums import Evaluation, Sums


@dataclass
class EmbeddedBatch:
    """Rows and keys of one evaluation, the plan of slabs for their scores, and the maker of scores."""

    rows: Rows
    plan: SlabPlan
    scores: Scores


def embed(call: Call, *, wants_source: bool) -> EmbeddedBatch:
    """Plan the slabs, normalise the rows and prepare the gather of keys.

    Raises: ValueError on non-finite rows or too small a budget on any rank, and if ranks differ.
    """
    layout, options = call.layout, call.options
    with agree_with_ranks(call.ranks, call.name, call.header, call.student.device):
        plan = plan_slabs(
            call.name,
            rows=layout.M if call.shared else layout.R * layout.B,
            images=layout.B,
            columns=layout.N,
            target_views=layout.L,
            source_views=layout.V,
            shared=call.shared or not wants_source,
            sixteen_bit=call.sixteen_bit,
            ranks=layout.W,
            regather=options.regather,
            budget=options.memory_budget,
            device=call.student.device,
        )
        read = checked_rows(call)
    rows = rows_and_keys(call, read)
    return EmbeddedBatch(rows, plan, Scores.of(rows, layout, options.mask_positives, plan, call.kernels))


@named_range("Sinkhorn")
def balance(
    target: Sweeps,
    row: Potential,
    epsilon: float,
    iterations: int,
    ranks: Ranks,
    *,
    meanwhile: Callable[[], None] | None = None,
    cosines: bool = True,
) -> tuple[Potential, Tensor]:
    """Run Sinkhorn iterations: column potentials g, and the column sums before the last column step.

    row         in: the potentials that the first column step starts from; out: the potentials of the last row step but
                one. The row step after g is left to the kernel that reads the scores next
    meanwhile   called during each all-reduce of column sums
    cosines     scores are within +-1
    """
    if ranks.W == 1 and iterations > 1 and (result := _in_one_launch(target, row, epsilon, iterations)) is not None:
        return result
    kernels, n = target.kernels, target.columns
    shift, sums = row.mantissa.new_empty(n), row.mantissa.new_empty(n)
    target.column_step(LOG2_E / epsilon, row, shift, sums)
    scale = LOG2_E / epsilon * target.step
    col = _column_potential(kernels, shift, sums, epsilon if cosines else 0.0, ranks, meanwhile)
    c = shift.new_empty(n) if iterations > 1 else shift.new_full((n,), math.nan)
    for _ in range(iterations - 1):
        for first, scores in target.sweep():
            last = first + len(scores)
            # On one rank, column sums are complete after the last rows.
            divide = ranks.W == 1 and last == len(row.exponent)
            rows = row.rows(first, last)
            kernels.sinkhorn_pass(scores, scale, rows, col, c, accumulate=first > 0, divide=divide)
        if ranks.W > 1:
            c = ranks.sum(c, meanwhile)
            kernels.divide_potential_(col, c)
    return col, c


def _in_one_launch(target: Sweeps, row: Potential, epsilon: float, iterations: int) -> tuple[Potential, Tensor] | None:
    """Run all Sinkhorn iterations in one launch, or return None if the backend cannot or scores do not fit on chip."""
    kernels: Any = target.kernels
    device = row.exponent.device
    if not hasattr(kernels, "sinkhorn") or target.kept_type is None:
        return None
    if not kernels.fits_on_chip(len(row.exponent), target.columns, target.kept_type, device):
        return None
    for _ in target.sweep():  # computes the scores to keep
        pass
    ((_, scores),) = target.sweep()
    return kernels.sinkhorn(scores, LOG2_E / epsilon * target.step, row, iterations)


def _column_potential(
    kernels: RowKernels,
    shift: Tensor,
    sums: Tensor,
    epsilon: float,
    ranks: Ranks,
    meanwhile: Callable[[], None] | None,
) -> Potential:
    """Column potential 1 / (sums_j * 2^shift_j), with the column sums of all ranks. Overwrites shift."""
    if ranks.W == 1:
        return kernels.reciprocal_potential(shift, sums)
    if epsilon >= LEAST_EPSILON_OF_ONE_SUM:
        common = math.ceil(LOG2_E / epsilon)
        total = ranks.sum(kernels.column_totals(shift, sums, common), meanwhile)
        return kernels.total_potential(total, common)
    most = ranks.max(shift.clone())
    total = ranks.sum(kernels.column_totals(shift.sub_(most), sums, 0), meanwhile)
    col = kernels.total_potential(total, 0)
    col.exponent.sub_(most.masked_fill_(total == 0, 0.0))  # an empty column has no shift
    return col


def evaluate(call: Call) -> Evaluation:
    """Compute this rank's loss, its statistics and, if wanted, dz: the gradient of the sum of all ranks' losses."""
    x, layout, options = embed(call, wants_source=True), call.layout, call.options
    z, plan, scores = x.rows.z.read, x.plan, x.scores
    target = TargetScores(x.rows.target.read, scores, plan)
    source = SourceScores(z, scores, plan, options.iterations) if plan.source_cached else None
    if source is not None and options.regather:
        target.kept = scores.empty(len(target.unit))
        scores.make_both(target.unit, z, target.kept, source.kept)
        source.mark_made()
    meanwhile = source.next_portion if source is not None else None
    row = x.rows.potential
    col, column_sums = balance(target, row, options.epsilon, options.iterations, call.ranks, meanwhile=meanwhile)

    gradient = Gradient(x.rows, layout, call.ranks, call.kernels) if call.needs_grad else None
    sums = Sums(call.kernels)
    source_scores = source.finish() if source is not None else None
    for first, matched, G in _match_slabs(call, x, target, source_scores, col):
        sums.add(matched)
        if gradient is not None:
            gradient.add(G, first)
    if call.sixteen_bit:  # int16 scores have no NaN, so a row that is not finite shows in its norm only
        sums.make_nan_unless_finite(x.rows.z.norm)
    dz = gradient.finish(options.temperature) if gradient is not None else None
    return sums.evaluation(layout, options.mask_positives, column_sums, dz)


def _match_slabs(call: Call, x: EmbeddedBatch, target: TargetScores, source_scores: Tensor | None, col: Potential):
    """Match slab by slab; yields (first image, sums, score gradient G (V, b, N) or None).

    G is overwritten by the next slab. source_scores (M, N): source scores if they are kept, else None.
    """
    layout, options, scores = call.layout, call.options, x.scores
    z = x.rows.z.read.view(layout.V, layout.B, layout.D)
    row_exponent = x.rows.potential.exponent.view(-1, layout.B)
    kept = target.kept.view(-1, layout.B, layout.N) if target.kept is not None else None
    kept_source = source_scores.view(layout.V, layout.B, layout.N) if source_scores is not None else None
    factor = GRADIENT_FACTOR * layout.B * options.temperature if call.sixteen_bit else 1.0
    for first in range(0, layout.B, x.plan.match_images):
        last = min(first + x.plan.match_images, layout.B)
        source_rows = 0
        if kept_source is not None:
            source = kept_source[:, first:last]
        elif call.shared and kept is not None:
            source = kept[:, first:last]
        else:
            source_rows = layout.V * (last - first)
            source = _image_scores(scores, z[:, first:last], first, 0)
        if kept is not None:
            target_scores = kept[: layout.L, first:last]
        elif call.shared:
            target_scores = source[: layout.L]
        else:
            y = x.rows.target.read.view(-1, layout.B, layout.D)[: layout.L, first:last]
            target_scores = _image_scores(scores, y, first, source_rows)
        G = source.view(torch.float16) if call.sixteen_bit else source
        matched = named_range("match")(call.kernels.match)(
            target_scores,
            source,
            layout,
            col,
            row_exponent[: layout.L, first:last],
            epsilon=options.epsilon,
            temperature=options.temperature,
            step=scores.step,
            top_k=options.top_k,
            gradient=G if call.needs_grad else None,
            gradient_factor=factor,
        )
        yield first, matched, G if call.needs_grad else None


def _image_scores(scores: Scores, unit: Tensor, first: int, after: int) -> Tensor:
    """Compute scores (views, b, N) of unit rows (views, b, D) of images first .., in the buffer after row `after`."""
    views, b, D = unit.shape
    into = scores.buffer(views * b, after)
    return scores.make(unit.reshape(views * b, D), first, into, period=b).view(views, b, -1)


def targets(call: Call) -> Tensor:
    """Compute the targets P (L*B, N) float32, columns in public order."""
    x, layout, options = embed(call, wants_source=False), call.layout, call.options
    plan, scores = x.plan, x.scores
    target = TargetScores(x.rows.target.read, scores, plan)
    col, _ = balance(target, x.rows.potential, options.epsilon, options.iterations, call.ranks)
    P = scores.empty(layout.L * layout.B, torch.float32).view(layout.L, layout.B, layout.N)
    unit = target.unit.view(-1, layout.B, layout.D)[: layout.L]
    row_exponent = x.rows.potential.exponent.view(-1, layout.B)
    kept = target.kept.view(-1, layout.B, layout.N) if target.kept is not None else None
    for first in range(0, layout.B, plan.match_images):
        last = min(first + plan.match_images, layout.B)
        if kept is not None:
            target_scores = kept[: layout.L, first:last]
        else:
            target_scores = _image_scores(scores, unit[:, first:last], first, 0)
        named_range("match")(call.kernels.match)(
            target_scores,
            None,
            layout,
            col,
            row_exponent[: layout.L, first:last],
            epsilon=options.epsilon,
            temperature=options.temperature,
            step=scores.step,
            top_k=options.top_k,
            targets=P[:, first:last],
        )
    return layout.to_public(P.view(-1, layout.N))


def from_scores(
    scores: Tensor,
    layout: Layout,
    options: Options,
    kernels: RowKernels,
    *,
    target_scores: Tensor | None = None,
    step: float = 1.0,
    needs_grad: bool = True,
    G: Tensor | None = None,
) -> tuple[Evaluation, Tensor | None]:
    """Compute the loss and G = dloss/ds (M, N) float32 from scores (M, N) on one rank, for tests and benchmarks.

    scores          float32: overwritten, positives by the mask, then all entries by G. int16: kept; G is written to the
                    tensor `G`, or to a new one
    target_scores   (R*B, N), scores of a teacher's rows; None: `scores`
    step            score of one step of int16 scores, in which -32768 is a masked entry
    """
    fixed = scores.dtype == torch.int16
    score_tensors = [scores] if target_scores is None else [scores, target_scores]
    if options.mask_positives and not fixed:
        for s in score_tensors:
            kernels.mask_positives_(s, Positives(layout, 0, len(s)))
    rows = score_tensors[-1]
    if needs_grad and G is None:
        G = torch.empty_like(scores, dtype=torch.float32) if fixed else scores
    target = KeptScores(rows, step, kernels)
    row = Potential.one(len(rows), scores.device)
    col, column_sums = balance(target, row, options.epsilon, options.iterations, ONE_RANK)
    shape = (-1, layout.B, layout.N)
    sums = Sums(kernels)
    sums.add(
        named_range("match")(kernels.match)(
            rows.view(shape)[: layout.L],
            scores.view(shape),
            layout,
            col,
            row.exponent.view(-1, layout.B)[: layout.L],
            epsilon=options.epsilon,
            temperature=options.temperature,
            step=step,
            top_k=options.top_k,
            gradient=G.view(shape) if G is not None else None,
        )
    )
    return sums.evaluation(layout, options.mask_positives, column_sums, None), G
