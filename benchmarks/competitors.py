"""The competitors of each benchmark: our kernels, the reference (eager, compiled), matrix products, the authors' code.

Letters of dimensions are defined in bam_kernels/layout.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from authors import Authors
from competitor import GIVEN_SCORES, GRAPHS, WHOLE, Choice, Competitor, Rotation, RowName
from our_kernels import GivenScores, our_competitor, our_whole_competitor
from problem import Problem, Truth, Work, loss_options, loss_work, products_work, sinkhorn_work, whole_work
from torch import Tensor

from bam_kernels import reference
from bam_kernels.engine.cost import flash_supports


def given_scores(
    problem: Problem, source: Tensor, target: Tensor | None, choice: Choice
) -> Iterator[tuple[RowName, GivenScores]]:
    """Yield the kind and the kernels on given scores of each chosen row of ours."""
    for kind, kernels in choice.ours(problem, GIVEN_SCORES):
        yield kind, GivenScores(problem, source, target, kernels, fixed=kind.endswith("int16"))


def sinkhorn_competitors(problem: Problem, scores: Tensor, choice: Choice) -> list[Competitor]:
    """Competitors from scores (M, N) to Sinkhorn potentials. The authors' code returns P (M, N) instead."""
    layout, options = problem.layout, problem.options
    work = sinkhorn_work(layout, options.iterations)
    competitors = []
    for kind, given in given_scores(problem, scores, None, choice):
        fresh = Rotation(given.given[:1], choice.cold_bytes)
        ours = sinkhorn_work(layout, options.iterations, given.score_bytes)
        competitors.append(our_competitor(kind, given.kernels, fresh, given.sinkhorn, given.plan, ours))

    def balance(s: Tensor) -> tuple[Tensor, Tensor]:
        mask = layout.positive_mask(len(s), s.device)
        return reference.log_sinkhorn((s / options.epsilon).masked_fill(mask, -math.inf), options.iterations)[:2]

    def plan(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Truth:
        f, g = run(scores)
        mask = layout.positive_mask(len(scores), scores.device)
        return Truth((scores.double() / options.epsilon + f[:, None] + g).exp().masked_fill_(mask, 0.0), None)

    fresh = Rotation((scores,), choice.cold_bytes)
    if "eager" in choice.rows:
        competitors.append(Competitor("eager", "eager reference", fresh, balance, lambda: plan(balance), work))
    if "compile" in choice.rows:
        compiled = torch.compile(balance, fullgraph=True, dynamic=False)
        competitors.append(Competitor("compile", "torch.compile", fresh, compiled, lambda: plan(compiled), work))
    if "authors" in choice.rows and choice.authors is not None:
        authors = Authors(choice.authors, problem)
        name, note = f"authors {authors.version}", "makes P of all rows"
        competitors.append(
            Competitor(
                "authors", name, fresh, authors.sinkhorn, lambda: Truth(authors.sinkhorn(scores), None), work, note=note
            )
        )
    return competitors


def from_scores_competitors(
    problem: Problem, source: Tensor, target: Tensor | None, choice: Choice
) -> list[Competitor]:
    """Competitors from given scores to the loss and G = dloss/ds, and the matrix products alone for scale.

    Autocast changes nothing about given float32 scores, so its rows are left out.
    """
    layout, options = problem.layout, problem.options
    work = loss_work(layout, options.iterations)
    competitors = []
    for kind, given in given_scores(problem, source, target, choice):
        ours = loss_work(layout, options.iterations, given.score_bytes)
        fresh = Rotation(given.given, choice.cold_bytes)
        competitor = our_competitor(kind, given.kernels, fresh, given.loss, given.outputs, ours)
        if given.fixed:
            G = torch.empty(layout.M, layout.N, device=source.device)
            competitor.run = lambda s, t, given=given, G=G: given.loss(s, t, G)
            competitor.held_bytes, competitor.note = G.nbytes, "G written to a tensor given"
        competitors.append(competitor)

    def loss(s: Tensor, t: Tensor | None) -> Tensor:
        return reference.loss_from_scores(s, s if t is None else t, layout, options)[0]

    def targets() -> Tensor:
        return reference.log_targets(source if target is None else target, layout, options)[0].exp()

    choice = replace(choice, rows=tuple(row for row in choice.rows if not row.endswith("autocast")))
    fresh = Rotation((source, target), choice.cold_bytes, requires_grad=True)
    competitors += torch_competitors(loss, targets, fresh, work, choice)
    competitors += products(problem, choice)
    if choice.authors is not None:
        authors, note = Authors(choice.authors, problem), "its compute_loss, from scores"
        competitors += authors_competitors(authors, authors.from_scores, fresh, work, note, choice)
    return competitors


def whole_competitors(problem: Problem, choice: Choice) -> list[Competitor]:
    """Competitors from embeddings to the loss and its gradient, for one process or one rank's share of several."""
    layout, options = problem.layout, problem.options
    named = loss_options(problem)
    work = whole_work(layout, options.iterations)
    fresh = Rotation((problem.student, problem.teacher), choice.cold_bytes, requires_grad=True)
    rows = WHOLE + (GRAPHS if problem.student.device.type == "cuda" else ())
    ours = choice.ours(problem, rows)
    if not flash_supports(layout, options.top_k, regather=False):
        ours = [(kind, kernels) for kind, kernels in ours if "flash" not in kind]
    competitors = [our_whole_competitor(problem, kind, kernels, fresh) for kind, kernels in ours]

    def loss(z: Tensor, y: Tensor | None) -> Tensor:
        """The loss of `reference.bam_loss` without its checks of arguments, so that it compiles to one graph."""
        rows = reference.normalize(z)[0]
        targets = rows if y is None else reference.normalize(y)[0]
        keys = problem.all_keys(targets[: layout.T * layout.B])
        source = rows @ keys.T
        return reference.loss_from_scores(source, source if y is None else targets @ keys.T, layout, options)[0]

    competitors += torch_competitors(
        loss, lambda: reference.bam_targets(problem.student, problem.teacher, **named), fresh, work, choice
    )
    competitors += products(problem, choice)
    if choice.authors is not None:
        authors = Authors(choice.authors, problem)
        note = "its gather is the identity" if layout.W == 1 else "the other ranks' keys given"
        competitors += authors_competitors(authors, authors.whole, fresh, work, note, choice)
    return competitors


# Factor of a gradient scaler: with it, small entries of 16-bit gradients do not underflow.
GRADIENT_SCALE = 2.0**16


def under_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that returns the gradient of loss(x, ...) by x under autocast, with the loss scaled."""

    def run(x: Tensor, *rest: Tensor | None) -> Tensor:
        dtype = torch.float16 if x.device.type == "cuda" else torch.bfloat16
        with torch.autocast(x.device.type, dtype):
            scaled = loss(x, *rest).float() * GRADIENT_SCALE
        return torch.autograd.grad(scaled, x)[0] / GRADIENT_SCALE

    return run


def torch_competitors(
    loss: Callable[..., Tensor], targets: Callable[[], Tensor], fresh: Rotation, work: Work, choice: Choice
) -> list[Competitor]:
    """The reference as competitors, eager and compiled: loss(x, ...) and its gradient with respect to x."""

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest: torch.autograd.grad(function(x, *rest), x)[0]

    rows = []
    if "eager" in choice.rows:
        run = gradient(loss)
        rows.append(Competitor("eager", "eager reference", fresh, run, lambda: Truth(targets(), run(*fresh())), work))
    # P exists inside the compiled graph only, so the gradient alone is compared.
    if "compile" in choice.rows:
        compiled = gradient(torch.compile(loss, fullgraph=True, dynamic=False))
        outputs = partial(gradient_alone, compiled, fresh)
        rows.append(Competitor("compile", "torch.compile", fresh, compiled, outputs, work))
    if "compile-autocast" in choice.rows:
        mixed = under_autocast(torch.compile(loss, fullgraph=True, dynamic=False))
        outputs = partial(gradient_alone, mixed, fresh)
        name = "torch.compile, autocast"
        rows.append(Competitor("compile-autocast", name, fresh, mixed, outputs, work, precision="autocast"))
    return rows


def gradient_alone(run: Callable[..., Tensor], fresh: Rotation) -> Truth:
    return Truth(None, run(*fresh()))


def authors_competitors(
    authors: Authors, loss: Callable[..., Tensor], fresh: Rotation, work: Work, note: str, choice: Choice
) -> list[Competitor]:
    """The authors' loss as competitors, in float32 and under autocast: loss(x, ...) and its gradient by x."""

    def outputs(run: Callable[..., Tensor]) -> Truth:
        with authors.record_targets() as made:
            gradient = run(*fresh())
        return Truth(made[0].float(), gradient)

    def plain(x: Tensor, *rest: Tensor | None) -> Tensor:
        return torch.autograd.grad(loss(x, *rest), x)[0]

    name, rows = f"authors {authors.version}", []
    if "authors" in choice.rows:
        rows.append(Competitor("authors", name, fresh, plain, partial(outputs, plain), work, note=note))
    if "authors-autocast" in choice.rows:
        mixed, name = under_autocast(loss), name + ", autocast"
        made = partial(outputs, mixed)
        rows.append(Competitor("authors-autocast", name, fresh, mixed, made, work, precision="autocast", note=note))
    return rows


def products(problem: Problem, choice: Choice) -> list[Competitor]:
    """Three torch.mm of a step: scores, dz = G k, and dk = Gᵀ z or, with a teacher, the target scores.

    Without a teacher our engine makes dz and dk of this rank's keys in one product, in 16 bit on one rank only, so it
    can be faster than this row.
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
