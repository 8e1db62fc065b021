"""Column and row steps, potentials, preparation and the plan operator in Triton against float64."""

import math

import pytest
import torch
from row_problems import MASKED, assert_close, log2, made_scores, masked, representable
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import triton as backend
from bam_kernels.backends.interface import HALF_UNIT, LOG2_E, DeviceNumber, Positives, Potential
from bam_kernels.backends.triton import launch_sinkhorn, tiles
from bam_kernels.layout import Layout

kernels = backend.kernels()
EPSILONS = [representable(0.05), representable(1e-3)]
STEP = 1 / 32768  # a power of two: the scale of int16 scores rounds as that of float32 ones
# One entry; below, at and above a block of 32 columns and 8 rows; primes; more than one block of 1024 columns.
SHAPES = [(1, 1), (7, 31), (8, 32), (9, 33), (17, 97), (3, 1025)]


def one(n: int) -> Potential:
    return Potential(torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def scores(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Scores with two masked entries, the value of one step, and what they are in float64."""
    s = made_scores(m, n, seed)
    if n > 2:
        s[m // 2, n - 1] = s[0, 1] = MASKED
    if dtype == torch.float32:
        return s.to(DEVICE), 1.0, masked(s)
    q = kernels.quantize(s.to(DEVICE), STEP, empty(m, n, dtype=torch.int16))
    exact = torch.where(q == -32768, -math.inf, q.double() * STEP)
    return q, STEP, exact.cpu()


def column_potential(exact: torch.Tensor, epsilon: float) -> Potential:
    """As large as the scores are: what Sinkhorn finds."""
    g = -exact.amax(0).nan_to_num(neginf=0.0) / epsilon * LOG2_E
    return Potential(g.floor().float().to(DEVICE), torch.exp2(g - g.floor()).float().to(DEVICE))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
def test_column_lse_and_its_potential(shape, dtype, epsilon):
    m, n = shape
    s, step, exact = scores(m, n, dtype)
    row = kernels.centre_potential(
        made_scores(m, 3, 1).to(DEVICE), torch.tensor([0.5, -0.2, 0.1], device=DEVICE), epsilon
    )
    shift, sums = empty(n), empty(n)
    kernels.column_lse(s, LOG2_E / epsilon * step, row, shift, sums, accumulate=False)
    expected = torch.logsumexp(exact / epsilon + row.natural_log().cpu()[:, None], 0) * LOG2_E
    assert_close(shift.cpu().double() + sums.cpu().double().log2(), expected, 0, 2e-6)
    assert_close(log2(kernels.reciprocal_potential(shift, sums)).cpu(), -expected, 0, 2.5e-6)


def test_column_lse_of_slabs_is_that_of_all_rows():
    m, n, epsilon = 23, 33, representable(0.01)
    s, row = made_scores(m, n).to(DEVICE), one(m)
    s[:, 4] = MASKED
    shift, sums = empty(n), empty(n)
    scale = torch.tensor(LOG2_E / epsilon, device=DEVICE)  # a device scalar is as good as a number
    for first in range(0, m, 9):
        part = slice(first, min(first + 9, m))
        kernels.column_lse(s[part], scale, row.rows(part.start, part.stop), shift, sums, first > 0)
    assert sums[4] == 0
    potential = kernels.reciprocal_potential(shift, sums)
    assert potential.exponent[4] == 0 and potential.mantissa[4] == 1
    expected = torch.logsumexp(masked(s.cpu()) / epsilon, 0) * LOG2_E
    others = torch.arange(n) != 4
    assert_close((shift.cpu().double() + sums.cpu().double().log2())[others], expected[others], 0, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*((torch.float32, shape) for shape in SHAPES), *((torch.int16, shape) for shape in SHAPES[3:])],
    ids=str,
)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
@pytest.mark.parametrize("longest_row", [tiles.LONGEST_ROW, 16], ids=["one read", "two reads"])
def test_sinkhorn_pass(shape, dtype, epsilon, longest_row, monkeypatch):
    monkeypatch.setattr(launch_sinkhorn, "LONGEST_ROW", longest_row)
    m, n = shape
    s, step, exact = scores(m, n, dtype)
    col = column_potential(exact, epsilon)
    row, c = one(m), empty(n)
    kernels.sinkhorn_pass(s, LOG2_E / epsilon * step, row, col, c, accumulate=False)
    x = exact * LOG2_E / epsilon + log2(col).cpu()
    f = -torch.logsumexp(x / LOG2_E, 1) * LOG2_E
    assert_close(log2(row).cpu(), f, 0, 1.5e-6)
    expected = torch.exp2(x + f[:, None]).sum(0)
    assert_close(c.cpu(), expected, 5e-6, 1e-9)
    before = log2(col).cpu()
    kernels.divide_potential_(col, c)
    assert (col.exponent == col.exponent.round()).all()
    left = expected > 0
    assert_close(
        log2(col).cpu()[left], (before - c.cpu().double().log2())[left], 0, 2e-7 * before.abs().max().item() + 1e-6
    )
    kernels.sinkhorn_pass(s, LOG2_E / epsilon * step, row, col, c, accumulate=True)
    x = exact * LOG2_E / epsilon + log2(col).cpu()
    assert_close(c.cpu(), expected + torch.softmax(x / LOG2_E, 1).sum(0), 1e-5, 1e-8)


@pytest.mark.parametrize("longest_row", [tiles.LONGEST_ROW, 16], ids=["one read", "two reads"])
def test_a_bad_guess_of_the_row_potential_costs_no_accuracy(longest_row, monkeypatch):
    monkeypatch.setattr(launch_sinkhorn, "LONGEST_ROW", longest_row)
    m, n, scale = 5, 40, LOG2_E / 0.01
    s, col = made_scores(m, n).to(DEVICE), one(n)
    outcomes = []
    for guess in (0.0, -1000.0, 1000.0):
        row, c = Potential(torch.full((m,), guess, device=DEVICE), torch.ones(m, device=DEVICE)), empty(n)
        kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=False)
        outcomes.append((log2(row), c))
    for f, c in outcomes[1:]:
        assert_close(f, outcomes[0][0], 1e-7, 1e-6)
        assert_close(c, outcomes[0][1], 1e-5, 1e-9)


@pytest.mark.parametrize("longest_row", [tiles.LONGEST_ROW, 16], ids=["one read", "two reads"])
def test_rows_and_columns_with_no_key_left_add_nothing(longest_row, monkeypatch):
    monkeypatch.setattr(launch_sinkhorn, "LONGEST_ROW", longest_row)
    s = made_scores(5, 19).to(DEVICE)
    s[2] = MASKED
    s[:, 7] = MASKED
    row, col, c = one(5), one(19), empty(19)
    kernels.sinkhorn_pass(s, 10.0, row, col, c, accumulate=False)
    assert row.mantissa[2] == math.inf and c[7] == 0
    others = torch.tensor([0, 1, 3, 4])
    assert_close(c.cpu(), torch.softmax(masked(s.cpu())[others] * 10 / LOG2_E, 1).sum(0), 1e-6)
    kernels.divide_potential_(col, c)
    assert col.exponent[7] == 0 and col.mantissa[7] == 1


@pytest.mark.parametrize("longest_row", [tiles.LONGEST_ROW, 16], ids=["one read", "two reads"])
def test_nan_is_not_lost(longest_row, monkeypatch):
    monkeypatch.setattr(launch_sinkhorn, "LONGEST_ROW", longest_row)
    s = made_scores(3, 17).to(DEVICE)
    s[1] = math.nan
    shift, sums, c = empty(17), empty(17), empty(17)
    kernels.column_lse(s, 10.0, one(3), shift, sums, accumulate=False)
    col = kernels.reciprocal_potential(shift, sums)
    assert col.mantissa.isnan().all()
    row, col = one(3), one(17)
    kernels.sinkhorn_pass(s, 10.0, row, col, c, accumulate=False)
    assert row.mantissa.isnan().tolist() == [False, True, False] and c.isnan().all()
    kernels.divide_potential_(col, c)
    assert col.mantissa.isnan().all()


# T = 2 key views on W = 3 ranks, this one in the middle; a slab that begins within a view.
@pytest.mark.parametrize("first_row", [0, 5])
def test_the_epilogue_masks_and_quantizes_and_sums(first_row):
    layout = Layout(B=4, V=3, L=2, T=2, D=1, W=3, rank=1)
    made = made_scores(7, layout.N).to(DEVICE)
    mask = layout.to_gathered(layout.positive_mask(layout.M))[first_row : first_row + 7]
    whole = made.cpu().double().masked_fill(mask, -math.inf)
    positives = Positives(layout, first_row, layout.M)
    by_hand = kernels.mask_positives_(made.clone(), positives)
    assert torch.equal(by_hand.cpu() == MASKED, mask)
    step, bias = DeviceNumber(2.0, torch.tensor([STEP / 2], device=DEVICE)), made_scores(1, layout.N, 1)[0].to(DEVICE)
    fixed = kernels.quantize(by_hand, step, empty(7, layout.N, dtype=torch.int16), bias=bias)
    assert torch.equal(fixed.cpu() == -32768, mask)
    expected = (whole + bias.cpu().double()).clamp(STEP - 1, 1 - STEP)
    assert_close(fixed.cpu()[~mask] * STEP, expected[~mask], 0, 0.51 * STEP)

    out, shift, sums = empty(7, layout.N, dtype=torch.int16), empty(layout.N), empty(layout.N)
    row, scale = one(7), LOG2_E / 0.05 * STEP
    kernels.finish_scores(made, bias, step, out, positives, scale, row, shift, sums, accumulate=False)
    assert torch.equal(out, fixed)
    expected = empty(layout.N), empty(layout.N)
    kernels.column_lse(fixed, scale, row, *expected, accumulate=False)
    assert torch.equal(shift, expected[0]) and torch.equal(sums, expected[1])
    assert torch.equal(kernels.quantize(made, step, out.zero_(), positives, bias), fixed)


def test_the_mask_of_some_images_of_several_views():
    layout = Layout(B=5, V=3, L=2, T=2, D=1, W=3, rank=1)
    images = range(2, 4)
    made = made_scores(layout.V * len(images), layout.N).to(DEVICE)
    mask = layout.to_gathered(layout.positive_mask(layout.M)).view(layout.V, layout.B, layout.N)[:, 2:4].flatten(0, 1)
    positives = Positives(layout, images.start, len(images))
    assert torch.equal(kernels.mask_positives_(made.clone(), positives).cpu() == MASKED, mask)
    fixed = kernels.quantize(made, STEP, empty(len(made), layout.N, dtype=torch.int16), positives)
    assert torch.equal(fixed.cpu() == -32768, mask)


def test_quantize_rounds_and_clamps():
    s = torch.tensor([[0.0, 1e-5, -1e-5, 0.4999, 2.0, -2.0, MASKED, 1.0, -1.0]], device=DEVICE)
    q = kernels.quantize(s, 1 / 32000, empty(1, 9, dtype=torch.int16))
    assert q.tolist() == [[0, 0, 0, 15997, 32767, -32767, -32768, 32000, -32000]]


@pytest.mark.parametrize("shape", [(3, 1), (37, 33), (2, 4099)], ids=str)  # the last: beyond a block of the row loop
def test_plan_operator(shape):
    m, n = shape
    s = made_scores(m, n).to(DEVICE)
    row = Potential(torch.full((m,), -20.0, device=DEVICE), torch.full((m,), 1.5, device=DEVICE))
    col = one(n)
    E = torch.exp(s.double() / 0.05 + row.natural_log()[:, None] + col.natural_log())
    u, v, x = (torch.randn(shape, device=DEVICE) for shape in ((m,), (n,), (m, n)))
    y, w = kernels.plan_products(s, LOG2_E / 0.05, row, col, v, u)
    assert_close(y, E @ v.double(), 0, 1e-5 * (E @ v.double().abs()).max().item())
    assert_close(w, E.T @ u.double(), 0, 1e-5 * (E.T @ u.double().abs()).max().item())
    assert [len(part) for part in kernels.plan_products(s, 1.0, row, col, None, None)] == [0, 0]
    expected = x.double() - E * (u.double()[:, None] + v.double())
    kernels.plan_subtract_(x, s, LOG2_E / 0.05, row, col, u, v)
    assert_close(x, expected, 1e-5, 1e-5)
    kernels.plan_subtract_(x, s, LOG2_E / 0.05, row, col, None, v)
    assert_close(x, expected - E * v.double(), 1e-5, 2e-5)


# Within a tile of 64, at its edge, past it, and more than two tiles.
@pytest.mark.parametrize("m", [1, 64, 65, 130])
def test_symmetrize(m):
    G = torch.randn(m, m, device=DEVICE)
    expected = G + G.T
    sums = kernels.symmetrize_(G)
    assert torch.equal(G, expected)
    assert_close(sums, expected.double().sum(1), 0, 1e-5 * max(1, m**0.5))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("transposed", [False, True])
def test_normalize_any_magnitude_and_stride(magnitude, transposed):
    x = torch.randn(21, 5, device=DEVICE).T * magnitude
    x = x if transposed else x.contiguous()
    unit, norm, *_ = kernels.normalize(x)
    expected = x.double().norm(dim=1)
    assert_close(norm, expected, 1e-12)
    assert_close(unit, x.double() / expected.clamp_min(1e-12)[:, None], 1e-6, 1e-30)


# 7 images of 3 views, in strides of their own; rows as a matrix; one more feature than a block of the row loop.
@pytest.mark.parametrize(("shape", "order"), [((3, 7, 5), (1, 0, 2)), ((5, 3, 7), (2, 1, 0)), ((9, 4097), (0, 1))])
def test_centred_half_rows(shape, order):
    x = torch.randn(*(shape[i] for i in order), device=DEVICE).permute(order).mul_(1e3)
    assert x.shape == shape
    rows = x.double().flatten(0, -2)
    unit = rows / rows.norm(dim=1, keepdim=True)
    centre = unit.mean(0).float()
    half, potential = kernels.half_rows(x, centre, representable(0.05))
    assert half.read.dtype == torch.float16 and half.x is x
    assert_close(half.norm, rows.norm(dim=1), 1e-12)
    assert_close(half.read.double() / HALF_UNIT, unit - centre, 2**-11, 1e-6)
    assert_close(half.bias.double() / HALF_UNIT**2, (unit - centre) @ centre.double(), 1e-6, 1e-12)
    assert_close(log2(potential), unit @ centre.double() / representable(0.05) * LOG2_E, 0, 1e-6)
    gradient = torch.randn(rows.shape, device=DEVICE)
    expected = 0.25 * (gradient - unit * (unit * gradient).sum(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)
    assert_close(kernels.project_(gradient.clone(), half, 0.25), expected, 1e-5, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalize_16_bit_rows(dtype):
    x = torch.randn(3, 33, device=DEVICE).to(dtype)
    unit, norm, *_ = kernels.normalize(x)
    assert_close(norm, x.double().norm(dim=1), 1e-12)
    assert_close(unit, x.double() / x.double().norm(dim=1, keepdim=True), 1e-6)


@pytest.mark.parametrize("d", [1, 33, 4099])  # one feature; a tail; beyond a block of the row loop
def test_project_and_a_zero_row(d):
    x = torch.randn(3, d, device=DEVICE)
    x[1] = 0
    unit, norm, *_ = rows = kernels.normalize(x)
    assert (unit[1] == 0).all() and norm[1] == 0
    gradient = torch.randn(3, d, device=DEVICE)
    ud, gd = unit.double(), gradient.double()
    expected = (gd - ud * (ud * gd).sum(1, keepdim=True)) / norm[:, None].clamp_min(1e-30)
    expected[1] = 0
    assert_close(kernels.project_(gradient, rows), expected, 1e-5, 1e-5)


# Keys that differ little and rows that differ much, the other way round, and keys that do not differ at all.
@pytest.mark.parametrize("spreads", [(0.02, 1.0), (1.0, 0.02), (0.3, 0.2), (0.0, 0.5)])
def test_products_fit_the_fixed_point(spreads):
    common = torch.randn(19, device=DEVICE)
    keys, others = (
        common + spread * torch.randn(m, 19, device=DEVICE) for spread, m in zip(spreads, (37, 5), strict=True)
    )
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    centre = unit.mean(0).float()
    k, z = (kernels.half_rows(x, centre, 0.05)[0] for x in (keys, others))
    step = kernels.product_step(centre, k.bias, z.bias)
    assert step.factor == 1
    bound = step.scalar.double().item() * 32000 / HALF_UNIT**2
    scores = torch.nn.functional.normalize(others.double(), dim=1) @ (unit - centre).T
    size_k, size_z = ((x.read.double() / HALF_UNIT).norm(dim=1).max().item() for x in (k, z))
    bias = k.bias.abs().max().item() / HALF_UNIT**2
    assert abs(bound - min(size_k * size_z + bias, size_k)) <= 0.01 * bound + 1e-7
    assert (scores.abs().max() <= bound * 1.001 + 1e-9).all()


def test_centre_potential_at_the_least_epsilon():
    epsilon = representable(1e-3)
    unit = torch.nn.functional.normalize(torch.randn(4, 70, device=DEVICE), dim=1)
    centre = torch.randn(70, device=DEVICE) / 8
    row = kernels.centre_potential(unit, centre, epsilon)
    assert (row.exponent == row.exponent.round()).all()
    assert_close(log2(row), unit.double() @ centre.double() / epsilon * LOG2_E, 0, 1e-6)
