"""Targets, loss, entropies and gradient in Triton against float64, on chip and in blocks of a long row."""

import math
from functools import partial

import pytest
import torch
from match_tests import TAU, MatchTests, on_device
from row_problems import match_problem
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import interface
from bam_kernels.backends import triton as backend
from bam_kernels.backends.interface import LOG2_E
from bam_kernels.backends.triton import launch_match
from bam_kernels.backends.triton.tiles import Tile, power_of_two


@pytest.fixture(params=["on chip", "long"])
def kernels(request, monkeypatch):
    """Rows on chip; or blocks of 8 columns, so that short rows have several."""
    if request.param == "long":
        monkeypatch.setattr(launch_match, "image_tile", lambda L, n: None)
        monkeypatch.setattr(launch_match, "long_image_tile", lambda L, n: Tile(power_of_two(L), 8, 1, 1, 1))
        monkeypatch.setattr(launch_match, "IMAGES_AT_ONCE", 2)  # so that three images are two launches
    return backend.kernels()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


class TestMatch(MatchTests):
    pass


def test_scales_are_those_of_the_other_kernels():
    # A scale that rounds differently here and in sinkhorn_pass would cost P accuracy at small eps.
    for step in (1.0, 0.7 / 32000):
        assert (LOG2_E / 1e-3 * interface.number(step)[0]) == LOG2_E / 1e-3 * step


def test_no_sum_of_an_image_is_left_unwritten(kernels, monkeypatch):
    """Sums of the source are 0 where there is none; memory that `torch.empty` returns holds anything."""
    layout, scores, col = match_problem(2, 2, 3, 1, 3, 0.05)
    s = scores.to(DEVICE).view(2, layout.B, layout.N)
    guess = torch.zeros(2, layout.B, device=DEVICE)
    spoilt = partial(torch.full, fill_value=math.nan)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: spoilt(shape, **options))
    for source in (None, s):
        found = kernels.match(s, source, layout, on_device(col, DEVICE), guess, epsilon=0.05, temperature=TAU).images
        assert found.isfinite().all()
        assert (found[[0, 2]] == 0).all() == (source is None)
        assert (found[1] > 0).all()
