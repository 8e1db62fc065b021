"""Column and row steps, potentials, preparation and the plan operator in Triton against float64."""

import pytest
import torch
from embedding_tests import EmbeddingTests
from sinkhorn_tests import SinkhornTests
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import triton as backend
from bam_kernels.backends.interface import DeviceNumber, Potential
from bam_kernels.backends.triton import launch_sinkhorn, tiles
from bam_kernels.backends.triton.row_kernels import MEAN_TILE


@pytest.fixture(params=[tiles.LONGEST_ROW, 16], ids=["one read", "two reads"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(launch_sinkhorn, "LONGEST_ROW", request.param)
    return backend.kernels()


@pytest.fixture
def whole():
    return backend.kernels()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


class TestSinkhorn(SinkhornTests):
    # One entry; below, at and above a block of 32 columns and 8 rows; rows of whole vectors that do not fill their
    # block; primes; more than one block of 1024 columns.
    SHAPES = ((1, 1), (7, 31), (8, 32), (9, 33), (5, 48), (17, 97), (3, 1025))
    WIDE = 40


class TestEmbeddings(EmbeddingTests):
    MANY = 2 * MEAN_TILE[0] + 1


def test_scalars_and_the_centre_are_float32(whole):
    """The launcher refuses float64 scalars and centres: Triton would compile an untested kernel for them."""
    wrong = torch.ones(1, dtype=torch.float64, device=DEVICE)
    s, sums = torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    row = Potential(torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE))
    with pytest.raises(AssertionError):
        whole.column_lse(s, DeviceNumber(1.0, wrong), row, sums, sums.clone(), accumulate=False)
    with pytest.raises(AssertionError):
        whole.half_rows(s, sums.double(), epsilon=0.1)
    whole.column_lse(s, DeviceNumber(1.0, wrong.float()), row, sums, sums.clone(), accumulate=False)
    whole.half_rows(s, sums, epsilon=0.1)
