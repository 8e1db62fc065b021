"""backend="triton" under other defaults of torch; the flash engine too."""

import pytest
import torch
from default_tests import DefaultTests, assert_same
from problems import features
from torch_defaults import NAMES, Default
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, tune
from bam_kernels.backends.triton import tiles


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def device() -> torch.device:
    return DEVICE


class TestDefaults(DefaultTests):
    pass


@pytest.mark.parametrize("default", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_flash_engine(default, dtype):
    student = features(3, 6, 7).to(DEVICE, dtype)

    def outcome() -> list[torch.Tensor]:
        leaf = student.clone().requires_grad_()
        loss = bam_loss(leaf, backend="triton", engine="flash")
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    assert_same(outcome, Default(default))


@pytest.mark.parametrize("default", NAMES)
def test_what_tuning_runs(default):
    def outcome() -> list[torch.Tensor]:
        return [job.run().clone() for job in tune.jobs(8, 16, 16, DEVICE)]

    assert tiles.row_tile(8, 16)
    assert_same(outcome, Default(default))
