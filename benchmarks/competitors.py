"""What is compared: our kernels, the eager reference, the compiled reference, the products alone, the authors' code.

Letters are those of bam_kernels/layout.py. Each function at the end gives the competitors of one benchmark.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from authors import Authors
from problem import Problem, Truth, Work, loss_options, loss_work, products_work, sinkhorn_work, whole_work
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import cpu, cuda, triton
from bam_kernels.backends.interface import FIXED_STEPS, LOG2_E, Positives, Potential, RowKernels
from bam_kernels.engine import flash, slab
from bam_kernels.ranks import ONE_RANK

RowName = Literal[
    "cpu",
    "cpu-int16",
    "triton",
    "triton-int16",
    "triton-flash",
    "triton-flash-int16",
    "cuda",
    "cuda-int16",
    "eager",
    "compile",
    "gemms",
    "authors",
]
GIVEN_SCORES: tuple[RowName, ...] = ("cpu", "cpu-int16", "triton", "triton-int16", "cuda", "cuda-int16")
WHOLE: tuple[RowName, ...] = (
    "cpu",
    "triton",
    "triton-int16",
    "triton-flash",
    "triton-flash-int16",
    "cuda",
    "cuda-int16",
)
OURS: tuple[RowName, ...] = tuple(dict.fromkeys(GIVEN_SCORES + WHOLE))
Isa = Literal["auto", "avx512", "avx2", "plain"]


@dataclass
class Competitor:
    """run(*fresh()) is timed, fresh() is not; outputs() is what is compared with the truth, None: nothing to compare.

    kind is the name that options and ratios use, name the one printed; held_bytes are outputs given to `run`.
    """

    kind: RowName
    name: str
    fresh: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    outputs: Callable[[], Truth] | None
    work: Work
    precision: str = "float32"
    held_bytes: int = 0
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.kind in OURS


@dataclass(frozen=True)
class Choice:
    """Which competitors to make."""

    rows: tuple[RowName, ...]
    isa: tuple[Isa, ...]
    authors: Path | None
    cold_bytes: int  # written between two uses of a buffer: more than a GPU's L2 holds

    def ours(self, problem: Problem, all_rows: tuple[RowName, ...]) -> list[tuple[RowName, RowKernels]]:
        """Of `all_rows` those that are chosen and can run on the problem's device; the CPU's for each instruction set.

        int16 is the scores' type: in the whole loss rows, keys and gradient are fp16 with it.
        """
        device = problem.student.device
        chosen = [row for row in all_rows if row in self.rows]
        found: list[tuple[RowName, RowKernels]] = []
        if device.type == "cpu" and cpu.unavailable() is None:
            found += [(row, cpu.kernels(isa)) for isa in self.isa for row in chosen if row.startswith("cpu")]
        if triton.unavailable(device) is None:
            found += [(row, triton.kernels()) for row in chosen if row.startswith("triton")]
        if cuda.unavailable(device) is None:
            found += [(row, cuda.kernels()) for row in chosen if row.startswith("cuda")]
        return found


class Rotation:
    """Fresh copies of the same tensors in buffers used in turn, so that what a GPU run reads has left the cache."""

    def __init__(self, given: tuple[Tensor | None, ...], cold_bytes: int, requires_grad: bool = False) -> None:
        self.given = given
        self.requires_grad = requires_grad
        size = sum(x.nbytes for x in given if x is not None)
        self.buffers = deque(self._copy() for _ in range(1 + math.ceil(cold_bytes / size)))

    def _copy(self) -> tuple[Tensor | None, ...]:
        return tuple(x.clone() if x is not None else None for x in self.given)

    def __call__(self) -> tuple[Tensor | None, ...]:
        for buffer, x in zip(self.buffers[0], self.given, strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        self.buffers.rotate(-1)
        first, *rest = self.buffers[0]
        return (first.detach().requires_grad_(), *rest) if self.requires_grad and first is not None else (first, *rest)


def fixed_point(scores: Tensor, problem: Problem, kernels: Any) -> tuple[Tensor, float]:
    """Masked int16 scores and the value of one step; not timed, as the product's epilogue would write them."""
    step = scores.abs().max().item() / FIXED_STEPS
    masked = kernels.mask_positives_(scores.clone(), Positives(problem.layout, 0, len(scores)))
    return kernels.quantize(masked, step, torch.empty_like(scores, dtype=torch.int16)), step


class GivenScores:
    """Our kernels from given scores, columns in gathered order."""

    def __init__(
        self, problem: Problem, source: Tensor, target: Tensor | None, kernels: RowKernels, fixed: bool
    ) -> None:
        self.problem, self.kernels, self.step = problem, kernels, 1.0
        given = [x if x is None else problem.layout.to_gathered(x) for x in (source, target)]
        if fixed:
            # One step serves both, as one set of keys does in the engine.
            both = torch.cat([x for x in given if x is not None])
            made, self.step = fixed_point(both, problem, kernels)
            given = [made[: len(source)], made[len(source) :] if target is not None else None]
        self.given = tuple(given)
        self.fixed = fixed
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
        """Potentials of all rows and columns: `slab.balance` leaves the last row step to the next kernel."""
        row, col = self.balance(rows)
        scale = LOG2_E / self.problem.options.epsilon * self.step
        self.kernels.sinkhorn_pass(rows, scale, row, col, self.c, accumulate=False)
        return row, col

    def plan(self) -> Truth:
        """P (M, N) from the potentials, put together in float64."""
        rows = self.given[0].clone()
        row, col = self.sinkhorn(rows)
        log_K = rows.double() * (self.step / self.problem.options.epsilon)
        P = (log_K + row.natural_log()[:, None] + col.natural_log()).exp()
        mask = self.problem.layout.to_gathered(self.problem.layout.positive_mask(len(rows), rows.device))
        return Truth(self.problem.layout.to_public(P.masked_fill_(mask, 0.0)), None)

    def targets(self) -> Tensor:
        """P (L*B, N) as the match kernel makes it, gathered order."""
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


def sinkhorn_competitors(problem: Problem, scores: Tensor, choice: Choice) -> list[Competitor]:
    """From given scores (M, N) to potentials; the authors' code goes on to P (M, N), which is its result."""
    layout, options = problem.layout, problem.options
    work = sinkhorn_work(layout, options.iterations)
    made = []
    for kind, kernels in choice.ours(problem, GIVEN_SCORES):
        fixed = kind.endswith("int16")
        given = GivenScores(problem, scores, None, kernels, fixed)
        fresh = Rotation(given.given[:1], choice.cold_bytes)
        ours = sinkhorn_work(layout, options.iterations, 2) if fixed else work
        made.append(our_competitor(kind, kernels, fresh, given.sinkhorn, given.plan, ours))

    def balance(s: Tensor) -> tuple[Tensor, Tensor]:
        mask = layout.positive_mask(len(s), s.device)
        return reference.log_sinkhorn((s / options.epsilon).masked_fill(mask, -math.inf), options.iterations)[:2]

    def plan(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Truth:
        f, g = run(scores)
        mask = layout.positive_mask(len(scores), scores.device)
        return Truth((scores.double() / options.epsilon + f[:, None] + g).exp().masked_fill_(mask, 0.0), None)

    fresh = Rotation((scores,), choice.cold_bytes)
    if "eager" in choice.rows:
        made.append(Competitor("eager", "eager reference", fresh, balance, lambda: plan(balance), work))
    if "compile" in choice.rows:
        compiled = torch.compile(balance, fullgraph=True, dynamic=False)
        made.append(Competitor("compile", "torch.compile", fresh, compiled, lambda: plan(compiled), work))
    if "authors" in choice.rows and choice.authors is not None:
        authors = Authors(choice.authors, problem)
        name, note = f"authors {authors.version}", "makes P of all rows"
        made.append(
            Competitor(
                "authors", name, fresh, authors.sinkhorn, lambda: Truth(authors.sinkhorn(scores), None), work, note=note
            )
        )
    return made


def our_competitor(
    kind: RowName,
    kernels: RowKernels,
    fresh: Callable[[], tuple[Any, ...]],
    run: Callable[..., Any],
    outputs: Callable[[], Truth],
    work: Work,
) -> Competitor:
    fixed = kind.endswith("int16")
    isa = f" {kernels.isa}" if isinstance(kernels, cpu.CpuKernels) else ""
    name = kernels.backend + isa + kind.removeprefix(kernels.backend).replace("-", " ")
    return Competitor(kind, name, fresh, run, outputs, work, precision="int16" if fixed else "float32")


def from_scores_competitors(
    problem: Problem, source: Tensor, target: Tensor | None, choice: Choice
) -> list[Competitor]:
    """From given scores to the loss and G = dloss/ds; the products alone beside them for scale."""
    layout, options = problem.layout, problem.options
    work = loss_work(layout, options.iterations)
    made = []
    for kind, kernels in choice.ours(problem, GIVEN_SCORES):
        fixed = kind.endswith("int16")
        given = GivenScores(problem, source, target, kernels, fixed)
        ours = loss_work(layout, options.iterations, 2) if fixed else work
        fresh = Rotation(given.given, choice.cold_bytes)
        competitor = our_competitor(kind, kernels, fresh, given.loss, given.outputs, ours)
        if fixed:
            G = torch.empty(layout.M, layout.N, device=source.device)
            competitor.run = lambda s, t, given=given, G=G: given.loss(s, t, G)
            competitor.held_bytes, competitor.note = G.nbytes, "G written to a tensor given"
        made.append(competitor)

    def loss(s: Tensor, t: Tensor | None) -> Tensor:
        return reference.loss_from_scores(s, s if t is None else t, layout, options)[0]

    def targets() -> Tensor:
        return reference.log_targets(source if target is None else target, layout, options)[0].exp()

    fresh = Rotation((source, target), choice.cold_bytes, requires_grad=True)
    made += torch_competitors(loss, targets, fresh, work, choice)
    made += products(problem, choice)
    if "authors" in choice.rows and choice.authors is not None:
        authors = Authors(choice.authors, problem)
        made.append(authors_competitor(authors, authors.from_scores, fresh, work, "its compute_loss, from scores"))
    return made


def whole_competitors(problem: Problem, choice: Choice) -> list[Competitor]:
    """From embeddings to the loss and its gradient, one process."""
    layout, options = problem.layout, problem.options
    named = loss_options(problem)
    work = whole_work(layout, options.iterations)
    fresh = Rotation((problem.student, problem.teacher), choice.cold_bytes, requires_grad=True)
    made = [whole_ours(problem, kind, kernels, fresh) for kind, kernels in choice.ours(problem, WHOLE)]

    def loss(z: Tensor, y: Tensor | None) -> Tensor:
        """`reference.bam_loss` from the reference's own parts, without its checks, so that it is one graph."""
        rows = reference.normalize(z)[0]
        targets = rows if y is None else reference.normalize(y)[0]
        keys = targets[: layout.N]
        source = rows @ keys.T
        return reference.loss_from_scores(source, source if y is None else targets @ keys.T, layout, options)[0]

    made += torch_competitors(
        loss, lambda: reference.bam_targets(problem.student, problem.teacher, **named), fresh, work, choice
    )
    made += products(problem, choice)
    if "authors" in choice.rows and choice.authors is not None:
        authors = Authors(choice.authors, problem)
        made.append(authors_competitor(authors, authors.whole, fresh, work, "its gather is the identity"))
    return made


def whole_ours(problem: Problem, kind: RowName, kernels: RowKernels, fresh: Rotation) -> Competitor:
    """`bam_loss` forward and backward; in 16 bit, or with an instruction set that is not the best, the engine inside.

    16 bit is a switch inside the engine: float32 input keeps to float32 unless torch's flag lets products be rounded.
    """
    layout, options, sixteen_bit = problem.layout, problem.options, kind.endswith("int16")
    engine: Any = flash if "flash" in kind else slab
    named = loss_options(problem) | ({"engine": "flash"} if engine is flash else {})

    def public(z: Tensor, y: Tensor | None) -> Tensor:
        return torch.autograd.grad(bam_loss(z, y, backend=kernels.backend, **named), z)[0]

    def inside(z: Tensor, y: Tensor | None) -> Tensor:
        result = engine.evaluate(
            "benchmark", z.detach(), y, layout, options, ONE_RANK, kernels, needs_grad=True, sixteen_bit=sixteen_bit
        )
        assert result.dz is not None
        return result.dz

    is_public = not sixteen_bit and (not isinstance(kernels, cpu.CpuKernels) or kernels.isa == cpu.kernels().isa)
    run = public if is_public else inside

    def outputs() -> Truth:
        z, y = fresh()
        if is_public:
            P = bam_targets(z.detach(), y, backend=kernels.backend, **named)
        else:
            given = ("benchmark", z.detach(), y, layout, options, ONE_RANK, kernels)
            P = engine.targets(*given, sixteen_bit=sixteen_bit)
        return Truth(P, run(z, y))

    work = whole_work(layout, options.iterations, 2 if sixteen_bit else 4)
    competitor = our_competitor(kind, kernels, fresh, run, outputs, work)
    competitor.note = "bam_loss" if is_public else f"{engine.__name__.removeprefix('bam_kernels.')}.evaluate"
    return competitor


def torch_competitors(
    loss: Callable[..., Tensor], targets: Callable[[], Tensor], fresh: Rotation, work: Work, choice: Choice
) -> list[Competitor]:
    """The reference, eager and compiled, forward and backward. loss(x, ...) is differentiated with respect to x."""

    def made(kind: RowName, name: str, function: Callable[..., Tensor], P: Callable[[], Tensor | None]) -> Competitor:
        def run(x: Tensor, *rest: Tensor | None) -> Tensor:
            return torch.autograd.grad(function(x, *rest), x)[0]

        return Competitor(kind, name, fresh, run, lambda: Truth(P(), run(*fresh())), work)

    rows = []
    if "eager" in choice.rows:
        rows.append(made("eager", "eager reference", loss, targets))
    if "compile" in choice.rows:
        compiled = torch.compile(loss, fullgraph=True, dynamic=False)
        # P exists inside the compiled graph only; its error shows in the gradient.
        rows.append(made("compile", "torch.compile", compiled, lambda: None))
    return rows


def authors_competitor(
    authors: Authors, run: Callable[..., Tensor], fresh: Rotation, work: Work, note: str
) -> Competitor:
    def outputs() -> Truth:
        with authors.recorded() as made:
            gradient = run(*fresh())
        return Truth(made[0], gradient)

    return Competitor("authors", f"authors {authors.version}", fresh, run, outputs, work, note=note)


def products(problem: Problem, choice: Choice) -> list[Competitor]:
    """Three library products into tensors given: scores, dz = G k, and dk = Gᵀ z or a teacher's target scores.

    Without a teacher and with the keys' own rows at hand ours makes dz and dk in one product, so it may be below this.
    """
    if "gemms" not in choice.rows:
        return []
    z = reference.normalize(problem.student)[0]
    y = None if problem.teacher is None else reference.normalize(problem.teacher)[0]
    k = problem.keys
    G = z @ k.T
    source, dz, dk = torch.empty_like(G), torch.empty_like(z), torch.empty_like(k)
    target = None if y is None else torch.empty(len(y), len(k), device=k.device)

    def run(z: Tensor, k: Tensor, G: Tensor, y: Tensor | None) -> None:
        torch.mm(z, k.T, out=source)
        torch.mm(G, k, out=dz)
        if y is None:
            torch.mm(G.T, z, out=dk)
        else:
            torch.mm(y, k.T, out=target)

    held = sum(x.nbytes for x in (source, dz, dk if y is None else target) if x is not None)
    return [
        Competitor(
            "gemms",
            "products alone",
            Rotation((z, k, G, y), choice.cold_bytes),
            run,
            None,
            products_work(problem.layout),
            held_bytes=held,
            note="three torch.mm",
        )
    ]
