"""Embedding rows, and what their scores and gradients need, against float64: what every GPU backend passes.

As sinkhorn_tests.py; the form of rows of scores makes no difference here.
"""

import pytest
import torch
from row_problems import assert_close, log2, representable

from bam_kernels.backends.interface import HALF_UNIT, LOG2_E


class EmbeddingTests:
    # Within a tile of 32, at its edge and past it; the same of 64, and more than two tiles.
    @pytest.mark.parametrize("m", [1, 32, 33, 64, 65, 130])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_symmetrize(self, whole, device, m, dtype):
        G = torch.randn(m, m).to(device, dtype)
        expected = G.float() + G.float().T
        sums = whole.symmetrize_(G)
        assert torch.equal(G, expected.to(dtype))
        assert_close(sums, expected.double().sum(1), 0, 1e-5 * max(1, m**0.5))

    @pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_normalize_any_magnitude_and_stride(self, whole, device, magnitude, transposed):
        x = torch.randn(21, 5).to(device).T * magnitude
        x = x if transposed else x.contiguous()
        unit, norm, *_ = whole.normalize(x)
        expected = x.double().norm(dim=1)
        assert_close(norm, expected, 1e-12)
        assert_close(unit, x.double() / expected.clamp_min(1e-12)[:, None], 1e-6, 1e-30)

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

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_normalize_16_bit_rows(self, whole, device, dtype):
        x = torch.randn(3, 33).to(device, dtype)
        unit, norm, *_ = whole.normalize(x)
        assert_close(norm, x.double().norm(dim=1), 1e-12)
        assert_close(unit, x.double() / x.double().norm(dim=1, keepdim=True), 1e-6)

    @pytest.mark.parametrize("d", [1, 33, 4099])  # one feature; a tail; beyond a turn of a row's block
    def test_project_and_a_zero_row(self, whole, device, d):
        x = torch.randn(3, d).to(device)
        x[1] = 0
        unit, norm, *_ = rows = whole.normalize(x)
        assert (unit[1] == 0).all() and norm[1] == 0
        gradient = torch.randn(3, d).to(device)
        ud, gd = unit.double(), gradient.double()
        expected = (gd - ud * (ud * gd).sum(1, keepdim=True)) / norm[:, None].clamp_min(1e-30)
        expected[1] = 0
        assert_close(whole.project_(gradient, rows), expected, 1e-5, 1e-5)

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

    def test_centre_potential_at_the_least_epsilon(self, whole, device):
        epsilon = representable(1e-3)
        unit = torch.nn.functional.normalize(torch.randn(4, 70).to(device), dim=1)
        centre = torch.randn(70).to(device) / 8
        row = whole.centre_potential(unit, centre, epsilon)
        assert (row.exponent == row.exponent.round()).all()
        assert_close(log2(row), unit.double() @ centre.double() / epsilon * LOG2_E, 0, 1e-6)
