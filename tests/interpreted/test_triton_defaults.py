"""backend="triton" under other defaults of torch; the flash engine too."""

import pytest
import torch
from default_tests import DefaultTests, Outcome, assert_same
from problems import features
from torch_defaults import NAMES, Default
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import bam_loss, checked_call, tune
from bam_kernels.backends.triton import tiles


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def device() -> torch.device:
    return DEVICE


_expected: dict[tuple[str, ...], list[torch.Tensor]] = {}


def kept(what: tuple[str, ...], outcome: Outcome) -> list[torch.Tensor]:
    """What `outcome` returns under torch's own defaults, once for all tests: the interpreter takes seconds for it.

    On a GPU each test has a call of its own, so that the next one, under another default, is recorded.
    """
    if DEVICE.type != "cpu":
        return outcome()
    if what not in _expected:
        _expected[what] = outcome()
        checked_call.forget()
    return _expected[what]


class TestDefaults(DefaultTests):
    def expected(self, what: tuple[str, ...], outcome: Outcome) -> list[torch.Tensor]:
        return kept(what, outcome)


@pytest.mark.parametrize("default", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_flash_engine(default, dtype):
    student = features(3, 6, 7).to(DEVICE, dtype)

    def outcome() -> list[torch.Tensor]:
        leaf = student.clone().requires_grad_()
        loss = bam_loss(leaf, backend="triton", engine="flash")
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    assert_same(outcome, Default(default), kept(("flash", str(dtype)), outcome))


@pytest.mark.parametrize("default", NAMES)
def test_what_tuning_runs(default):
    def outcome() -> list[torch.Tensor]:
        return [job.run().clone() for job in tune.jobs(8, 16, 16, DEVICE)]

    assert tiles.row_tile(8, 16)
    assert_same(outcome, Default(default), kept(("tuning",), outcome))
