"""Column and row steps, potentials, preparation and the plan operator in CUDA C++ against float64.

Where there is no GPU the same sources run under the emulator.
"""

import math

import emulated
import pytest
import torch
from cuda_device import DEVICE, empty, kernels, kernels_on, one, pytestmark  # noqa: F401
from row_problems import MASKED, assert_close, log2, made_scores, masked, representable

from bam_kernels.backends.cuda import launch_sinkhorn
from bam_kernels.backends.interface import HALF_UNIT, LOG2_E, DeviceNumber, Positives, Potential
from bam_kernels.engine.sums import loss_and_stats
from bam_kernels.layout import Layout

EPSILONS = [representable(0.05), representable(1e-3)]
STEP = 1 / 32768  # a power of two: the scale of int16 scores rounds as that of float32 ones
# One entry; around an octet of columns; around a chunk of 4 rows; primes; rows of two octets a thread and a tail; past
# the 512 columns of a block of one warp; three such blocks of a cluster of four.
SHAPES = [(1, 1), (3, 7), (4, 8), (5, 9), (17, 97), (9, 263), (3, 520), (5, 1031)]


@pytest.fixture
def whole() -> object:
    """Kernels where the form of rows makes no difference."""
    return kernels_on()


def scores(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Scores with two masked entries, the value of one step, and what they are in float64."""
    s = made_scores(m, n, seed)
    if n > 2:
        s[m // 2, n - 1] = s[0, 1] = MASKED
    if dtype == torch.float32:
        return s.to(DEVICE), 1.0, masked(s)
    q = kernels_on().quantize(s.to(DEVICE), STEP, empty(m, n, dtype=torch.int16))
    return q, STEP, torch.where(q == -32768, -math.inf, q.double() * STEP).cpu()


def column_potential(exact: torch.Tensor, epsilon: float) -> Potential:
    """As large as the scores are: what Sinkhorn finds."""
    g = -exact.amax(0).nan_to_num(neginf=0.0) / epsilon * LOG2_E
    return Potential(g.floor().float().to(DEVICE), torch.exp2(g - g.floor()).float().to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
def test_column_lse_and_its_potential(whole, dtype, epsilon):
    for m, n in [*SHAPES, (203, 40)]:  # the last: several chunks of rows
        s, step, exact = scores(m, n, dtype)
        row = whole.centre_potential(
            made_scores(m, 3, 1).to(DEVICE), torch.tensor([0.5, -0.2, 0.1], device=DEVICE), epsilon
        )
        shift, sums = empty(n), empty(n)
        whole.column_lse(s, LOG2_E / epsilon * step, row, shift, sums, accumulate=False)
        expected = torch.logsumexp(exact / epsilon + row.natural_log().cpu()[:, None], 0) * LOG2_E
        assert_close(shift.cpu().double() + sums.cpu().double().log2(), expected, 0, 2e-6)
        assert_close(log2(whole.reciprocal_potential(shift, sums)).cpu(), -expected, 0, 2.5e-6)


def test_column_lse_of_slabs_is_that_of_all_rows(whole):
    m, n, epsilon = 23, 33, representable(0.01)
    s, row = made_scores(m, n).to(DEVICE), one(m)
    s[:, 4] = MASKED
    shift, sums = empty(n), empty(n)
    scale = torch.tensor(LOG2_E / epsilon, device=DEVICE)  # a device scalar is as good as a number
    for first in range(0, m, 9):
        part = slice(first, min(first + 9, m))
        whole.column_lse(s[part], scale, row.rows(part.start, part.stop), shift, sums, first > 0)
    assert sums[4] == 0
    potential = whole.reciprocal_potential(shift, sums)
    assert potential.exponent[4] == 0 and potential.mantissa[4] == 1
    expected = torch.logsumexp(masked(s.cpu()) / epsilon, 0) * LOG2_E
    others = torch.arange(n) != 4
    assert_close((shift.cpu().double() + sums.cpu().double().log2())[others], expected[others], 0, 2e-6)


# T = 2 key views on W = 3 ranks, this one in the middle; a slab that begins within a view. N = 24 is of whole octets,
# N = 30 is not.
@pytest.mark.parametrize("first_row", [0, 5])
@pytest.mark.parametrize("B", [4, 5])
def test_the_epilogue_masks_and_quantizes_and_sums(whole, first_row, B):
    layout = Layout(B=B, V=3, L=2, T=2, D=1, W=3, rank=1)
    made = made_scores(7, layout.N).to(DEVICE)
    mask = layout.to_gathered(layout.positive_mask(layout.M))[first_row : first_row + 7]
    exact = made.cpu().double().masked_fill(mask, -math.inf)
    positives = Positives(layout, first_row, layout.M)
    by_hand = whole.mask_positives_(made.clone(), positives)
    assert torch.equal(by_hand.cpu() == MASKED, mask)
    step, bias = DeviceNumber(2.0, torch.tensor([STEP / 2], device=DEVICE)), made_scores(1, layout.N, 1)[0].to(DEVICE)
    fixed = whole.quantize(by_hand, step, empty(7, layout.N, dtype=torch.int16), bias=bias)
    assert torch.equal(fixed.cpu() == -32768, mask)
    expected = (exact + bias.cpu().double()).clamp(STEP - 1, 1 - STEP)
    assert_close(fixed.cpu()[~mask] * STEP, expected[~mask], 0, 0.51 * STEP)

    out, shift, sums = empty(7, layout.N, dtype=torch.int16), empty(layout.N), empty(layout.N)
    row, scale = one(7), LOG2_E / 0.05 * STEP
    whole.finish_scores(made, bias, step, out, positives, scale, row, shift, sums, accumulate=False)
    assert torch.equal(out, fixed)
    expected = empty(layout.N), empty(layout.N)
    whole.column_lse(fixed, scale, row, *expected, accumulate=False)
    assert torch.equal(shift, expected[0]) and torch.equal(sums, expected[1])
    assert torch.equal(whole.quantize(made, step, out.zero_(), positives, bias), fixed)


def test_the_mask_of_some_images_of_several_views(whole):
    layout = Layout(B=5, V=3, L=2, T=2, D=1, W=3, rank=1)
    images = range(2, 4)
    made = made_scores(layout.V * len(images), layout.N).to(DEVICE)
    mask = layout.to_gathered(layout.positive_mask(layout.M)).view(layout.V, layout.B, layout.N)[:, 2:4].flatten(0, 1)
    positives = Positives(layout, images.start, len(images))
    assert torch.equal(whole.mask_positives_(made.clone(), positives).cpu() == MASKED, mask)
    fixed = whole.quantize(made, STEP, empty(len(made), layout.N, dtype=torch.int16), positives)
    assert torch.equal(fixed.cpu() == -32768, mask)


def test_quantize_rounds_and_clamps(whole):
    s = torch.tensor([[0.0, 1e-5, -1e-5, 0.4999, 2.0, -2.0, MASKED, 1.0, -1.0]], device=DEVICE)
    q = whole.quantize(s, 1 / 32000, empty(1, 9, dtype=torch.int16))
    assert q.tolist() == [[0, 0, 0, 15997, 32767, -32767, -32768, 32000, -32000]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["0.05", "0.001"])
def test_sinkhorn_pass(kernels, dtype, epsilon):  # noqa: F811
    for m, n in SHAPES:
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
        at_once = Potential(*(part.clone() for part in col))
        kernels.sinkhorn_pass(s, LOG2_E / epsilon * step, one(m), at_once, c, accumulate=False, divide=True)
        kernels.divide_potential_(col, c)
        assert all(torch.equal(a, b) for a, b in zip(at_once, col, strict=True))
        assert (col.exponent == col.exponent.round()).all()
        left = expected > 0
        close = 2e-7 * before.abs().max().item() + 1e-6
        assert_close(log2(col).cpu()[left], (before - c.cpu().double().log2())[left], 0, close)
        kernels.sinkhorn_pass(s, LOG2_E / epsilon * step, row, col, c, accumulate=True)
        x = exact * LOG2_E / epsilon + log2(col).cpu()
        assert_close(c.cpu(), expected + torch.softmax(x / LOG2_E, 1).sum(0), 1e-5, 1e-8)


def test_a_bad_guess_of_the_row_potential_costs_no_accuracy(kernels):  # noqa: F811
    m, n, scale = 5, 600, LOG2_E / 0.01
    s, col = made_scores(m, n).to(DEVICE), one(n)
    outcomes = []
    for guess in (0.0, -1000.0, 1000.0):
        row, c = Potential(torch.full((m,), guess, device=DEVICE), torch.ones(m, device=DEVICE)), empty(n)
        kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=False)
        outcomes.append((log2(row), c))
    for f, c in outcomes[1:]:
        assert_close(f, outcomes[0][0], 1e-7, 1e-6)
        assert_close(c, outcomes[0][1], 1e-5, 1e-9)


def test_rows_and_columns_with_no_key_left_add_nothing(kernels):  # noqa: F811
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


def test_nan_is_not_lost(kernels):  # noqa: F811
    s = made_scores(3, 17).to(DEVICE)
    s[1] = math.nan
    shift, sums, c = empty(17), empty(17), empty(17)
    kernels.column_lse(s, 10.0, one(3), shift, sums, accumulate=False)
    assert kernels.reciprocal_potential(shift, sums).mantissa.isnan().all()
    row, col = one(3), one(17)
    kernels.sinkhorn_pass(s, 10.0, row, col, c, accumulate=False)
    assert row.mantissa.isnan().tolist() == [False, True, False] and c.isnan().all()
    kernels.divide_potential_(col, c)
    assert col.mantissa.isnan().all()


# Few rows, in one cluster; more, over a grid of four blocks, the last of which has fewer; more columns than one warp.
@pytest.mark.parametrize("shape", [(1, 1), (30, 20), (150, 33), (13, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("cluster", [1, 4])
def test_one_launch_does_all_iterations(shape, dtype, cluster):
    made = kernels_on(cluster=cluster)
    m, n = shape
    epsilon = representable(0.05)
    s, step, exact = scores(m, n, dtype)
    f, g, c = torch.zeros(m, 1).double(), torch.zeros(n).double(), None
    for iterations in (1, 2, 4):
        row = one(m)
        scale = torch.tensor([LOG2_E / epsilon], device=DEVICE) if step == 1.0 else LOG2_E / epsilon * step
        found, sums = made.sinkhorn(s, scale, row, iterations)
        f, g = torch.zeros(m, 1).double(), -torch.logsumexp(exact / epsilon, 0)
        for _ in range(iterations - 1):
            f = -torch.logsumexp(exact / epsilon + g, 1, keepdim=True)
            c = torch.exp(exact / epsilon + f + g).sum(0)
            g = g - c.log()
        assert_close(found.natural_log().cpu(), g, 0, 3e-6)
        assert_close(row.natural_log().cpu(), f[:, 0], 0, 3e-6)
        if iterations == 1:
            assert sums.isnan().all()
        else:
            assert_close(sums.cpu(), c, 2e-5)


def test_what_fits_on_chip():
    made = kernels_on(cluster=1, shared_bytes=64 << 10, multiprocessors=4)
    assert made.fits_on_chip(100, 600, torch.int16, DEVICE)
    assert not made.fits_on_chip(100, 600, torch.float32, DEVICE)
    assert not made.fits_on_chip(1, 8193, torch.int16, DEVICE)
    assert not kernels_on(cluster=1, cooperative=False).fits_on_chip(4, 4, torch.int16, DEVICE)


@pytest.mark.parametrize("shape", [(3, 1), (37, 33), (2, 4099)], ids=str)  # the last: beyond one turn of a row's block
def test_plan_operator(whole, shape):
    m, n = shape
    s = made_scores(m, n).to(DEVICE)
    row = Potential(torch.full((m,), -20.0, device=DEVICE), torch.full((m,), 1.5, device=DEVICE))
    col = one(n)
    E = torch.exp(s.double() / 0.05 + row.natural_log()[:, None] + col.natural_log())
    u, v, x = (torch.randn(shape, device=DEVICE) for shape in ((m,), (n,), (m, n)))
    y, w = whole.plan_products(s, LOG2_E / 0.05, row, col, v, u)
    assert_close(y, E @ v.double(), 0, 1e-5 * (E @ v.double().abs()).max().item())
    assert_close(w, E.T @ u.double(), 0, 1e-5 * (E.T @ u.double().abs()).max().item())
    assert [len(part) for part in whole.plan_products(s, 1.0, row, col, None, None)] == [0, 0]
    expected = x.double() - E * (u.double()[:, None] + v.double())
    whole.plan_subtract_(x, s, LOG2_E / 0.05, row, col, u, v)
    assert_close(x, expected, 1e-5, 1e-5)
    whole.plan_subtract_(x, s, LOG2_E / 0.05, row, col, None, v)
    assert_close(x, expected - E * v.double(), 1e-5, 2e-5)


# Within a tile of 32, at its edge, past it, and more than two tiles.
@pytest.mark.parametrize("m", [1, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_symmetrize(whole, m, dtype):
    G = torch.randn(m, m, device=DEVICE).to(dtype)
    expected = G.float() + G.float().T
    sums = whole.symmetrize_(G)
    assert torch.equal(G, expected.to(dtype))
    assert_close(sums, expected.double().sum(1), 0, 1e-5 * max(1, m**0.5))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("transposed", [False, True])
def test_normalize_any_magnitude_and_stride(whole, magnitude, transposed):
    x = torch.randn(21, 5, device=DEVICE).T * magnitude
    x = x if transposed else x.contiguous()
    unit, norm, *_ = whole.normalize(x)
    expected = x.double().norm(dim=1)
    assert_close(norm, expected, 1e-12)
    assert_close(unit, x.double() / expected.clamp_min(1e-12)[:, None], 1e-6, 1e-30)


# 7 images of 3 views, in strides of their own; rows as a matrix; one more feature than four turns of a row's block.
@pytest.mark.parametrize(("shape", "order"), [((3, 7, 5), (1, 0, 2)), ((5, 3, 7), (2, 1, 0)), ((9, 1025), (0, 1))])
def test_centred_half_rows(whole, shape, order):
    x = torch.randn(*(shape[i] for i in order), device=DEVICE).permute(order).mul_(1e3)
    assert x.shape == shape
    rows = x.double().flatten(0, -2)
    unit = rows / rows.norm(dim=1, keepdim=True)
    centre = unit.mean(0).float()
    half, potential = whole.half_rows(x, centre, representable(0.05))
    assert half.read.dtype == torch.float16 and half.x is x
    assert_close(half.norm, rows.norm(dim=1), 1e-12)
    assert_close(half.read.double() / HALF_UNIT, unit - centre, 2**-11, 1e-6)
    assert_close(half.bias.double() / HALF_UNIT**2, (unit - centre) @ centre.double(), 1e-6, 1e-12)
    assert_close(log2(potential), unit @ centre.double() / representable(0.05) * LOG2_E, 0, 1e-6)
    gradient = torch.randn(rows.shape, device=DEVICE)
    expected = 0.25 * (gradient - unit * (unit * gradient).sum(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)
    assert_close(whole.project_(gradient.clone(), half, 0.25), expected, 1e-5, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalize_16_bit_rows(whole, dtype):
    x = torch.randn(3, 33, device=DEVICE).to(dtype)
    unit, norm, *_ = whole.normalize(x)
    assert_close(norm, x.double().norm(dim=1), 1e-12)
    assert_close(unit, x.double() / x.double().norm(dim=1, keepdim=True), 1e-6)


@pytest.mark.parametrize("d", [1, 33, 700])  # one feature; a tail; beyond one turn of a row's block
def test_project_and_a_zero_row(whole, d):
    x = torch.randn(3, d, device=DEVICE)
    x[1] = 0
    unit, norm, *_ = rows = whole.normalize(x)
    assert (unit[1] == 0).all() and norm[1] == 0
    gradient = torch.randn(3, d, device=DEVICE)
    ud, gd = unit.double(), gradient.double()
    expected = (gd - ud * (ud * gd).sum(1, keepdim=True)) / norm[:, None].clamp_min(1e-30)
    expected[1] = 0
    assert_close(whole.project_(gradient, rows), expected, 1e-5, 1e-5)


# Keys that differ little and rows that differ much, the other way round, and keys that do not differ at all.
@pytest.mark.parametrize("spreads", [(0.02, 1.0), (1.0, 0.02), (0.3, 0.2), (0.0, 0.5)])
def test_products_fit_the_fixed_point(whole, spreads):
    common = torch.randn(19, device=DEVICE)
    keys, others = (
        common + spread * torch.randn(m, 19, device=DEVICE) for spread, m in zip(spreads, (37, 5), strict=True)
    )
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    centre = unit.mean(0).float()
    k, z = (whole.half_rows(x, centre, 0.05)[0] for x in (keys, others))
    step = whole.product_step(centre, k.bias, z.bias)
    assert step.factor == 1
    bound = step.scalar.double().item() * 32000 / HALF_UNIT**2
    scores = torch.nn.functional.normalize(others.double(), dim=1) @ (unit - centre).T
    size_k, size_z = ((x.read.double() / HALF_UNIT).norm(dim=1).max().item() for x in (k, z))
    bias = k.bias.abs().max().item() / HALF_UNIT**2
    assert abs(bound - min(size_k * size_z + bias, size_k)) <= 0.01 * bound + 1e-7
    assert (scores.abs().max() <= bound * 1.001 + 1e-9).all()


def test_centre_potential_at_the_least_epsilon(whole):
    epsilon = representable(1e-3)
    unit = torch.nn.functional.normalize(torch.randn(4, 70, device=DEVICE), dim=1)
    centre = torch.randn(70, device=DEVICE) / 8
    row = whole.centre_potential(unit, centre, epsilon)
    assert (row.exponent == row.exponent.round()).all()
    assert_close(log2(row), unit.double() @ centre.double() / epsilon * LOG2_E, 0, 1e-6)


# One of everything; more than a turn of the block.
@pytest.mark.parametrize("count", [1, 700])
@pytest.mark.parametrize("spoilt", ["nothing", "a norm", "column sums"])
def test_loss_and_stats(whole, count, spoilt):
    layout = Layout(B=count, V=3, L=2, T=2, D=1)
    images, c, norm = torch.rand(3, count), 1 + torch.rand(2 * count), torch.rand(3 * count).double()
    if spoilt == "a norm":
        norm[-1] = math.inf
    if spoilt == "column sums":  # after a single iteration
        c.fill_(math.nan)
    given = images.to(DEVICE), c.to(DEVICE), norm.to(DEVICE), layout, 7.5
    loss, stats = whole.loss_and_stats(*given)
    expected_loss, expected = loss_and_stats(images.double(), c.double(), norm, layout, 7.5)
    assert expected.isnan().sum() == {"nothing": 0, "a norm": 4, "column sums": 1}[spoilt]
    assert torch.equal(stats.cpu().isnan(), expected.isnan()) and torch.equal(loss.cpu().isnan(), expected_loss.isnan())
    assert_close(loss.cpu().nan_to_num(), expected_loss.nan_to_num(), 1e-6)
    assert_close(stats.cpu().nan_to_num(), expected.nan_to_num(), 1e-6, 1e-7)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulator runs threads in either order")
def test_no_result_depends_on_the_order_of_threads(kernels, monkeypatch):  # noqa: F811
    # One cut octet, and rows that are aligned all the same; in two chunks, so that every stage of rows is used again.
    n = 1028
    monkeypatch.setattr(launch_sinkhorn, "pass_rows", lambda m, team, device: 14)
    s, col = made_scores(23, n), one(n)
    outcomes = []
    for backwards in (False, True):
        emulated.run_threads_backwards(backwards)
        try:
            row, shift, sums, c = one(23), empty(n), empty(n), empty(n)
            kernels.column_lse(s, 20.0, row, shift, sums, accumulate=False)
            kernels.sinkhorn_pass(s, 20.0, row, col, c, accumulate=False)
            square = s[:, :23].contiguous()
            outcomes.append([shift, sums, *row, c, kernels.symmetrize_(square), square, *kernels.normalize(s)[:2]])
            if kernels.fits_on_chip(23, 92, torch.float32, DEVICE):
                small = kernels.sinkhorn(s[:, :92].contiguous(), 20.0, one(23), 3)
                outcomes[-1] += [*small[0], small[1]]
            grid = kernels_on(cluster=1).sinkhorn(s[:, :92].contiguous(), 20.0, one(23), 3)
            outcomes[-1] += [*grid[0], grid[1]]
        finally:
            emulated.run_threads_backwards(False)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    expected = torch.softmax(s.double() * 20 / LOG2_E, 1).sum(0)
    assert_close(outcomes[0][4], expected, 5e-6)


def test_a_launch_that_fails_names_the_kernel_and_its_configuration(monkeypatch):
    made = kernels_on(shared_bytes=1 << 30)
    s = made_scores(4, 8192).to(DEVICE)
    with pytest.raises(
        RuntimeError, match=r"sinkhorn_pass_kernel<float32> with .* blocks of 1024 threads, .*: invalid"
    ):
        monkeypatch.setattr("bam_kernels.backends.cuda.shapes.OWNED", 8)
        monkeypatch.setattr("bam_kernels.backends.cuda.shapes.MOST_THREADS", 1024)
        made.sinkhorn_pass(s, 1.0, one(4), one(8192), empty(8192), accumulate=False)
