"""The whole loss by the Triton row kernels against the published implementation's float64 outputs."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from problems import FLOAT32, GOLDEN_FILES, Problem, load
from torch import Tensor
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import triton as backend
from bam_kernels.backends.cpu import LOG2_E, Matched, Potential
from bam_kernels.layout import Layout

kernels = backend.kernels()


@dataclass
class Loss:
    """One process: keys centred, scores in slabs of rows, products by torch.mm; see engine/slab.py for the form."""

    problem: Problem
    fixed: bool = False
    slab: int = 1 << 30

    def __post_init__(self) -> None:
        p, o = self.problem, self.problem.options
        V, B, D = p.student.shape
        self.layout = Layout(B=B, V=V, L=o["target_views"], T=o["key_views"], D=D)
        self.z, self.norm = kernels.normalize(p.student.to(DEVICE).view(V * B, D))
        self.y = None if p.teacher is None else kernels.normalize(p.teacher.to(DEVICE).flatten(0, 1))[0]
        keys = (self.z if self.y is None else self.y)[: self.layout.N]
        self.rows = self.z if self.y is None or o["target_rows"] == "student" else self.y
        self.centre = keys.mean(0)
        self.keys = keys - self.centre
        self.step = self.keys.norm(dim=1).max() / 32000 if self.fixed else 1.0
        self.row = kernels.centre_potential(self.rows, self.centre, o["epsilon"])

    def scores(self, unit: Tensor) -> Tensor:
        s = unit @ self.keys.T
        if self.problem.options["mask_positives"]:
            kernels.mask_positives_(s, self.layout, 0)
        return kernels.quantize(s, self.step, torch.empty_like(s, dtype=torch.int16)) if self.fixed else s

    def slabs(self, s: Tensor) -> Iterator[tuple[Tensor, Potential, bool]]:
        for first in range(0, len(s), self.slab):
            last = min(first + self.slab, len(s))
            yield s[first:last], self.row.rows(first, last), first > 0

    def balance(self, s: Tensor) -> Potential:
        o, n = self.problem.options, self.layout.N
        scale = LOG2_E / o["epsilon"] * self.step
        shift, sums, c = torch.empty(3, n, device=DEVICE)
        for part, row, accumulate in self.slabs(s):
            kernels.column_lse(part, scale, row, shift, sums, accumulate)
        col = kernels.reciprocal_potential(shift, sums)
        for _ in range(o["iterations"] - 1):
            for part, row, accumulate in self.slabs(s):
                kernels.sinkhorn_pass(part, scale, row, col, c, accumulate)
            kernels.divide_potential_(col, c)
        return col

    def evaluate(self) -> tuple[Matched, Tensor, Tensor]:
        """The sums, dz (V*B, D) and P (L*B, N)."""
        o, layout = self.problem.options, self.layout
        s = self.scores(self.rows)
        source = s if self.rows is self.z else self.scores(self.z)
        shape = (-1, layout.B, layout.N)
        P = torch.empty(layout.L, layout.B, layout.N, device=DEVICE)
        G = torch.empty(source.shape, device=DEVICE) if self.fixed else source
        col = self.balance(s)
        matched = kernels.match(
            s.view(shape)[: layout.L],
            source.view(shape),
            layout,
            col,
            self.row.exponent.view(-1, layout.B)[: layout.L],
            epsilon=o["epsilon"],
            temperature=o["temperature"],
            step=self.step,
            top_k=o["top_k"],
            targets=P,
            gradient=G.view(shape),
        )
        dz = G @ self.keys
        if self.y is None:
            dz[: layout.N] += G.T @ self.z
        return matched, kernels.project_(dz, self.z, self.norm), P.view(-1, layout.N)


# The interpreter takes a second for each: there those of one rank alone.
FILES = [path for path in GOLDEN_FILES if DEVICE.type != "cpu" or path.stem.endswith("_w1")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    problem = load(path)
    matched, dz, P = Loss(problem).evaluate()
    problem.check_loss(matched.loss.cpu() / problem.student.shape[1], FLOAT32)
    problem.check_target(P.cpu(), FLOAT32)
    problem.check_grad(dz.cpu().view_as(problem.student), FLOAT32)


def test_fixed_point_scores_and_slabs():
    problem = load(next(path for path in GOLDEN_FILES if path.stem == "v2_l2_w2"))
    _, dz, P = Loss(problem, fixed=True, slab=7).evaluate()
    error = (dz.cpu().double().view_as(problem.grad) - problem.grad).norm() / problem.grad.norm()
    assert error <= 1e-3
    assert ((P.cpu() - problem.target).norm() / problem.target.norm()) <= 1e-3
