"""What `loss_and_stats` of every backend must give, against float64."""

import math

import pytest
import torch
from row_problems import assert_close

from bam_kernels.engine.sums import loss_and_stats
from bam_kernels.layout import Layout

SPOILT = {"nothing": 0, "a norm": 4, "column sums": 1}  # how many statistics are NaN


def check_loss_and_stats(kernels, device, count: int, spoilt: str, dtype: torch.dtype = torch.float32) -> None:
    """Sums over `count` images, 2 * count columns and 3 * count rows; `spoilt` is not finite."""
    layout = Layout(B=count, V=3, L=2, T=2, D=1)
    images, c, norm = torch.rand(3, count, dtype=dtype), 1 + torch.rand(2 * count), torch.rand(3 * count).double()
    if spoilt == "a norm":
        norm[-1] = math.inf
    if spoilt == "column sums":  # after a single iteration
        c.fill_(math.nan)
    given = images.to(device), c.to(device), norm.to(device), layout, 7.5
    loss, stats = kernels.loss_and_stats(*given)
    expected_loss, expected = loss_and_stats(images.double(), c.double(), norm, layout, 7.5)
    assert expected.isnan().sum() == SPOILT[spoilt]
    assert torch.equal(stats.cpu().isnan(), expected.isnan()) and torch.equal(loss.cpu().isnan(), expected_loss.isnan())
    assert_close(loss.cpu().nan_to_num(), expected_loss.nan_to_num(), 1e-6)
    assert_close(stats.cpu().nan_to_num(), expected.nan_to_num(), 1e-6, 1e-7)


def check_sums_in_float64(kernels, device) -> None:
    """Differences of nearly equal numbers are taken before they are rounded."""
    layout = Layout(B=2, V=1, L=1, T=1, D=1)
    uniform = math.log(7)
    images = torch.tensor([[2 * uniform - 1e-9, 1e-9], [2 * uniform - 3e-9, 0.0], [0.0, 0.0]], dtype=torch.float64)
    c = torch.tensor([1.0, 1.0 - 2**-23], dtype=torch.float32)
    loss, stats = kernels.loss_and_stats(images.to(device), c.to(device), None, layout, uniform + 1e-9)
    assert loss.shape == () and stats.shape == (6,)
    kl, residual, gap = stats.cpu().double()[[2, 3, 5]]
    assert kl.item() == pytest.approx(1.5e-9, rel=1e-6)
    assert residual.item() == pytest.approx(2**-24, rel=1e-6)
    assert gap.item() == pytest.approx(1e-9, rel=1e-6)
