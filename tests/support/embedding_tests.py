"""Embedding rows, and what their scores and gradients need, against float64: NormTests are of every backend,
EmbeddingTests of those for GPUs.

As sinkhorn_tests.py; the form of rows of scores makes no difference here.
"""

import pytest
import torch
from row_problems import assert_close, log2, representable, rows_of_any_norm

from bam_kernels.backends.interface import HALF_UNIT, LOG2_E, CommonPart

FLOOR = 1e-12  # shorter rows are divided by this
LEAST = 2**-149  # float32's


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The rows x (m, d) as they are, with features apart, or as (3, m/3, d) in strides of their own."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "views":
        return x.view(3, -1, x.shape[1]).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return x


def unit_and_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows (m, d) and norms (m, 1) in float64."""
    rows = x.double().flatten(0, -2)
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.clamp_min(FLOOR), norm


def check_projected(projected: torch.Tensor, d: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    """Bound: roundings of the largest entry of a row of d, and of the result and factor / norm to float32's least."""
    unit, norm = unit_and_norm(x)
    inverse = torch.where(norm < FLOOR, 0.0, factor / norm)
    along = (unit * d.double()).sum(1, keepdim=True)
    most = d.abs().amax(1, keepdim=True)
    assert_close(projected, (d.double() - unit * along) * inverse, 0, most * (2e-6 * inverse + LEAST) + LEAST)


class NormTests:
    # One feature; a tail of every vector; enough for float32's largest numbers to have a norm beyond float32; beyond a
    # turn of a row's block.
    @pytest.mark.parametrize(
        ("d", "layout"), [(1, "contiguous"), (7, "views"), (100, "transposed"), (100, "contiguous"), (4099, "views")]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rows_of_any_norm(self, whole, device, d, layout, dtype):
        most = torch.finfo(dtype).max
        x = laid_out(rows_of_any_norm(d).clamp(-most, most).to(device, dtype), layout)
        unit, norm = unit_and_norm(x)
        found = whole.normalize(x)
        assert_close(found.norm, norm[:, 0], 1e-12)
        assert_close(found.read, unit, 2e-7, LEAST)
        for factor in (1.0, 0.25):
            gradient = torch.randn(unit.shape).to(device)
            projected = whole.project_(gradient.clone(), found, factor)
            assert (projected[norm[:, 0] < FLOOR] == 0).all()
            check_projected(projected, gradient, x, factor)

    # No key, some rows, all rows; a vector and tails of every length of vector.
    @pytest.mark.parametrize("count", [0, 2, 5])
    @pytest.mark.parametrize("d", [1, 16, 100, 301])
    def test_rows_that_are_keys(self, whole, device, d, count):
        """They are centred as the potential is made, and their gradient has a part in common."""
        x = torch.randn(5, d).to(device)
        found = whole.normalize(x)
        centre, centred = found.read.mean(0), torch.full((count, d), 7.0, device=device)
        row = whole.centre_potential(found.read, centre, representable(0.05), centred)
        assert_close(log2(row), found.read.double() @ centre.double() / representable(0.05) * LOG2_E, 0, 1e-6)
        assert torch.equal(centred, found.read[:count] - centre)

        gradient, weights = torch.randn(5, d).to(device), torch.randn(count).to(device)
        added = gradient.double()
        added[:count] += 0.5 * weights.double()[:, None] * centre.double()
        check_projected(whole.project_(gradient, found, 2.0, CommonPart(weights, centre, 0.5)), added, x, 2.0)


class EmbeddingTests(NormTests):
    MANY = 2049
    """Rows of which the mean row's blocks read some in each of several turns."""

    # A tail of every vector; features of several blocks, and MANY rows; whole vectors in rows that are apart; one
    # feature.
    @pytest.mark.parametrize(
        ("shape", "order"),
        [
            ((3, 7, 5), (1, 0, 2)),
            ((None, 40), (0, 1)),
            ((2, 300, 24), (1, 0, 2)),
            ((40, 2049), (1, 0)),
            ((5, 1), (0, 1)),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_mean_row(self, whole, device, shape, order, dtype):
        shape = [size or self.MANY for size in shape]
        x = torch.randn(*(shape[i] for i in order)).to(device, dtype).permute(order)
        rows = x.double().flatten(0, -2)
        assert_close(whole.mean_row(x), rows.mean(0), 0, 3e-7)
        mean = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
        assert_close(whole.mean_unit_row(x), mean, 0, 3e-7)

    def test_mean_unit_row_of_a_rank_of_three(self, whole, device):
        x = torch.randn(3, 7, 5).to(device)
        assert_close(whole.mean_unit_row(x, 3), unit_and_norm(x)[0].mean(0) / 3, 0, 1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_mean_unit_row_of_any_norm(self, whole, device, dtype):
        x = rows_of_any_norm(100).to(device, dtype)
        assert_close(whole.mean_unit_row(x), unit_and_norm(x)[0].mean(0), 0, 1e-6)
        x[-1, 3] = torch.inf
        assert whole.mean_unit_row(x)[3].isnan()

    # What one warp has, at the edge and past it; whole vectors in rows that are not aligned; a block of one warp, of
    # several with a part, and of all.
    @pytest.mark.parametrize(("d", "offset"), [(256, 0), (264, 0), (256, 1), (1024, 4), (2056, 0), (4096, 0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_whole_vectors(self, whole, device, d, offset, dtype):
        x = torch.randn(5, d + 8).to(device, dtype)[:, offset : offset + d]
        unit, norm = unit_and_norm(x)
        centre = unit.mean(0).float()
        half, potential = whole.half_rows(x, centre, representable(0.05))
        assert_close(half.norm, norm[:, 0], 1e-12)
        assert_close(half.read.double() / HALF_UNIT, unit - centre, 2**-11, 1e-6)
        assert_close(half.bias.double() / HALF_UNIT**2, (unit - centre) @ centre.double(), 1e-6, 1e-12)
        assert_close(log2(potential), unit @ centre.double() / representable(0.05) * LOG2_E, 0, 1e-6)
        gradient = torch.randn(5, d).to(device)
        check_projected(whole.project_(gradient.clone(), half, 0.25), gradient, x, 0.25)
        found = whole.normalize(x)
        assert_close(found.read, unit, 2e-7, LEAST)
        row = whole.centre_potential(found.read, centre, representable(0.05))
        assert_close(log2(row), found.read.double() @ centre.double() / representable(0.05) * LOG2_E, 0, 1e-6)

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "views"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_centred_half_rows_of_any_norm(self, whole, device, layout, dtype):
        x = laid_out(rows_of_any_norm(100).to(device, dtype), layout)
        unit, norm = unit_and_norm(x)
        centre = unit.mean(0).float()
        half, potential = whole.half_rows(x, centre, representable(0.05))
        along = unit @ centre.double()
        assert_close(half.norm, norm[:, 0], 1e-12)
        assert_close(half.read.double() / HALF_UNIT, unit - centre, 2**-11, 1e-6)
        assert_close(half.bias.double() / HALF_UNIT**2, (unit - centre) @ centre.double(), 1e-6, 1e-12)
        assert_close(log2(potential), along / representable(0.05) * LOG2_E, 0, 1e-6)
        gradient = torch.randn(unit.shape).to(device)
        check_projected(whole.project_(gradient.clone(), half, 0.25), gradient, x, 0.25)

    # Within a tile of 32, at its edge and past it; the same of 64, and more than two tiles.
    @pytest.mark.parametrize("m", [1, 32, 33, 64, 65, 130])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("more", [0, 5])
    def test_symmetrize(self, whole, device, m, more, dtype):
        """With `more`, a square within wider rows, the rest of which stays as it is."""
        wide = torch.randn(m, m + more).to(device, dtype)
        before, G = wide.clone(), wide[:, :m]
        expected, column_sums = G.float() + G.float().T, G.double().sum(0)
        sums = whole.symmetrize_(G)
        assert torch.equal(G, expected.to(dtype)) and torch.equal(wide[:, m:], before[:, m:])
        assert_close(sums, column_sums, 0, 1e-5 * max(1, m**0.5))

    # 7 images of 3 views, in strides of their own; rows as a matrix; features beyond a turn of a row's block.
    @pytest.mark.parametrize(("shape", "order"), [((3, 7, 5), (1, 0, 2)), ((5, 3, 7), (2, 1, 0)), ((9, 4097), (0, 1))])
    def test_centred_half_rows(self, whole, device, shape, order):
        x = torch.randn(*(shape[i] for i in order)).to(device).permute(order).mul_(1e3)
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
        gradient = torch.randn(rows.shape).to(device)
        expected = 0.25 * (gradient - unit * (unit * gradient).sum(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)
        assert_close(whole.project_(gradient.clone(), half, 0.25), expected, 1e-5, 1e-8)

    # Unit rows and their centre are almost equal: their difference keeps float32's precision, and the bias, of its
    # square, that of the sums.
    @pytest.mark.parametrize("d", [100, 1000])
    @pytest.mark.parametrize("spread", [1e-2, 1e-4])
    def test_half_rows_near_collapse(self, whole, device, d, spread):
        x = (torch.randn(d) + spread * torch.randn(6, d)).to(device) * 3e-5
        unit, _ = unit_and_norm(x)
        centre = unit.mean(0).float()
        half, _ = whole.half_rows(x, centre, 0.05)
        assert_close(half.read.double() / HALF_UNIT, unit - centre, 1.01 * 2**-11, 2**-25 / HALF_UNIT)
        assert_close(half.bias.double() / HALF_UNIT**2, (unit - centre) @ centre.double(), 1e-7, 2e-15)

    # A part of a vector, whole vectors, and several warps; rows that end in zeros of less and more than a turn.
    @pytest.mark.parametrize(("d", "columns"), [(5, 16), (62, 64), (256, 272), (2056, 2064), (40, 128)])
    @pytest.mark.parametrize("n", [0, 3, 7])
    def test_messages(self, whole, device, d, columns, n):
        x = torch.randn(7, d).to(device)
        room = torch.full((9, columns), 7.0, dtype=torch.float16, device=device)
        given = x, torch.randn(d).to(device) / d**0.5, 0.05
        half, potential = whole.half_rows(*given, room[1 : 1 + n])
        alone, same = whole.half_rows(*given)
        found, expected = (*half[:2], half.bias, *potential), (*alone[:2], alone.bias, *same)
        # A kernel with a message is compiled by itself, and may round a sum otherwise.
        for with_message, without in zip(found, expected, strict=True):
            assert_close(with_message, without, 1e-6 if without.dtype != torch.float16 else 2**-10, 1e-6)
        sent = room[1 : 1 + n]
        assert torch.equal(sent[:, :d], half.read[:n]) and (sent[:, d:-2] == 0).all()
        assert torch.equal(sent[:, -2:].contiguous().view(torch.float32)[:, 0], half.bias[:n])
        assert (room[0] == 7).all() and (room[1 + n :] == 7).all()

    # Keys that differ little and rows that differ much, the other way round, and keys that do not differ at all.
    @pytest.mark.parametrize("spreads", [(0.02, 1.0), (1.0, 0.02), (0.3, 0.2), (0.0, 0.5)])
    def test_products_fit_the_fixed_point(self, whole, device, spreads):
        common = torch.randn(19).to(device)
        keys, others = (
            common + spread * torch.randn(m, 19).to(device) for spread, m in zip(spreads, (37, 5), strict=True)
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

    # Fewer than a vector; a turn of vectors, and more with a tail; biases that are not aligned. Extremes at the ends
    # and in a later turn.
    @pytest.mark.parametrize(("n", "m"), [(1, 2), (8192, 4096), (8195, 9001), (70, 20000), (20000, 70)])
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("at", [0.0, 0.87, 1.0])
    def test_the_step_of_many_biases(self, whole, device, n, m, offset, at):
        centre = torch.randn(1030).to(device) / 1030**0.5 * 0.7
        biases = [torch.rand(offset + count) * 100 for count in (n, m)]
        for bias, least in zip(biases, (-900.0, -500.0), strict=True):
            bias[offset + int(at * (len(bias) - offset - 1))] = least
        keys, rows = (bias.to(device)[offset:] for bias in biases)
        left = 1 - centre.double().square().sum().item()
        a, b = ((left + 2 * least / HALF_UNIT**2) ** 0.5 for least in (900.0, 500.0))
        expected = min(a * b + 900 / HALF_UNIT**2, a) * HALF_UNIT**2 / 32000
        expected = torch.tensor([expected], device=device)
        assert_close(whole.product_step(centre, keys, rows).scalar.double(), expected, 1e-6)
        # The least of all rows is in the first tensor of them, or in the other.
        for others in (rows[:1], rows[: len(rows) // 2], torch.cat((rows, rows + 1))):
            for pair in ((rows, (others + 1).clone()), ((others + 1).clone(), rows)):
                assert_close(whole.product_step(centre, keys, *pair).scalar.double(), expected, 1e-6)

    def test_centre_potential_at_the_least_epsilon(self, whole, device):
        epsilon = representable(1e-3)
        unit = torch.nn.functional.normalize(torch.randn(4, 70).to(device), dim=1)
        centre = torch.randn(70).to(device) / 8
        row = whole.centre_potential(unit, centre, epsilon)
        assert (row.exponent == row.exponent.round()).all()
        assert_close(log2(row), unit.double() @ centre.double() / epsilon * LOG2_E, 0, 1e-6)
