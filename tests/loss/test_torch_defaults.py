"""The library follows none of torch's defaults: dtype, device, the legacy tensor type, what is in an empty tensor."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import cuda_device
import pytest
import torch
from default_tests import DefaultTests, assert_same
from problems import features, needs_cpu_kernels
from torch_defaults import NAMES, Default

from bam_kernels import BAMLoss, GradientCache, __main__, bam_loss, bam_targets
from bam_kernels.backends import cuda


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu_kernels), "cuda"])
def backend(request, monkeypatch) -> str:
    if request.param == "cuda" and cuda_device.DEVICE.type == "cpu":
        monkeypatch.setattr(cuda, "kernels", cuda_device.kernels_on)
        monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return cuda_device.DEVICE if backend == "cuda" else torch.device("cpu")


class TestDefaults(DefaultTests):
    pass


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def legacy_tensor_type():
    torch.set_default_tensor_type(torch.DoubleTensor)
    try:
        yield
    finally:
        torch.set_default_tensor_type(torch.FloatTensor)


@contextmanager
def filled_memory():
    """Every empty tensor begins with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
@pytest.mark.parametrize("setting", [default_device, legacy_tensor_type, filled_memory])
def test_other_settings(backend, device, setting):
    student, teacher = features(3, 6, 7).to(device), features(2, 6, 7, seed=1).to(device)

    def outcome() -> list[torch.Tensor]:
        leaf = student.clone().requires_grad_()
        loss = bam_loss(leaf, teacher, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaf), bam_targets(student, backend=backend)]

    assert_same(outcome, setting, outcome())


# The default is another one while gradients are computed, or was.
@pytest.mark.parametrize("default", NAMES)
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_default_that_changes_between_forward_and_backward(backend, device, default, during):
    student = features(2, 6, 7).to(device)

    def gradient(forward: Default, backward: Default) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        with forward():
            loss = BAMLoss(backend=backend)(leaf)
        with backward():
            loss.backward()
        return leaf.grad

    usual, other = Default("float32"), Default(default)
    found = gradient(other, usual) if during == "forward" else gradient(usual, other)
    assert torch.equal(found, gradient(usual, usual))


@needs_cpu_kernels
@pytest.mark.parametrize("default", NAMES)
def test_the_doctor(default, capsys):
    def outcome() -> list[torch.Tensor]:
        assert __main__.main() == 0
        return []

    assert_same(outcome, Default(default), outcome())
    said = capsys.readouterr().out.split("\nbackend")
    assert said[1].split("bam_kernels")[0] == said[2]


@pytest.mark.parametrize("default", NAMES)
def test_a_gradient_cache(default):
    torch.manual_seed(0)
    model, batches = torch.nn.Linear(5, 4), features(3, 6, 5).split((2, 4), dim=1)

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        loss = GradientCache(model, BAMLoss())(batches)
        return [loss, *(p.grad.clone() for p in model.parameters())]

    assert_same(outcome, Default(default), outcome())


def test_a_default_lasts_as_long_as_any_thread_needs_it():
    default, entered, left = Default("float64"), threading.Event(), threading.Event()

    def other() -> None:
        with default():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with default():
        thread.start()
        assert entered.wait(10)
    assert torch.get_default_dtype() == torch.float64
    left.set()
    thread.join()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("default", NAMES)
def test_an_entry_sees_the_default(default):
    seen = Default(default).during(lambda: torch.zeros(1))
    x = seen()
    assert (x.device.type if default == "meta" else str(x.dtype)) in ("meta", f"torch.{default}")
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"


def test_the_option_reaches_every_entry():
    """In a process of its own: what is replaced stays so."""
    code = """
import torch, torch_defaults
torch_defaults.install("float64")
from bam_kernels import BAMLoss, GradientCache, bam_loss, bam_targets, loss, reference, sinkhorn_attention
from bam_kernels.backends.cpu import CpuKernels
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.engine import slab
for entry in (bam_loss, loss.bam_loss, bam_targets, sinkhorn_attention, reference.bam_loss, slab.from_scores,
              BAMLoss.forward, CpuKernels.match, CudaKernels.match, CudaKernels.sinkhorn_pass, CudaKernels.half_rows,
              torch.Tensor.backward, torch.autograd.grad):
    assert hasattr(entry, "__wrapped__"), entry
seen = []
def criterion(z):
    seen.append(torch.get_default_dtype())
    return z.sum()
GradientCache(torch.nn.Linear(2, 2), criterion)([torch.ones(1, 1, 2)])
assert seen == [torch.float64] and torch.get_default_dtype() == torch.float32
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1] / "support")
