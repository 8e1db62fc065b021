"""Fixtures that put process-wide settings of torch back, and the random numbers of every test."""

import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite(
    "problems", "row_problems", "match_tests", "sinkhorn_tests", "embedding_tests", "derivative_tests"
)


@pytest.fixture(autouse=True)
def seeded(request) -> None:
    """Random numbers follow from the test's name, parameters included: a failure repeats on another machine. Tests draw
    on the CPU and move, since a GPU has numbers of its own."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """The test may call torch.set_float32_matmul_precision."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
