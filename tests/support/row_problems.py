"""What the tests of row kernels compute with: scores, one-image problems, and their solution in float64."""

import math

import torch

from bam_kernels import reference
from bam_kernels.backends.cpu import LOG2_E, Potential
from bam_kernels.layout import Layout

MASKED = -1e30
EMPTY = -16777216.0  # the shift of a column whose scores are all masked


def representable(epsilon: float) -> float:
    """The regularisation nearest to `epsilon` whose scale log2(e)/eps is a float32: kernels round the scale once."""
    return LOG2_E / torch.tensor(LOG2_E / epsilon, dtype=torch.float32).item()


def made_scores(m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(m, n, generator=generator) - 1


def masked(scores: torch.Tensor) -> torch.Tensor:
    """The kernels' masked score as minus infinity, in float64."""
    return scores.double().masked_fill(scores <= MASKED, -math.inf)


def log2(p: Potential) -> torch.Tensor:
    return p.exponent.double() + p.mantissa.double().log2()


def rows_of_any_norm(d: int) -> torch.Tensor:
    """(12, d) finite float32 rows: a norm beyond float32, squares beyond it, norms about the floor of 1e-12, others."""
    x = torch.randn(12, d)
    signs = x.sign()
    unit = x / x.norm(dim=1, keepdim=True)
    x[0] = 3e38 * signs[0]
    x[2] = 3e38 * signs[2]
    x[2, 1::2] = 1e-38 * signs[2, 1::2]  # squares that overflow beside squares that vanish
    x[3, 0] = 3e38  # an entry that outweighs the others
    x[4] = 1e19 * unit[4]  # the norm's square overflows, the norm does not
    x[5] = 1.02e-12 * unit[5]
    x[6] = 0.98e-12 * unit[6]
    x[7] = 1e-13 * unit[7]
    x[8] = 1e-20 * unit[8]
    x[9] = 1e-42 * signs[9]  # no normal numbers
    x[10] = 0
    return x  # 1 and 11 as they were


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float, absolute: float = 0.0) -> None:
    error = (actual.double() - expected.double()).abs()
    assert (error <= relative * expected.double().abs() + absolute).all(), error.max()


def match_problem(V: int, L: int, B: int, T: int, W: int, epsilon: float):
    """Scores with masked positives, columns in gathered order, and column potentials near those of one iteration.

    The potentials are unequal: with exact ones at small eps, columns tie that have their largest entry in one row.
    """
    layout = Layout(B=B, V=V, L=L, T=T, D=1, W=W, rank=W - 1)
    scores = made_scores(layout.M, layout.N)
    mask = layout.to_gathered(layout.positive_mask(layout.M))
    scores[mask] = MASKED
    g = -torch.logsumexp(masked(scores) / epsilon, 0) * LOG2_E + torch.linspace(0, 3, layout.N).double()
    col = Potential(g.floor().float(), torch.exp2(g - g.floor()).float())
    return layout, scores, col


def expected_match(layout: Layout, scores: torch.Tensor, col: Potential, epsilon: float, tau: float, k: int):
    """Targets, loss and dloss/ds in float64, in gathered column order."""
    s = masked(scores)
    rows = layout.L * layout.B
    log_P = torch.log_softmax(s[:rows] / epsilon + col.natural_log(), 1)
    if k:
        public = reference._keep_top_k(layout.to_public(log_P), layout, k)
        log_P = layout.to_gathered(public)
    P = log_P.exp().view(layout.L, layout.B, layout.N)
    s = s.clone().requires_grad_()
    log_A = torch.log_softmax(s / tau, 1).view(layout.V, layout.B, layout.N)
    log_A = log_A.masked_fill(log_A == -math.inf, 0.0)
    loss = s.new_zeros(())
    for v in range(layout.V):
        for t in layout.target_terms(v):
            loss = loss - layout.pair_weight * (P[t] * log_A[v]).sum()
    (G,) = torch.autograd.grad(loss / layout.B, s)
    return P, loss.detach(), G, torch.special.entr(P).sum(), -(log_A.exp() * log_A).sum().detach()
