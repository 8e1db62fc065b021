"""Our kernels as competitors: from given scores, and the whole loss.

Letters of dimensions are defined in bam_kernels/layout.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from competitor import GRAPHS, Competitor, Rotation, RowName
from problem import Problem, Truth, Work, loss_options, whole_work
from torch import Tensor

from bam_kernels import bam_loss, bam_targets
from bam_kernels.backends import cpu
from bam_kernels.backends.interface import FIXED_STEPS, LOG2_E, Positives, Potential, RowKernels
from bam_kernels.engine import flash, slab
from bam_kernels.engine.call import Call
from bam_kernels.ranks import ONE_RANK
from bam_kernels.verification.cases import rounded_products


def fixed_point(scores: Tensor, problem: Problem, kernels: Any) -> tuple[Tensor, float]:
    """Masked int16 scores and the value of one step. Not timed: in the engine the product's epilogue writes them."""
    step = scores.abs().max().item() / FIXED_STEPS
    masked = kernels.mask_positives_(scores.clone(), Positives(problem.layout, 0, len(scores)))
    return kernels.quantize(masked, step, torch.empty_like(scores, dtype=torch.int16)), step


class GivenScores:
    """Our kernels on given scores, with columns in the order in which keys are gathered from ranks."""

    def __init__(
        self, problem: Problem, source: Tensor, target: Tensor | None, kernels: RowKernels, fixed: bool
    ) -> None:
        self.problem, self.kernels, self.step = problem, kernels, 1.0
        given = [x if x is None else problem.layout.to_gathered(x) for x in (source, target)]
        if fixed:
            # Source and target scores share one step, as they share their keys in the engine.
            both = torch.cat([x for x in given if x is not None])
            made, self.step = fixed_point(both, problem, kernels)
            given = [made[: len(source)], made[len(source) :] if target is not None else None]
        self.given = tuple(given)
        self.fixed, self.score_bytes = fixed, 2 if fixed else 4
        self.c = source.new_empty(problem.layout.N)

    def balance(self, rows: Tensor) -> tuple[Potential, Potential]:
        """Row and column potentials after all iterations."""
        options, kernels = self.problem.options, self.kernels
        if not self.fixed:
            kernels.mask_positives_(rows, Positives(self.problem.layout, 0, len(rows)))
        row = Potential.one(len(rows), rows.device)
        kept = slab.KeptScores(rows, self.step, kernels)
        col, _ = slab.balance(kept, row, options.epsilon, options.iterations, ONE_RANK)
        return row, col

    def sinkhorn(self, rows: Tensor) -> tuple[Potential, Potential]:
        """Potentials of all rows and columns.

        `slab.balance` leaves the last row step to the next kernel, so it is taken here.
        """
        row, col = self.balance(rows)
        scale = LOG2_E / self.problem.options.epsilon * self.step
        self.kernels.sinkhorn_pass(rows, scale, row, col, self.c, accumulate=False)
        return row, col

    def plan(self) -> Truth:
        """P (M, N), computed in float64 from the kernels' potentials."""
        rows = self.given[0].clone()
        row, col = self.sinkhorn(rows)
        log_K = rows.double() * (self.step / self.problem.options.epsilon)
        P = (log_K + row.natural_log()[:, None] + col.natural_log()).exp()
        mask = self.problem.layout.to_gathered(self.problem.layout.positive_mask(len(rows), rows.device))
        return Truth(self.problem.layout.to_public(P.masked_fill_(mask, 0.0)), None)

    def targets(self) -> Tensor:
        """P (L*B, N) as the match kernel writes it, columns in gathered order."""
        layout, options = self.problem.layout, self.problem.options
        rows = (self.given[0] if self.given[1] is None else self.given[1]).clone()
        row, col = self.balance(rows)
        P = torch.empty(layout.L, layout.B, layout.N, device=rows.device)
        self.kernels.match(
            rows.view(-1, layout.B, layout.N)[: layout.L],
            None,
            layout,
            col,
            row.exponent.view(-1, layout.B)[: layout.L],
            epsilon=options.epsilon,
            temperature=options.temperature,
            step=self.step,
            top_k=options.top_k,
            targets=P,
        )
        return P.view(-1, layout.N)

    def loss(self, source: Tensor, target: Tensor | None, G: Tensor | None = None) -> Tensor:
        layout, options = self.problem.layout, self.problem.options
        _, G = slab.from_scores(source, layout, options, self.kernels, target_scores=target, step=self.step, G=G)
        assert G is not None
        return G

    def outputs(self) -> Truth:
        public = self.problem.layout.to_public
        source, target = (x if x is None else x.clone() for x in self.given)
        return Truth(public(self.targets()), public(self.loss(source, target)))


def our_competitor(
    kind: RowName,
    kernels: RowKernels,
    fresh: Callable[[], tuple[Any, ...]],
    run: Callable[..., Any],
    outputs: Callable[[], Truth],
    work: Work,
) -> Competitor:
    precision = "int16" if "int16" in kind else "split" if "split" in kind else "float32"
    isa = f" {kernels.isa}" if isinstance(kernels, cpu.CpuKernels) else ""
    name = kernels.backend + isa + kind.removeprefix(kernels.backend).replace("-", " ")
    return Competitor(kind, name, fresh, run, outputs, work, precision=precision)


def our_whole_competitor(problem: Problem, kind: RowName, kernels: RowKernels, fresh: Rotation) -> Competitor:
    """Our whole loss, forward and backward, as a competitor: `bam_loss`, or the engine below it.

    The engine is called directly in 16 bit and for a CPU instruction set that is not the best one. `bam_loss` has no
    option for the instruction set, and takes 16 bit for float32 input only if torch's flag lets products be rounded. It
    does so for the row with split products.
    """
    layout, options, sixteen_bit = problem.layout, problem.options, "int16" in kind
    engine: Any = flash if "flash" in kind else slab
    ranks = problem.ranks()
    named = loss_options(problem) | ({"engine": "flash"} if engine is flash else {})

    products = rounded_products if kind == "cpu-split" else nullcontext

    def public(z: Tensor, y: Tensor | None) -> Tensor:
        with products():
            return torch.autograd.grad(bam_loss(z, y, backend=kernels.backend, **named), z)[0]

    def call(z: Tensor, y: Tensor | None, needs_grad: bool) -> Call:
        return Call("benchmark", z.detach(), y, layout, options, ranks, kernels, needs_grad, sixteen_bit)

    def inside(z: Tensor, y: Tensor | None) -> Tensor:
        result = engine.evaluate(call(z, y, needs_grad=True))
        assert result.dz is not None
        return result.dz

    is_public = not sixteen_bit and (not isinstance(kernels, cpu.CpuKernels) or kernels.isa == cpu.kernels().isa)
    run: Callable[..., Tensor] = public if is_public else inside
    if kind in GRAPHS:
        run = GraphReplay(inside, fresh)

    def outputs() -> Truth:
        z, y = fresh()
        if is_public:
            with products():
                P = bam_targets(z.detach(), y, backend=kernels.backend, **named)
        else:
            P = engine.targets(call(z, y, needs_grad=False))
        return Truth(P, run(z, y))

    work = whole_work(layout, options.iterations, 2 if sixteen_bit else 4)
    competitor = our_competitor(kind, kernels, fresh, run, outputs, work)
    competitor.note = "bam_loss" if is_public else f"{engine.__name__.removeprefix('bam_kernels.')}.evaluate"
    if kind in GRAPHS:
        competitor.note += ", replayed; its memory is the graph's"
    return competitor


class GraphReplay:
    """A step captured as a CUDA graph at the first call, then replayed on its own inputs; results stay in place."""

    def __init__(self, step: Callable[..., Tensor], fresh: Callable[[], tuple[Tensor | None, ...]]) -> None:
        self.step, self.fresh = step, fresh
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *_: Tensor | None) -> Tensor:
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _capture(self) -> None:
        inputs = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in self.fresh()]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels, makes plans and allocates libraries' workspaces
            for _ in range(3):
                self.step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.step(*inputs)
        self.graph = graph
