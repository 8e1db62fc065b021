"""The slab engine: a library product makes some rows of scores by all N keys, row kernels do the rest in place.

If the memory budget holds all target scores they are made once and kept; if not, the same kernels run over slabs that
are made again in every sweep. Letters are those of layout.py; z, y, k are unit rows, k centred: a constant per row,
which cancels in P, A, the loss and dz if the first column step starts from the row potential exp(z·centre/eps).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backends.cpu import FIXED_STEPS, LOG2_E, CpuKernels, Potential
from ..layout import Layout
from ..options import Options, check_finite
from ..ranks import ONE_RANK, Ranks
from .plan import SlabPlan, plan_slabs

# Below this eps a float64 sum of per-rank column sums can no longer hold the range of exp(1/eps) on both sides.
LEAST_EPSILON_OF_ONE_SUM = 0.0029


class Scores:
    """Makes scores of unit rows against the keys, in slabs of one buffer that all sweeps and the match share.

    A slab is a pair of (rows, N) tensors: float32, and what the kernels read, which is the same tensor or its int16
    fixed-point copy (`step` is the value of one step). The float32 slab of an int16 one takes the gradient.
    """

    def __init__(
        self, keys: Tensor, layout: Layout, masked: bool, fixed: bool, plan: SlabPlan, kernels: CpuKernels
    ) -> None:
        self.keys, self.layout, self.masked, self.fixed, self.kernels = keys, layout, masked, fixed, kernels
        # |z·k| <= max_j |k_j| for unit z.
        self.step = keys.norm(dim=1).max().item() / FIXED_STEPS if fixed else 1.0
        self._made = torch.empty(plan.slab_rows, layout.N)
        self._read = torch.empty(plan.slab_rows, layout.N, dtype=torch.int16) if fixed else self._made

    def slab(self, rows: int, after: int = 0) -> tuple[Tensor, Tensor]:
        """`rows` rows of the buffer, past the first `after`."""
        return self._made[after : after + rows], self._read[after : after + rows]

    def make(self, unit: Tensor, first_row: int, slab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of (m, D) unit rows first_row .. first_row + m - 1 into the slab's first m rows."""
        made, read = slab[0][: len(unit)], slab[1][: len(unit)]
        torch.mm(unit, self.keys.T, out=made)
        if self.masked:
            self.kernels.mask_positives_(made, self.layout, first_row)
        if self.fixed:
            self.kernels.quantize(made, self.step, read)
        return made, read

    def make_images(self, unit: Tensor, first: int, slab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of (views, b, D) unit rows of images first .. first + b - 1, as (views, b, N) tensors."""
        views, b, _ = unit.shape
        shape = (views, b, self.layout.N)
        made, read = slab[0][: views * b], slab[1][: views * b]
        torch.mm(unit.reshape(views * b, -1), self.keys.T, out=made)
        if self.masked:
            for view in made.view(shape):
                self.kernels.mask_positives_(view, self.layout, first)
        if self.fixed:
            self.kernels.quantize(made, self.step, read)
        return made.view(shape), read.view(shape)


class Sweeps(Protocol):
    """The scores of the Sinkhorn problem, some rows at a time; `step` is the value of one step of fixed point."""

    step: float
    kernels: CpuKernels
    columns: int

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores of some rows) until all rows have been seen."""


class KeptScores:
    """Scores that are there already."""

    def __init__(self, scores: Tensor, step: float, kernels: CpuKernels) -> None:
        self.scores, self.step, self.kernels, self.columns = scores, step, kernels, scores.shape[1]

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.scores


class TargetScores:
    """Scores from embeddings: kept whole after the first sweep, or made again in every sweep."""

    def __init__(self, unit: Tensor, scores: Scores, plan: SlabPlan) -> None:
        self.unit = unit
        self.scores = scores
        self.plan = plan
        self.kept: Tensor | None = None
        self.step, self.kernels, self.columns = scores.step, scores.kernels, scores.layout.N

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        if self.kept is not None:
            yield 0, self.kept
            return
        rows, size = len(self.unit), self.plan.sweep_rows
        if not self.plan.cached:
            slab = self.scores.slab(size)
            for first in range(0, rows, size):
                yield first, self.scores.make(self.unit[first : first + size], first, slab)[1]
            return
        kept = torch.empty(rows, self.columns, dtype=torch.int16 if self.scores.fixed else torch.float32)
        for first in range(0, rows, size):
            part = kept[first : first + size]
            slab = (self.scores.slab(size)[0] if self.scores.fixed else part, part)
            yield first, self.scores.make(self.unit[first : first + size], first, slab)[1]
        self.kept = kept


@dataclass
class Embedded:
    """Unit rows, centred keys and the potential that the rows of the Sinkhorn problem start from."""

    z: Tensor
    z_norm: Tensor
    y: Tensor | None
    target_rows: Tensor
    keys: Tensor
    centre: Tensor
    row: Potential


def embed(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: CpuKernels,
) -> Embedded:
    z, z_norm = kernels.normalize(student.reshape(layout.M, layout.D))
    check_finite(name, "student", z_norm)
    y = None
    if teacher is not None:
        y, y_norm = kernels.normalize(teacher.reshape(layout.R * layout.B, layout.D))
        check_finite(name, "teacher", y_norm)
    keys = ranks.gather_keys((z if y is None else y)[: layout.T * layout.B])
    target_rows = z if y is None or options.target_rows == "student" else y
    centre = keys.mean(0)
    row = kernels.centre_potential(target_rows, centre, options.epsilon)
    return Embedded(z, z_norm, y, target_rows, keys - centre, centre, row)


def balance(target: Sweeps, row: Potential, epsilon: float, iterations: int, ranks: Ranks) -> tuple[Potential, Tensor]:
    """Column potentials g after `iterations` Sinkhorn iterations, and the column sums before the last column step.

    `row` holds the potentials the first column step starts from, and afterwards those of the last row step but one:
    the row step after g is left to the kernel that reads the scores next.
    """
    kernels, n = target.kernels, target.columns
    scale = LOG2_E / epsilon * target.step
    shift, sums = torch.empty(n), torch.empty(n)
    for first, scores in target.sweep():
        rows = row.rows(first, first + len(scores))
        kernels.column_lse(scores, scale, rows, shift, sums, accumulate=first > 0)
    col = kernels.reciprocal_potential(*_sum_over_ranks(shift, sums, epsilon, ranks))
    c = torch.full((n,), math.nan)
    for _ in range(iterations - 1):
        for first, scores in target.sweep():
            rows = row.rows(first, first + len(scores))
            kernels.sinkhorn_pass(scores, scale, rows, col, c, accumulate=first > 0)
        c = ranks.sum(c)
        kernels.divide_potential_(col, c)
    return col, c


def _sum_over_ranks(shift: Tensor, sums: Tensor, epsilon: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Column sums over all ranks, each given as sums * 2^shift. One rank: nothing to do."""
    if ranks.W == 1:
        return shift, sums
    if epsilon >= LEAST_EPSILON_OF_ONE_SUM:
        common = torch.full_like(shift, math.ceil(LOG2_E / epsilon))
    else:
        common = ranks.max(shift.clone())
    total = ranks.sum(sums.double() * torch.exp2((shift - common).double()))
    mantissa, exponent = torch.frexp(total)
    return common + exponent, mantissa.float()


@dataclass
class Evaluated:
    """loss: float64 scalar of this rank; stats: (6,) float64 in the order of BAMStats; dz: (M, D) float32 or None."""

    loss: Tensor
    stats: Tensor
    dz: Tensor | None


class _Sums:
    """Adds up the kernels' sums over match slabs and turns them into means over images."""

    def __init__(self) -> None:
        self.loss = self.target_entropy = self.source_entropy = torch.zeros((), dtype=torch.float64)

    def add(self, matched) -> None:
        self.loss = self.loss + matched.loss
        self.target_entropy = self.target_entropy + matched.target_entropy
        self.source_entropy = self.source_entropy + matched.source_entropy

    def evaluated(self, layout: Layout, masked: bool, column_sums: Tensor, dz: Tensor | None) -> Evaluated:
        loss = self.loss.item() / layout.B
        target_entropy = self.target_entropy.item() / (layout.L * layout.B)
        least, most = column_sums.aminmax()
        mean = column_sums.mean(dtype=torch.float64).item()
        uniform_loss = math.log(layout.N - layout.T if masked else layout.N)
        stats = [
            target_entropy,
            self.source_entropy.item() / layout.M,
            loss - target_entropy,
            max(most.item() / mean - 1, 1 - least.item() / mean),
            uniform_loss,
            uniform_loss - loss,
        ]
        return Evaluated(torch.tensor(loss, dtype=torch.float64), torch.tensor(stats, dtype=torch.float64), dz)


def _plan(name: str, layout: Layout, options: Options, target_rows: int, shared: bool, fixed: bool) -> SlabPlan:
    return plan_slabs(
        name,
        rows=target_rows,
        images=layout.B,
        columns=layout.N,
        target_views=layout.L,
        source_views=layout.V,
        shared=shared,
        fixed=fixed,
        budget=options.memory_budget,
        device=torch.device("cpu"),
    )


def evaluate(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: CpuKernels,
    *,
    needs_grad: bool,
    fixed: bool = False,
) -> Evaluated:
    """The loss of this rank, its statistics and, if wanted, dz: the gradient of the sum of all ranks' losses.

    fixed: scores as int16 fixed point.
    """
    x = embed(name, student, teacher, layout, options, ranks, kernels)
    own_keys, shared = x.y is None, x.target_rows is x.z
    plan = _plan(name, layout, options, len(x.target_rows), shared, fixed)
    scores = Scores(x.keys, layout, options.mask_positives, fixed, plan, kernels)
    target = TargetScores(x.target_rows, scores, plan)
    col, column_sums = balance(target, x.row, options.epsilon, options.iterations, ranks)

    gradient = _Gradient(x, layout, own_keys, ranks, kernels) if needs_grad else None
    sums = _Sums()
    for first, matched, G in _match_slabs(target, x, layout, options, plan, shared, col, needs_grad):
        sums.add(matched)
        if gradient is not None:
            gradient.add(G, first)
    dz = gradient.finish() if gradient is not None else None
    return sums.evaluated(layout, options.mask_positives, column_sums, dz)


def _match_slabs(
    target: TargetScores,
    x: Embedded,
    layout: Layout,
    options: Options,
    plan: SlabPlan,
    shared: bool,
    col: Potential,
    needs_grad: bool,
):
    """(first image, sums, G (V, b, N) or None) slab by slab; G lives until the next slab."""
    scores, kernels = target.scores, target.scores.kernels
    z = x.z.view(layout.V, layout.B, layout.D)
    row_exponent = x.row.exponent.view(-1, layout.B)
    kept = target.kept.view(-1, layout.B, layout.N) if target.kept is not None else None
    in_place = shared and kept is not None and not scores.fixed
    source_rows = 0 if in_place else layout.V * plan.match_images
    source_slab = scores.slab(source_rows)
    target_slab = scores.slab(layout.L * plan.match_images, after=source_rows)
    for first in range(0, layout.B, plan.match_images):
        last = min(first + plan.match_images, layout.B)
        if shared and kept is not None:
            source = kept[:, first:last]
            G = source if in_place else source_slab[0][: source.shape[:2].numel()].view(source.shape)
        else:
            G, source = scores.make_images(z[:, first:last], first, source_slab)
        if kept is not None:
            target_scores = kept[: layout.L, first:last]
        elif shared:
            target_scores = source[: layout.L]
        else:
            y = x.target_rows.view(-1, layout.B, layout.D)[: layout.L, first:last]
            target_scores = scores.make_images(y, first, target_slab)[1]
        matched = kernels.match(
            target_scores,
            source,
            layout,
            col,
            row_exponent[: layout.L, first:last],
            epsilon=options.epsilon,
            temperature=options.temperature,
            step=scores.step,
            top_k=options.top_k,
            gradient=G if needs_grad else None,
        )
        yield first, matched, G if needs_grad else None


class _Gradient:
    """dz = G k and, without a teacher, dk = Gᵀ z, slab by slab; then back through the L2 normalisation."""

    def __init__(self, x: Embedded, layout: Layout, own_keys: bool, ranks: Ranks, kernels: CpuKernels) -> None:
        self.x, self.layout, self.ranks, self.kernels = x, layout, ranks, kernels
        self.d = torch.empty_like(x.z)
        self.own_keys = own_keys
        self.dk: Tensor | None = None

    def add(self, G: Tensor, first: int) -> None:
        """G (V, b, N) of images first .. first + b - 1."""
        V, b, N = G.shape
        if b == self.layout.B and self.own_keys and self.layout.W == 1 and G.is_contiguous():
            self._add_symmetric(G.view(V * b, N))
            return
        z = self.x.z.view(V, -1, self.layout.D)[:, first : first + b].reshape(V * b, -1)
        rows = G.reshape(V * b, N)
        self.d.view(V, -1, self.layout.D)[:, first : first + b] = torch.mm(rows, self.x.keys).view(V, b, -1)
        if self.own_keys:
            if self.dk is None:
                self.dk = torch.zeros_like(self.x.keys)
            self.dk.addmm_(rows.T, z)

    def _add_symmetric(self, G: Tensor) -> None:
        """All rows at once, the keys among them: G k + Gᵀ z is one product with H = G + Gᵀ of the keys' own rows.

        z = k' + centre there, so H z = H k' + rowsum(H) centre, and k' keeps the products small near collapse.
        """
        x, keys = self.x, self.layout.N
        torch.mm(G[keys:], x.keys, out=self.d[keys:])
        H = G[:keys]
        sums = self.kernels.symmetrize_(H)
        d = torch.mm(H, x.keys, out=self.d[:keys])
        d.addr_(sums, x.centre)
        if len(G) > keys:
            d.addmm_(G[keys:].T, x.z[keys:])

    def finish(self) -> Tensor:
        """dz (M, D) float32."""
        if self.dk is not None:
            self.d[: self.layout.T * self.layout.B] += self.ranks.scatter_keys(self.dk)
        return self.kernels.project_(self.d, self.x.z, self.x.z_norm)


def targets(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: CpuKernels,
    *,
    fixed: bool = False,
) -> Tensor:
    """P (L*B, N) float32, public column order."""
    x = embed(name, student, teacher, layout, options, ranks, kernels)
    plan = _plan(name, layout, options, len(x.target_rows), True, fixed)
    scores = Scores(x.keys, layout, options.mask_positives, fixed, plan, kernels)
    target = TargetScores(x.target_rows, scores, plan)
    col, _ = balance(target, x.row, options.epsilon, options.iterations, ranks)
    P = torch.empty(layout.L, layout.B, layout.N)
    unit = x.target_rows.view(-1, layout.B, layout.D)[: layout.L]
    row_exponent = x.row.exponent.view(-1, layout.B)
    kept = target.kept.view(-1, layout.B, layout.N) if target.kept is not None else None
    slab = scores.slab(layout.L * plan.match_images if kept is None else 0)
    for first in range(0, layout.B, plan.match_images):
        last = min(first + plan.match_images, layout.B)
        if kept is not None:
            target_scores = kept[: layout.L, first:last]
        else:
            target_scores = scores.make_images(unit[:, first:last], first, slab)[1]
        kernels.match(
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
    kernels: CpuKernels,
    *,
    target_scores: Tensor | None = None,
    step: float = 1.0,
    needs_grad: bool = True,
    G: Tensor | None = None,
) -> tuple[Evaluated, Tensor | None]:
    """The loss from given scores (M, N) of one rank, and G = dloss/ds (M, N) float32, once the scores exist.

    Float32 scores are overwritten: their positives by the mask, then all of them by G. Int16 scores (`step` is the
    value of one step, -32768 a masked entry) are kept, and G is written to the tensor given for it, or a new one.
    target_scores (R*B, N): those of a teacher's rows; None: the scores themselves.
    """
    fixed = scores.dtype == torch.int16
    given = [scores] if target_scores is None else [scores, target_scores]
    if options.mask_positives and not fixed:
        for s in given:
            kernels.mask_positives_(s, layout, 0)
    rows = given[-1]
    if needs_grad and G is None:
        G = torch.empty(scores.shape) if fixed else scores
    target = KeptScores(rows, step, kernels)
    row = Potential.one(len(rows))
    col, column_sums = balance(target, row, options.epsilon, options.iterations, ONE_RANK)
    shape = (-1, layout.B, layout.N)
    sums = _Sums()
    sums.add(
        kernels.match(
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
    return sums.evaluated(layout, options.mask_positives, column_sums, None), G
