"""How tests share a machine, the random numbers of every test, and fixtures that restore torch's settings."""

import os
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Read when torch is imported. Two threads share work, so that this is tested too; those that wait leave the cores,
# which several processes share, to others.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("BAM_KERNELS_VERIFY", "off")  # no test tries kernels unless it is about that

import pytest
import torch
import torch_defaults

pytest.register_assert_rewrite(
    "problems",
    "row_problems",
    "match_tests",
    "sinkhorn_tests",
    "embedding_tests",
    "derivative_tests",
    "loss_checks",
    "stats_checks",
)


def pytest_addoption(parser) -> None:
    help = "run the library's functions while this dtype, or device, is torch's default; the tests' tensors keep theirs"
    parser.addoption("--torch-default", choices=torch_defaults.NAMES, help=help)


def pytest_configure(config) -> None:
    if config.getoption("torch_default"):
        torch_defaults.install(config.getoption("torch_default"))
    if "BAM_EMULATED_FOLDER" not in os.environ:  # workers of pytest-xdist, and what tests start, have it from here
        folder = tempfile.TemporaryDirectory(prefix="bam-emulated-")
        config.add_cleanup(folder.cleanup)
        os.environ["BAM_EMULATED_FOLDER"] = folder.name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process on a machine with a GPU, whose memory tests measure; else one a core, up to eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if torch.cuda.is_available() else min(cores, 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take tests one by one, but all tests of a file whose fixtures belong to the module."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares_fixtures(file: str) -> bool:
        return 'scope="module"' in Path(config.rootpath, file).read_text()

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_fixtures(file) else nodeid

    return Scheduler(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(autouse=True)
def seeded(request) -> None:
    """Random numbers follow from the test's name, parameters included: a failure repeats on another machine. Tests draw
    on the CPU and move, since a GPU has numbers of its own."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """No call repeats what another test has recorded or checked."""
    from bam_kernels import checked_call

    checked_call.forget()


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
