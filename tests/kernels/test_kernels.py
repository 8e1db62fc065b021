"""Each row kernel of csrc/cpu against float64, for every instruction set that this processor runs."""

import math
import platform

import pytest
import torch
from embedding_tests import NormTests
from row_problems import (
    MASKED,
    assert_close,
    expected_match,
    log2,
    made_scores,
    masked,
    match_problem,
    representable,
)
from sinkhorn_tests import ColumnTotalTests

from bam_kernels.backends import cpu
from bam_kernels.backends.cpu import LOG2_E, CpuKernels, Potential
from bam_kernels.engine.sums import loss_and_stats
from bam_kernels.layout import Layout

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

# A single entry; a tail shorter than any vector; around 8 and 16 lanes; a prime; around a panel of 1024 columns.
COLUMNS = (1, 3, 7, 8, 9, 15, 16, 17, 97, 1023, 1024, 1025)
# One row; around a block of 4 rows; more than one chunk of 32 rows; more than 64 chunks of 32.
ROWS = (1, 3, 4, 5, 33, 2055)


def isas() -> list[str]:
    best = cpu.kernels().isa
    return {"avx512": ["avx512", "avx2", "plain"], "avx2": ["avx2", "plain"]}.get(best, ["plain"])


@pytest.fixture(params=isas())
def kernels(request) -> CpuKernels:
    return cpu.kernels(request.param)


EPSILONS = [representable(0.05), representable(1e-3)]


def fixed(kernels: CpuKernels, scores: torch.Tensor) -> tuple[torch.Tensor, float]:
    step = 1 / 32000
    return kernels.quantize(scores, step, torch.empty(scores.shape, dtype=torch.int16)), step


def test_exponentials(kernels):
    """E_ij = 2^s_ij alone: precise where it is a normal number, exactly 0 far below, huge or infinite far above."""
    s = torch.cat([torch.linspace(-126, 126.9, 200_001), torch.linspace(-2, 2, 100_000), torch.arange(-126.0, 127.0)])
    far = torch.tensor([-151.0, -1e3, MASKED, -math.inf, 128.0, 1e3, 1e30])
    E = torch.zeros(1, len(s) + len(far))
    scores, less_one = torch.cat([s, far])[None], torch.full((1,), -1.0)
    kernels.plan_subtract_(E, scores, 1.0, Potential.one(1), Potential.one(E.shape[1]), less_one, None)
    bound = {"avx512": 9e-8, "avx2": 2e-7, "plain": 3e-7}[kernels.isa]
    assert_close(E[0, : len(s)], torch.exp2(s.double()), bound)
    assert E[0, len(s) :][:4].tolist() == [0.0] * 4
    assert (E[0, len(s) :][4:] >= 2.0**127).all()


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
def test_column_lse(kernels, n, epsilon):
    for m in ROWS:
        scores = made_scores(m, n)
        row = kernels.centre_potential(made_scores(m, 3, 1), torch.tensor([0.5, -0.2, 0.1]), epsilon)
        shift, sums = torch.empty(n), torch.empty(n)
        kernels.column_lse(scores, LOG2_E / epsilon, row, shift, sums, accumulate=False)
        expected = torch.logsumexp(scores.double() / epsilon + row.natural_log()[:, None], 0) * LOG2_E
        assert_close(shift.double() + sums.double().log2(), expected, 0, 2e-6)


def test_column_lse_of_slabs_is_that_of_all_rows(kernels):
    m, n, epsilon = 50, 33, representable(0.01)
    scores, row = made_scores(m, n), Potential.one(m)
    shift, sums = torch.empty(n), torch.empty(n)
    for first in range(0, m, 13):
        last = min(first + 13, m)
        kernels.column_lse(scores[first:last], LOG2_E / epsilon, row.rows(first, last), shift, sums, first > 0)
    expected = torch.logsumexp(scores.double() / epsilon, 0) * LOG2_E
    assert_close(shift.double() + sums.double().log2(), expected, 0, 2e-6)


# The row that outweighs the others is the first one, is one of the last, or ends a block of 4 rows in a later chunk.
@pytest.mark.parametrize("largest", [0, 79, 98])
@pytest.mark.parametrize("attended", ["all rows", "no row but the largest and those that follow it"])
def test_column_lse_follows_a_row_far_above_the_others(kernels, largest, attended):
    m, n, scale = 100, 19, LOG2_E / representable(1e-3)
    scores = 0.1 * made_scores(m, n) - 0.9
    scores[largest] += 1.8  # 2600 powers of two above
    if attended != "all rows":
        scores[:largest] = MASKED
    for given, step in ((scores, 1.0), fixed(kernels, scores)):
        shift, sums = torch.empty(n), torch.empty(n)
        kernels.column_lse(given, scale * step, Potential.one(m), shift, sums, accumulate=False)
        exact = torch.where(scores == MASKED, -math.inf, given.double() * step)
        expected = torch.logsumexp(exact * scale / LOG2_E, 0) * LOG2_E
        # The step of int16 scores is rounded with the scale: 2^-24 of exponents of up to 1300.
        assert_close(shift.double() + sums.double().log2(), expected, 0, 2e-6 if step == 1.0 else 1e-4)


def test_column_lse_holds_a_sum_of_many_rows(kernels):
    """Every row adds 2^6 at the shift, so that sums outgrow 2^12 through no single row."""
    m, n = 20000, 17
    shift, sums = torch.full((n,), -6.0), torch.zeros(n)
    kernels.column_lse(torch.zeros(m, n), 1.0, Potential.one(m), shift, sums, accumulate=True)
    assert_close(shift.double() + sums.double().log2(), torch.full((n,), math.log2(m)), 0, 2e-6)


@pytest.mark.parametrize("n", [7, 40])
def test_scores_of_minus_infinity_add_nothing(kernels, n):
    scores = made_scores(37, n)
    scores[::17] = scores[:, 2] = scores[:3, 1] = -math.inf
    row, c, shift, sums = Potential.one(37), torch.empty(n), torch.empty(n), torch.empty(n)
    kernels.column_lse(scores, 10.0, row, shift, sums, accumulate=False)
    attended = [j for j in range(n) if j != 2]
    expected = torch.logsumexp(scores.double() * 10 / LOG2_E, 0) * LOG2_E
    assert_close((shift.double() + sums.double().log2())[attended], expected[attended], 0, 2e-6)
    assert sums[2] == 0
    kernels.sinkhorn_pass(scores, 10.0, row, Potential.one(n), c, accumulate=False)
    expected = torch.softmax(scores.double() * 10 / LOG2_E, 1).nan_to_num(0.0).sum(0)
    assert_close(c, expected, 1e-6)


def test_column_lse_tells_shifts_apart_that_differ_by_a_half(kernels):
    """Exponents beyond 2^22, where floats have halves, in two chunks of rows that are not sampled."""
    m, n = 100, 5
    scores = torch.zeros(m, n)
    scores[33], scores[65] = 4300000.0, 4300000.5
    shift, sums = torch.empty(n), torch.empty(n)
    kernels.column_lse(scores, 1.0, Potential.one(m), shift, sums, accumulate=False)
    expected = 4300000.0 + torch.tensor([1 + math.sqrt(2)]).double().log2().expand(n)
    assert_close(shift.double() + sums.double().log2(), expected, 0, 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_column_potential_that_is_not_finite_shows_in_the_targets(kernels, value):
    layout, scores, col = match_problem(V=2, L=2, B=3, T=2, W=2, epsilon=0.05)
    col.mantissa[3] = value
    P = torch.empty(2, 3, layout.N)
    rows = scores.view(2, 3, layout.N)
    kernels.match(rows, rows, layout, col, torch.zeros(2, 3), epsilon=0.05, temperature=0.1, targets=P)
    assert P.isnan().any(-1).all()


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
def test_sinkhorn_pass(kernels, n, epsilon):
    for m in ROWS:
        scores = made_scores(m, n)
        # Column potentials as large as the scores: what Sinkhorn finds.
        g = -scores.double().amax(0) / epsilon * LOG2_E
        col = Potential(g.floor().float(), torch.exp2(g - g.floor()).float())
        row, c = Potential.one(m), torch.empty(n)
        kernels.sinkhorn_pass(scores, LOG2_E / epsilon, row, col, c, accumulate=False)
        x = scores.double() * LOG2_E / epsilon + log2(col)
        f = -torch.logsumexp(x / LOG2_E, 1) * LOG2_E
        # Two roundings at the size of the exponent, up to 20, where there is no fused multiply-add.
        assert_close(log2(row), f, 0, 1.5e-6 if kernels.isa != "plain" else 3e-6)
        assert_close(c, torch.exp2(x + f[:, None]).sum(0), 5e-6, 1e-9)


def test_a_bad_guess_of_the_row_potential_costs_no_accuracy(kernels):
    m, n, scale = 8, 40, LOG2_E / 0.01
    scores, col = made_scores(m, n), Potential.one(n)
    outcomes = []
    # The last: good and bad ones among rows that are exponentiated together.
    for guess in ([0.0] * m, [-1000.0] * m, [1000.0] * m, [0.0, 1000.0, -1000.0, 0.0] * 2):
        row, c = Potential(torch.tensor(guess), torch.ones(m)), torch.empty(n)
        kernels.sinkhorn_pass(scores, scale, row, col, c, accumulate=False)
        outcomes.append((log2(row), c))
    for f, c in outcomes[1:]:
        assert_close(f, outcomes[0][0], 1e-7, 1e-6)
        assert_close(c, outcomes[0][1], 1e-5, 1e-9)


def test_a_row_with_no_key_left_adds_nothing(kernels):
    scores = made_scores(5, 19)
    scores[2] = MASKED
    row, c = Potential.one(5), torch.empty(19)
    kernels.sinkhorn_pass(scores, 10.0, row, Potential.one(19), c, accumulate=False)
    assert row.mantissa[2] == math.inf
    others = torch.tensor([0, 1, 3, 4])
    expected = torch.softmax(scores[others].double() * 10 / LOG2_E, 1).sum(0)
    assert_close(c, expected, 1e-6)


@pytest.mark.parametrize("n", COLUMNS)
def test_masked_scores_are_skipped_in_both_types(kernels, n):
    if n < 3:
        pytest.skip("two masked columns and one left need three")
    scores = made_scores(6, n)
    scores[:, 1] = MASKED
    scores[3, 0] = MASKED
    scale = LOG2_E / 0.1
    q, step = fixed(kernels, scores)
    assert (q[:, 1] == -32768).all() and q[3, 0] == -32768
    exact = torch.where(q == -32768, -math.inf, q.double() * step)
    for s, used, truth in ((scores, scale, masked(scores)), (q, scale * step, exact)):
        row, c = Potential.one(6), torch.empty(n)
        kernels.sinkhorn_pass(s, used, row, Potential.one(n), c, accumulate=False)
        assert_close(c, torch.softmax(truth / 0.1, 1).sum(0), 1e-5, 1e-12)
        assert c[1] == 0


def test_quantize_rounds_and_clamps(kernels):
    scores = torch.tensor([[0.0, 1e-5, -1e-5, 0.4999, 2.0, -2.0, MASKED, 1.0, -1.0]])
    q, _ = fixed(kernels, scores)
    assert q.tolist() == [[0, 0, 0, 15997, 32767, -32767, -32768, 32000, -32000]]


# V, L, B, T, W: one view; two; multi-crop; more targets than two; fewer key views; several ranks.
@pytest.mark.parametrize(
    "dimensions", [(1, 1, 9, 1, 1), (2, 2, 8, 2, 1), (5, 2, 6, 2, 2), (4, 3, 5, 1, 3), (3, 1, 7, 3, 1)]
)
# Top-k at the larger eps alone: one-hot targets of several views tie in their mean.
@pytest.mark.parametrize(("epsilon", "top_k"), [(0.05, 0), (2e-3, 0), (0.05, 1), (0.05, 5)])
def test_match(kernels, dimensions, epsilon, top_k):
    tau, epsilon = 0.1, representable(epsilon)
    layout, scores, col = match_problem(*dimensions, epsilon)
    P, loss, G, target_entropy, source_entropy = expected_match(layout, scores, col, epsilon, tau, top_k)
    shape = (-1, layout.B, layout.N)
    targets = torch.empty(layout.L, layout.B, layout.N)
    kept = scores.clone()
    matched = kernels.match(
        kept.view(shape)[: layout.L],
        kept.view(shape),
        layout,
        col,
        torch.zeros(layout.L, layout.B),
        epsilon=epsilon,
        temperature=tau,
        top_k=top_k,
        targets=targets,
        gradient=kept.view(shape),
    )
    assert_close(targets, P, 1e-5, 1e-9)
    assert_close(matched.loss, loss, 1e-6, 1e-6 * layout.B)
    assert_close(matched.target_entropy, target_entropy, 1e-5, 1e-5)
    assert_close(matched.source_entropy, source_entropy, 1e-5)
    assert_close(kept, G, 0, 2e-6 * G.abs().max().item())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no other processor is told to flush")
def test_subnormal_numbers_are_flushed_within_kernels_alone(kernels):
    """A gradient of 2^-135 becomes 0. Afterwards torch computes subnormal numbers on all threads."""
    n = 1 << 16  # enough for several threads
    scores = torch.zeros(1, 1, n)
    scores[..., 3] = 100.0  # P of the other columns is 2^-100, A is 2^-50
    G = torch.empty(1, 1, n)
    kernels.match(
        scores,
        scores,
        Layout(B=1, V=1, L=1, T=1, D=1, W=n),
        Potential.one(n),
        torch.full((1, 1), -100.0),
        epsilon=LOG2_E,
        temperature=2 * LOG2_E,
        gradient=G,
        gradient_factor=2 * LOG2_E * 2.0**-85,
    )
    assert (G[..., :3] == 0).all() and (G[..., 4:] == 0).all()
    assert (torch.full((1 << 20,), torch.finfo(torch.float32).tiny) * 0.5 != 0).all()


def test_top_k_breaks_ties_by_the_lower_public_column(kernels):
    # Equal scores everywhere: every column ties. T = 2 key views on W = 3 ranks, so gathered order differs from public.
    layout = Layout(B=4, V=2, L=2, T=2, D=1, W=3, rank=1)
    scores = torch.full((layout.M, layout.N), 0.25)
    targets = torch.empty(2, layout.B, layout.N)
    kernels.match(
        scores.view(2, layout.B, -1),
        None,
        layout,
        Potential.one(layout.N),
        torch.zeros(2, layout.B),
        epsilon=0.05,
        temperature=0.1,
        top_k=7,
        targets=targets,
    )
    public = layout.to_public(targets)
    assert (public[..., :7] == 1 / torch.tensor(7.0)).all()
    assert (public[..., 7:] == 0).all()


def test_top_k_keeps_a_view_whose_kept_mass_underflows(kernels):
    # View 0 puts all its mass on columns that the mean does not keep; its kept columns are below float32's range.
    layout = Layout(B=1, V=2, L=2, T=1, D=1, W=6)
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0, -0.99, -1.0], [-1.0, -1.0, 1.0, 1.0, 0.0, 0.0]])
    epsilon = 0.01
    col = Potential(torch.tensor([-70.0, -70.0, 0.0, 0.0, 0.0, 0.0]), torch.ones(6))
    targets = torch.empty(2, 1, 6)
    kernels.match(
        scores.view(2, 1, 6),
        None,
        layout,
        col,
        torch.zeros(2, 1),
        epsilon=epsilon,
        temperature=0.1,
        top_k=2,
        targets=targets,
    )
    log_P = scores.double() / epsilon + col.natural_log()
    mean = torch.softmax(log_P, 1).mean(0)
    kept = mean.sort(descending=True, stable=True).indices[:2]
    expected = torch.zeros(2, 6, dtype=torch.float64)
    expected[:, kept] = torch.softmax(log_P[:, kept], 1)
    assert_close(targets.view(2, 6), expected, 1e-4, 1e-7)


@pytest.mark.parametrize("n", [1, 8, 33, 1025])
def test_plan_operator(kernels, n):
    m, epsilon = 37, 0.05
    scores = made_scores(m, n)
    row, col = Potential(torch.full((m,), -20.0), torch.full((m,), 1.5)), Potential.one(n)
    E = torch.exp(scores.double() / epsilon + row.natural_log()[:, None] + col.natural_log())
    u, v, x = torch.randn(m), torch.randn(n), torch.randn(m, n)
    y, w = kernels.plan_products(scores, LOG2_E / epsilon, row, col, v, u)
    assert_close(y, E @ v.double(), 0, 1e-5 * (E @ v.double().abs()).max().item())
    assert_close(w, E.T @ u.double(), 0, 1e-5 * (E.T @ u.double().abs()).max().item())
    expected = x.double() - E * (u.double()[:, None] + v.double())
    kernels.plan_subtract_(x, scores, LOG2_E / epsilon, row, col, u, v)
    assert_close(x, expected, 1e-5, 1e-5)


class OnCpu:
    @pytest.fixture
    def whole(self, kernels):
        return kernels

    @pytest.fixture
    def device(self):
        return torch.device("cpu")


class TestNorms(OnCpu, NormTests):
    pass


class TestColumnTotals(OnCpu, ColumnTotalTests):
    pass


# One row; a block of 4 rows and a tail; a chunk of 32 rows and a tail; more than 64 chunks of 32. One feature; tails.
@pytest.mark.parametrize("m", [1, 7, 33, 2055])
@pytest.mark.parametrize("d", [1, 9, 40, 129])
def test_mean_row(kernels, m, d):
    x = torch.randn(m, d + 3)[:, 2:-1]
    rows = x.double()
    # Two roundings of fours of rows, one of the result.
    bound = 2**-24 * (2 * rows.abs().mean(0) + rows.mean(0).abs())
    assert_close(kernels.mean_row(x), rows.mean(0), 0, bound)


# Fewer than the lanes of a sum; whole lanes; a tail.
@pytest.mark.parametrize("count", [1, 8, 700])
@pytest.mark.parametrize("spoilt", ["nothing", "a norm", "column sums"])
def test_loss_and_stats(kernels, count, spoilt):
    layout = Layout(B=count, V=3, L=2, T=2, D=1)
    images, c, norm = (
        torch.rand(3, count, dtype=torch.float64),
        1 + torch.rand(2 * count),
        torch.rand(3 * count).double(),
    )
    if spoilt == "a norm":
        norm[-1] = math.inf
    if spoilt == "column sums":  # after a single iteration
        c.fill_(math.nan)
    loss, stats = kernels.loss_and_stats(images, c, norm, layout, 7.5)
    expected_loss, expected = loss_and_stats(images, c.double(), norm, layout, 7.5)
    assert expected.isnan().sum() == {"nothing": 0, "a norm": 4, "column sums": 1}[spoilt]
    assert torch.equal(stats.isnan(), expected.isnan()) and torch.equal(loss.isnan(), expected_loss.isnan())
    # Float32's rounding of the result, and of the terms that cancel in its differences.
    assert_close(loss.nan_to_num(), expected_loss.nan_to_num(), 2**-24)
    assert_close(stats.nan_to_num(), expected.nan_to_num(), 2**-24, 1e-15)
    without_norm = kernels.loss_and_stats(images, c, None, layout, 7.5)[0]
    assert_close(without_norm, images[0].sum() / count, 2**-24)


def test_sums_of_the_loss_are_float64(kernels):
    # In float32 the ones are lost beside the large numbers, which cancel.
    layout = Layout(B=40, V=1, L=1, T=1, D=1)
    images = torch.ones(3, 40, dtype=torch.float64)
    images[:, 0], images[:, 33] = 1e9, -1e9
    loss, stats = kernels.loss_and_stats(images, torch.ones(40), None, layout, 0.0)
    assert loss == 38 / torch.tensor(40.0) and (stats[:2] == loss).all()


@pytest.mark.parametrize("m", [1, 2, 7, 512])
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_norms_must_be_finite(kernels, value, m):
    norm = torch.rand(m, dtype=torch.float64)
    norm[0] = 1e300  # finite, though not in float32
    kernels.require_finite(norm)
    norm[-1] = value
    with pytest.raises(ValueError, match="not finite"):
        kernels.require_finite(norm)


# Less than a vector; a panel of 1024 columns and a tail.
@pytest.mark.parametrize("n", [5, 1030])
def test_entropies_count_the_mantissas_of_columns(kernels, n):
    # Mantissas alone tell the columns apart: log2 P_j is that of the mantissa but for a constant.
    layout = Layout(B=1, V=1, L=1, T=1, D=1, W=n)
    mantissa = torch.linspace(0.5, 2, n)
    matched = kernels.match(
        torch.zeros(1, 1, n),
        None,
        layout,
        Potential(torch.zeros(n), mantissa),
        torch.zeros(1, 1),
        epsilon=0.05,
        temperature=0.1,
    )
    P = mantissa.double() / mantissa.double().sum()
    assert_close(matched.target_entropy, -(P * P.log()).sum(), 0, 5e-7)
    assert matched.loss == 0 and matched.source_entropy == 0


@pytest.mark.parametrize("d", [1, 7, 8, 9, 64, 129])
def test_project(kernels, d):
    x = torch.randn(6, d)
    unit, norm, *_ = rows = kernels.normalize(x)
    gradient = torch.randn(6, d)
    ud, gd = unit.double(), gradient.double()
    expected = (gd - ud * (ud * gd).sum(1, keepdim=True)) / norm[:, None]
    assert_close(kernels.project_(gradient, rows, 3.0), 3 * expected, 1e-5, 1e-5)


# Within a tile of 64, at its edge, past it, and an odd number of tiles.
@pytest.mark.parametrize("m", [1, 63, 64, 65, 150])
def test_symmetrize(kernels, m):
    """A square within wider rows, the rest of which stays as it is."""
    wide = torch.randn(m, m + 5)
    before, G = wide.clone(), wide[:, 2 : m + 2]
    expected, column_sums = G + G.T, G.double().sum(0)
    sums = kernels.symmetrize_(G)
    assert torch.equal(G, expected)
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, m + 2 :], before[:, m + 2 :])
    assert_close(sums, column_sums, 0, 1e-5 * max(1, m**0.5))


def test_any_number_of_threads_gives_the_same_bits_of_rows(kernels):
    m, d = 1031, 260  # more than LEAST_SHARED_SUMS, a tail in every chunk and tile
    x, gradient, square, threads = torch.randn(m, d), torch.randn(m, d), torch.randn(530, 530), torch.get_num_threads()
    outcomes = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            rows, G = kernels.normalize(x), square.clone()
            centre = kernels.mean_row(rows.read)
            potential = kernels.centre_potential(rows.read, centre, 0.05)
            projected, sums = kernels.project_(gradient.clone(), rows), kernels.symmetrize_(G)
            outcomes.append([rows.read, rows.norm, centre, *potential, projected, sums, G])
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_every_instruction_set_agrees_with_the_first():
    scores = made_scores(70, 300)
    outcomes = []
    for isa in isas():
        kernels, row, c = cpu.kernels(isa), Potential.one(70), torch.empty(300)
        kernels.sinkhorn_pass(scores, LOG2_E / 0.02, row, Potential.one(300), c, accumulate=False)
        outcomes.append(c)
    for c in outcomes[1:]:
        assert_close(c, outcomes[0], 2e-6, 1e-12)


def test_an_instruction_set_that_is_not_here_is_an_error():
    with pytest.raises(ValueError, match="sse9"):
        CpuKernels("sse9")
