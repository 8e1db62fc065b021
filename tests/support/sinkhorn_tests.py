"""Column and row steps, scores in fixed point and the plan operator against float64: what every GPU backend passes.

A backend's test file has a class of these with fixtures: `kernels`, its row kernels in every form that rows can take,
`whole`, those where the form makes no difference, and `device`.
"""

import math

import pytest
import torch
from row_problems import EMPTY, MASKED, assert_close, log2, made_scores, masked, representable

from bam_kernels.backends.interface import LOG2_E, DeviceNumber, Positives, Potential
from bam_kernels.layout import Layout

EPSILONS = [representable(0.05), representable(1e-3)]
STEP = 1 / 32768  # a power of two: the scale of int16 scores rounds as that of float32 ones


def one(n: int, device: torch.device) -> Potential:
    return Potential(torch.zeros(n, device=device), torch.ones(n, device=device))


def sixteen_bit(m: int, n: int, device: torch.device) -> torch.Tensor:
    return torch.empty(m, n, dtype=torch.int16, device=device)


def on_device(x: float, device: torch.device) -> DeviceNumber:
    return DeviceNumber(2.0, torch.tensor([x / 2], device=device))


def scores(kernels, device, m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Scores with two masked entries, the value of one step, and what they are in float64."""
    s = made_scores(m, n)
    if n > 2:
        s[m // 2, n - 1] = s[0, 1] = MASKED
    if dtype == torch.float32:
        return s.to(device), 1.0, masked(s)
    q = kernels.quantize(s.to(device), STEP, sixteen_bit(m, n, device))
    return q, STEP, torch.where(q == -32768, -math.inf, q.double() * STEP).cpu()


def column_potential(exact: torch.Tensor, epsilon: float, device: torch.device) -> Potential:
    """As large as the scores are: what Sinkhorn finds."""
    g = -exact.amax(0).nan_to_num(neginf=0.0) / epsilon * LOG2_E
    return Potential(g.floor().float().to(device), torch.exp2(g - g.floor()).float().to(device))


class ColumnTotalTests:
    """Fixtures: `whole`, the kernels, and `device`."""

    # Fewer columns than a block has threads, and more. Sums of all sizes that a rank has, and less; a column that is
    # empty on one rank, and on all; NaN.
    @pytest.mark.parametrize("n", [9, 300])
    @pytest.mark.parametrize("common", [0, 29, 498])
    def test_column_sums_of_ranks_and_their_potential(self, whole, device, n, common):
        shift = torch.randint(-common - 20, common + 1, (3, n)).float()
        sums = torch.rand(3, n) + 0.5
        shift[0, :5], sums[:, :5] = common - 1200.0, 1.0
        sums[0, 5], shift[0, 5] = 0.0, EMPTY
        sums[:, 6], shift[:, 6] = 0.0, EMPTY
        sums[1, 7] = math.nan
        parts = [whole.column_totals(shift[r].to(device), sums[r].to(device), common) for r in range(3)]
        assert all(part.dtype == torch.float64 for part in parts)
        total = torch.stack(parts).sum(0)
        exact = (sums.double() * torch.exp2(shift.double() - common)).sum(0)
        assert_close(total.cpu()[exact > 0], exact[exact > 0], 1e-15)
        assert total[6] == 0 and total[7].isnan()
        col = whole.total_potential(total, common)
        assert col.exponent[6] == 0 and col.mantissa[6] == 1 and col.mantissa[7].isnan()
        assert (col.exponent.cpu() == col.exponent.cpu().round()).all()
        power = col.exponent.cpu().double() + col.mantissa.cpu().double().log2()
        assert_close(power[exact > 0], -(exact[exact > 0].log2() + common), 0, 2e-7)


class SinkhornTests(ColumnTotalTests):
    SHAPES: tuple[tuple[int, int], ...]
    """(m, n): one per regime of the backend's blocks."""
    WIDE = 600
    """Columns beyond one block or one warp."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
    @pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
    def test_column_lse_and_its_potential(self, whole, device, dtype, epsilon):
        centre = torch.tensor([0.5, -0.2, 0.1], device=device)
        for m, n in [*self.SHAPES, (203, 40)]:  # the last: several chunks of rows
            s, step, exact = scores(whole, device, m, n, dtype)
            row = whole.centre_potential(made_scores(m, 3, 1).to(device), centre, epsilon)
            shift, sums = torch.empty(2, n, device=device)
            whole.column_lse(s, LOG2_E / epsilon * step, row, shift, sums, accumulate=False)
            expected = torch.logsumexp(exact / epsilon + row.natural_log().cpu()[:, None], 0) * LOG2_E
            assert_close(shift.cpu().double() + sums.cpu().double().log2(), expected, 0, 2e-6)
            assert_close(log2(whole.reciprocal_potential(shift, sums)).cpu(), -expected, 0, 2.5e-6)

    def test_column_lse_of_slabs_is_that_of_all_rows(self, whole, device):
        m, n, epsilon = 23, 33, representable(0.01)
        s, row = made_scores(m, n).to(device), one(m, device)
        s[:, 4] = MASKED
        shift, sums = torch.empty(2, n, device=device)
        scale = on_device(LOG2_E / epsilon, device)
        for first in range(0, m, 9):
            part = slice(first, min(first + 9, m))
            whole.column_lse(s[part], scale, row.rows(part.start, part.stop), shift, sums, first > 0)
        assert sums[4] == 0
        potential = whole.reciprocal_potential(shift, sums)
        assert potential.exponent[4] == 0 and potential.mantissa[4] == 1
        expected = torch.logsumexp(masked(s.cpu()) / epsilon, 0) * LOG2_E
        others = torch.arange(n) != 4
        assert_close((shift.cpu().double() + sums.cpu().double().log2())[others], expected[others], 0, 2e-6)

    # T = 2 key views on W = 3 ranks, this one in the middle; a slab that begins within a view. N = 24 is of whole
    # octets, N = 30 is not.
    @pytest.mark.parametrize("first_row", [0, 5])
    @pytest.mark.parametrize("B", [4, 5])
    def test_the_epilogue_masks_and_quantizes_and_sums(self, whole, device, first_row, B):
        layout = Layout(B=B, V=3, L=2, T=2, D=1, W=3, rank=1)
        made, bias = made_scores(7, layout.N).to(device), made_scores(1, layout.N, 1)[0].to(device)
        mask = layout.to_gathered(layout.positive_mask(layout.M))[first_row : first_row + 7]
        positives = Positives(layout, first_row, layout.M)
        by_hand = whole.mask_positives_(made.clone(), positives)
        assert torch.equal(by_hand.cpu() == MASKED, mask)
        step = on_device(STEP, device)
        fixed = whole.quantize(by_hand, step, sixteen_bit(7, layout.N, device), bias=bias)
        assert torch.equal(fixed.cpu() == -32768, mask)
        expected = (made.double() + bias.double()).cpu().clamp(STEP - 1, 1 - STEP)
        assert_close(fixed.cpu()[~mask] * STEP, expected[~mask], 0, 0.51 * STEP)

        out, (shift, sums) = sixteen_bit(7, layout.N, device), torch.empty(2, layout.N, device=device)
        row, scale = one(7, device), LOG2_E / 0.05 * STEP
        whole.finish_scores(made, bias, step, out, positives, scale, row, shift, sums, accumulate=False)
        assert torch.equal(out, fixed)
        expected = torch.empty(2, layout.N, device=device)
        whole.column_lse(fixed, scale, row, *expected, accumulate=False)
        assert torch.equal(shift, expected[0]) and torch.equal(sums, expected[1])
        assert torch.equal(whole.quantize(made, step, out.zero_(), positives, bias), fixed)

    def test_the_mask_of_some_images_of_several_views(self, whole, device):
        layout = Layout(B=5, V=3, L=2, T=2, D=1, W=3, rank=1)
        images = range(2, 4)
        made = made_scores(layout.V * len(images), layout.N).to(device)
        mask = layout.to_gathered(layout.positive_mask(layout.M)).view(layout.V, layout.B, layout.N)
        mask = mask[:, images.start : images.stop].flatten(0, 1)
        positives = Positives(layout, images.start, len(images))
        assert torch.equal(whole.mask_positives_(made.clone(), positives).cpu() == MASKED, mask)
        fixed = whole.quantize(made, STEP, sixteen_bit(*made.shape, device), positives)
        assert torch.equal(fixed.cpu() == -32768, mask)

    def test_quantize_rounds_and_clamps(self, whole, device):
        s = torch.tensor([[0.0, 1e-5, -1e-5, 0.4999, 2.0, -2.0, MASKED, 1.0, -1.0]], device=device)
        q = whole.quantize(s, 1 / 32000, sixteen_bit(1, 9, device))
        assert q.tolist() == [[0, 0, 0, 15997, 32767, -32767, -32768, 32000, -32000]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
    @pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
    def test_sinkhorn_pass(self, kernels, device, dtype, epsilon):
        for m, n in self.SHAPES:
            s, step, exact = scores(kernels, device, m, n, dtype)
            col = column_potential(exact, epsilon, device)
            row, c, scale = one(m, device), torch.empty(n, device=device), LOG2_E / epsilon * step
            kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=False)
            x = exact * LOG2_E / epsilon + log2(col).cpu()
            f = -torch.logsumexp(x / LOG2_E, 1) * LOG2_E
            assert_close(log2(row).cpu(), f, 0, 1.5e-6)
            expected = torch.exp2(x + f[:, None]).sum(0)
            assert_close(c.cpu(), expected, 5e-6, 1e-9)
            before = log2(col).cpu()
            at_once = Potential(*(part.clone() for part in col))
            kernels.sinkhorn_pass(s, scale, one(m, device), at_once, c, accumulate=False, divide=True)
            kernels.divide_potential_(col, c)
            assert all(torch.equal(a, b) for a, b in zip(at_once, col, strict=True))
            assert (col.exponent == col.exponent.round()).all()
            left = expected > 0
            close = 2e-7 * before.abs().max().item() + 1e-6
            assert_close(log2(col).cpu()[left], (before - c.cpu().double().log2())[left], 0, close)
            kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=True)
            x = exact * LOG2_E / epsilon + log2(col).cpu()
            assert_close(c.cpu(), expected + torch.softmax(x / LOG2_E, 1).sum(0), 1e-5, 1e-8)

    def test_a_bad_guess_of_the_row_potential_costs_no_accuracy(self, kernels, device):
        m, n, scale = 5, self.WIDE, LOG2_E / 0.01
        s, col = made_scores(m, n).to(device), one(n, device)
        outcomes = []
        for guess in (0.0, -1000.0, 1000.0):
            row, c = (
                Potential(torch.full((m,), guess, device=device), torch.ones(m, device=device)),
                col.mantissa.clone(),
            )
            kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=False)
            outcomes.append((log2(row), c))
        for f, c in outcomes[1:]:
            assert_close(f, outcomes[0][0], 1e-7, 1e-6)
            assert_close(c, outcomes[0][1], 1e-5, 1e-9)

    def test_rows_and_columns_with_no_key_left_add_nothing(self, kernels, device):
        s = made_scores(5, 19).to(device)
        s[2] = MASKED
        s[:, 7] = MASKED
        row, col, c = one(5, device), one(19, device), torch.empty(19, device=device)
        kernels.sinkhorn_pass(s, 10.0, row, col, c, accumulate=False)
        assert row.mantissa[2] == math.inf and c[7] == 0
        others = torch.tensor([0, 1, 3, 4])
        assert_close(c.cpu(), torch.softmax(masked(s.cpu())[others] * 10 / LOG2_E, 1).sum(0), 1e-6)
        kernels.divide_potential_(col, c)
        assert col.exponent[7] == 0 and col.mantissa[7] == 1

    def test_nan_is_not_lost(self, kernels, device):
        s = made_scores(3, 17).to(device)
        s[1] = math.nan
        shift, sums, c = torch.empty(3, 17, device=device)
        kernels.column_lse(s, 10.0, one(3, device), shift, sums, accumulate=False)
        assert kernels.reciprocal_potential(shift, sums).mantissa.isnan().all()
        row, col = one(3, device), one(17, device)
        kernels.sinkhorn_pass(s, 10.0, row, col, c, accumulate=False)
        assert row.mantissa.isnan().tolist() == [False, True, False] and c.isnan().all()
        kernels.divide_potential_(col, c)
        assert col.mantissa.isnan().all()

    @pytest.mark.parametrize(
        "shape", [(3, 1), (37, 33), (2, 4099)], ids=str
    )  # the last: beyond a turn of a row's block
    def test_plan_operator(self, whole, device, shape):
        m, n = shape
        s = made_scores(m, n).to(device)
        row = Potential(torch.full((m,), -20.0, device=device), torch.full((m,), 1.5, device=device))
        col = one(n, device)
        E = torch.exp(s.double() / 0.05 + row.natural_log()[:, None] + col.natural_log())
        u, v, x = (torch.randn(size).to(device) for size in ((m,), (n,), (m, n)))
        y, w = whole.plan_products(s, LOG2_E / 0.05, row, col, v, u)
        assert_close(y, E @ v.double(), 0, 1e-5 * (E @ v.double().abs()).max().item())
        assert_close(w, E.T @ u.double(), 0, 1e-5 * (E.T @ u.double().abs()).max().item())
        assert [len(part) for part in whole.plan_products(s, 1.0, row, col, None, None)] == [0, 0]
        expected = x.double() - E * (u.double()[:, None] + v.double())
        whole.plan_subtract_(x, s, LOG2_E / 0.05, row, col, u, v)
        assert_close(x, expected, 1e-5, 1e-5)
        whole.plan_subtract_(x, s, LOG2_E / 0.05, row, col, None, v)
        assert_close(x, expected - E * v.double(), 1e-5, 2e-5)
