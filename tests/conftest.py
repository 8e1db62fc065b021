"""Fixtures that put process-wide settings of torch back, and the random numbers of every test."""

import zlib
from collections.abc import Iterator

import pytest
import torch
import torch_defaults

pytest.register_assert_rewrite(
    "problems", "row_problems", "match_tests", "sinkhorn_tests", "embedding_tests", "derivative_tests"
)


def pytest_addoption(parser) -> None:
    help = "run the library's functions while this dtype, or device, is torch's default; the tests' tensors keep theirs"
    parser.addoption("--torch-default", choices=torch_defaults.NAMES, help=help)


def pytest_configure(config) -> None:
    if config.getoption("torch_default"):
        torch_defaults.install(config.getoption("torch_default"))


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
