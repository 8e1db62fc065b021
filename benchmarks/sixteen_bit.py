"""Competitors for the whole loss in mixed precision: our kernels, the products alone, and references under autocast.

On a GPU the embeddings are fp16, as a head returns them under autocast. On a CPU they are float32, and products under
autocast are bf16. A gradient scaler multiplies the loss, and the gradient has the embeddings' type. The products, and
rows whose kind ends in -graph, are replayed as CUDA graphs. Letters of dimensions are defined in bam_kernels/layout.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from authors import Authors
from competitor import SCORES_AGAIN, Competitor, RowName
from competitors import GRADIENT_SCALE
from our_kernels import GraphReplay
from problem import Problem, Truth, layout_of, loss_options, parse_shape, products_work, whole_work
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import cpu, cuda, triton
from bam_kernels.engine.cost import flash_supports
from bam_kernels.layout import Layout
from bam_kernels.options import Options

Step = Callable[..., Tensor]
SMALL_BUDGET = 100_000_000  # bytes; too little to keep the scores of a large problem


def sixteen_bit_layout(shape: str, views: int, teacher: bool) -> Layout:
    """Layout of an MxNxD problem in which L = T = 2 and a teacher, if any, has all views."""
    return layout_of(*parse_shape(shape), V=views, L=2, T=2, R=views if teacher else 0)


def sixteen_bit_problem(layout: Layout, device: torch.device) -> Problem:
    """A problem with default options and 16-bit embeddings (fp16) on a GPU, float32 ones on a CPU."""
    problem = Problem.generate(layout, Options(), device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    y = problem.teacher
    return replace(problem, student=problem.student.to(dtype), teacher=None if y is None else y.to(dtype))


def scaled_gradient(loss: Step) -> Step:
    """A function that returns the gradient of GRADIENT_SCALE * loss(z, ...) by z."""

    def step(z: Tensor, *rest: Tensor | None) -> Tensor:
        return torch.autograd.grad(loss(z, *rest).float() * GRADIENT_SCALE, z)[0]

    return step


def our_step(problem: Problem, backend: str, engine: str = "slab", **more: object) -> Step:
    """A function from (z, y) to the scaled gradient of the public `bam_loss`, which takes the options `more` too."""
    named = loss_options(problem) | {"backend": backend} | more
    if backend == "triton":
        named["engine"] = engine
    return scaled_gradient(lambda z, y: bam_loss(z, y, **named))


def unavailable(kind: RowName, problem: Problem, authors: Path | None) -> str | None:
    """Why this kind of row cannot run on the problem; None if it can."""
    device = problem.student.device
    if "flash" in kind and not flash_supports(problem.layout, 0, regather=False):
        return f"flash takes no D = {problem.layout.D}"
    if kind.startswith("authors"):
        return "no checkout of the authors' code was given" if authors is None else None
    if kind == "cpu":
        return cpu.unavailable()
    on_gpus = {"cuda": cuda, "triton": triton}.get(kind.split("-")[0])
    return on_gpus.unavailable(device) if on_gpus is not None else None


class Competitors:
    """Factory of one problem's competitors.

    fresh() returns (student as a leaf, teacher); `compiler` is the backend of torch.compile.
    """

    def __init__(
        self,
        problem: Problem,
        fresh: Callable[[], tuple[Tensor | None, ...]],
        authors: Path | None,
        compiler: str = "inductor",
    ) -> None:
        self.problem, self.fresh, self.authors, self.compiler = problem, fresh, authors, compiler
        self.cuda = problem.student.device.type == "cuda"
        self.half = torch.float16 if self.cuda else torch.bfloat16
        self.work = whole_work(problem.layout, problem.options.iterations, 2)

    def competitor(self, kind: RowName) -> Competitor:
        if kind == "gemms-half":
            return self._products()
        if kind.startswith("compile"):
            by = "" if self.compiler == "inductor" else f" by {self.compiler}"
            return self._made(kind, f"torch.compile{by}, autocast", self._compiled, None, "autocast")
        if kind.startswith("authors"):
            return self._authors(kind)
        backend = kind.split("-")[0]
        engine = "flash" if "flash" in kind else "slab"
        budget = {"memory_budget": SMALL_BUDGET} if kind in SCORES_AGAIN else {}
        step = our_step(self.problem, backend, engine, **budget)
        named = loss_options(self.problem) | {"backend": backend} | ({"engine": engine} if backend == "triton" else {})
        precision = "fp16" if "int16" in kind else "float32"
        name = kind.removesuffix("-graph").replace("-", " ")

        def targets() -> Tensor:
            student, teacher = self.problem.student, self.problem.teacher
            return bam_targets(student, teacher, **named)

        return self._made(kind, name, step, targets, precision)

    def _made(
        self, kind: RowName, name: str, step: Step, targets: Callable[[], Tensor] | None, precision: str
    ) -> Competitor:
        """A competitor from its step; `targets` returns P, and is None if P exists within the step only."""
        graph = kind.endswith("-graph")
        run = GraphReplay(step, self.fresh) if graph else step

        def outputs() -> Truth:
            gradient = run(*self.fresh()).float() / GRADIENT_SCALE
            return Truth(None if targets is None else targets(), gradient)

        name, note = (f"{name}, graph", "replayed; its memory is the graph's") if graph else (name, "")
        return Competitor(kind, name, self.fresh, run, outputs, self.work, precision=precision, note=note)

    @cached_property
    def _compiled(self) -> Step:
        """The reference compiled to one graph: float32 unit rows, 16-bit keys and products, float32 scores."""
        layout, options, half = self.problem.layout, self.problem.options, self.half
        T, W, B, D = layout.T, layout.W, layout.B, layout.D
        others = self.problem.keys.view(T, W, B, D)[:, 1:].to(half)  # other ranks send their keys in 16 bit

        def loss(z: Tensor, y: Tensor | None, others: Tensor) -> Tensor:
            rows = torch.nn.functional.normalize(z.float(), dim=-1)
            targets = rows if y is None else torch.nn.functional.normalize(y.float(), dim=-1)
            own = targets[: T * B].to(half).view(T, 1, B, D)
            keys = torch.cat((own, others), 1).reshape(layout.N, D)
            source = (rows @ keys.T).float()
            target = source if y is None else (targets @ keys.T).float()
            return reference.loss_from_scores(source, target, layout, options)[0]

        compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=self.compiler)
        return scaled_gradient(lambda z, y: self._under_autocast(compiled, z, y, others))

    def _under_autocast(self, loss: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        with torch.autocast(self.problem.student.device.type, self.half):
            return loss(*given)

    def _authors(self, kind: RowName) -> Competitor:
        assert self.authors is not None
        published = Authors(self.authors, self.problem)
        step = scaled_gradient(lambda z, y: self._under_autocast(published.whole, z, y))

        def outputs() -> Truth:
            with published.record_targets() as targets:
                gradient = step(*self.fresh())
            return Truth(targets[0].float(), gradient.float() / GRADIENT_SCALE)

        name = f"authors {published.version}, autocast"
        note = "its gather is the identity" if self.problem.layout.W == 1 else "the other ranks' keys given"
        return Competitor(kind, name, self.fresh, step, outputs, self.work, precision="autocast", note=note)

    def _products(self) -> Competitor:
        """Three 16-bit torch.mm into preallocated tensors: scores, dz = G k, and dk = Gᵀ z or the target scores."""
        problem = self.problem
        z, k = reference.normalize(problem.student.float())[0].to(self.half), problem.keys.to(self.half)
        y = None if problem.teacher is None else reference.normalize(problem.teacher.float())[0].to(self.half)
        G = z @ k.T
        source, dz, dk = torch.empty_like(G), torch.empty_like(z), torch.empty_like(k)
        target = None if y is None else y.new_empty(len(y), len(k))

        def products() -> Tensor:
            torch.mm(z, k.T, out=source)
            torch.mm(G, k, out=dz)
            if y is None:
                return torch.mm(G.T, z, out=dk)
            return torch.mm(y, k.T, out=target)

        replayed = GraphReplay(products, lambda: ())

        def run(*_: Tensor | None) -> Tensor:
            return replayed() if self.cuda else products()

        held = sum(x.nbytes for x in (source, dz, dk if y is None else target) if x is not None)
        name, note = f"three products, {'fp16' if self.cuda else 'bf16'}", "torch.mm" + (", replayed" * self.cuda)
        work = products_work(problem.layout)
        return Competitor(
            "gemms-half", name, self.fresh, run, None, work, precision="autocast", held_bytes=held, note=note
        )
