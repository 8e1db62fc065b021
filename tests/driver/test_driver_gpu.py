"""The driver's step as a GPU would take it, without one: fake tensors have a device, a shape and a type, and no values.

What would read a value on the host raises, and so does what would mix devices; a copy between host and device that
waits is seen by its arguments. Gradients are zeros here: there is no GPU whose thread could propagate them.
"""

import itertools
from pathlib import Path

import pytest
import torch
from driver_runs import TINY
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from driver import cli, data, train
from driver.config import Model
from driver.data import crops
from driver.distributed import World
from driver.model import Network

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class NoWaiting(TorchDispatchMode):
    """Copies between devices must not wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.overloadpacket in COPIES:
            source = args[0] if function.overloadpacket is COPIES[0] else args[1]
            asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.device.type != out.device.type and not asked:
                raise AssertionError(f"the host waits for a copy of {tuple(source.shape)} to {out.device}")
        return out


@pytest.fixture
def fake(monkeypatch):
    """The mode, in which gradients are zeros."""
    monkeypatch.setattr(torch.Tensor, "backward", zero_gradients)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    crops._quantiles.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    crops._quantiles.cache_clear()


def zero_gradients(tensor, gradient=None) -> None:
    """Of every leaf that the tensor was made from."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [of for of, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


def moved(module: torch.nn.Module) -> None:
    """Its weights and buffers are on the GPU that is not there."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=CUDA), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty_like(value, device=CUDA)


def training(mode, monkeypatch, options: list[str]) -> train.Training:
    """On a GPU that is not there, with images that live on it."""
    chosen = cli.parse(options)
    images = data.make_images(chosen.data, chosen.boxes, CPU, 0, World())
    networks = train.make_networks(chosen, images.channels, CPU, torch.float32)
    with mode:
        for network in networks:
            moved(network)
        images.train = [mode.from_tensor(part).to(CUDA) for part in images.train]
        images.device = CUDA
        if chosen.boxes.every:
            crops._quantiles(chosen.boxes.alpha, torch.empty(1, device=CUDA).device)
            images.set_boxes(torch.rand(images.training, 4))
        monkeypatch.setattr(train, "make_images", lambda *_: images)
        monkeypatch.setattr(train, "make_networks", lambda *_: networks)
        # The inventory of a run reads pixels, on the host and before the first step; here they have no values.
        monkeypatch.setattr(train.Inventory, "of", lambda _: train.Inventory(b"", b""))
        return train.Training(chosen, CUDA, World())


def take_steps(made: train.Training, mode: FakeTensorMode) -> None:
    with mode, NoWaiting():
        for micro_batches in itertools.islice(made.images.views(0), 2):
            made.step(micro_batches)
    made.log.close()
    assert made.state.step == len(made.log.pending) == 2
    assert all(numbers.device.type == "cuda" for numbers in made.log.pending)


@pytest.mark.filterwarnings("ignore:bam_kernels. computing with the slow", "ignore:Accessing the data pointer")
@pytest.mark.parametrize("name", ["adamw", "lars", "lamb"])
def test_a_step_waits_for_nothing(name, fake, monkeypatch):
    if name in ("lars", "lamb"):
        pytest.importorskip("timm")
    options = [f"--optim.name={name}", "--optim.clip-norm=1", "--model.teacher-momentum=0.9"]
    options += ["--data.batch-size=256", "--virtual-batch=512"]
    take_steps(training(fake, monkeypatch, [*TINY, *options]), fake)


@pytest.mark.filterwarnings("ignore:bam_kernels. computing with the slow", "ignore:Accessing the data pointer")
@pytest.mark.parametrize("model", ["convnet", "test_resnet", "test_vit"])
def test_a_step_of_photographs_waits_for_nothing(model, fake, monkeypatch):
    """Every augmentation, crops of two sizes around boxes, a teacher that sees all."""
    for package in ("torchvision", "kornia", "timm"):
        pytest.importorskip(package)
    from photographs import write_classes

    write_classes(Path("pets"), 11)
    options = ["--data.root=pets", "--data.size=32", "--data.local-views=2", "--data.local-size=16", "--data.workers=0"]
    options += ["--data.augmentation=dino", "--data.on-device=True", "--data.batch-size=4", "--boxes.every=1"]
    options += [f"--model.name={model}", "--model.teacher-momentum=0.9", "--model.teacher-views=all"]
    take_steps(training(fake, monkeypatch, options), fake)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_become_numbers_on_the_device(dtype, fake):
    """What is copied are the bytes of a micro-batch that has stayed on the host, without waiting."""
    network = Network(Model(name="convnet", width=4, head_dim=8), 3, 16).to(dtype)
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket is COPIES[0] and args[0].device != out.device:
                copied.append((args[0].dtype, out.dtype))
            return out

    with fake:
        moved(network)
        with NoWaiting(), Copies():
            out = network([torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)])
    assert out.device.type == "cuda" and out.dtype == dtype and copied == [(torch.uint8, torch.uint8)] * 2


def test_what_waits_is_seen(fake, monkeypatch):
    made = training(fake, monkeypatch, [*TINY, "--model.teacher-momentum=0.9"])
    with fake:
        with pytest.raises(DataDependentOutputException):
            made.log.add(0.1, torch.ones((), device=CUDA).item(), None)
        with NoWaiting(), pytest.raises(AssertionError, match=r"waits for a copy of \(2, 3\) to cuda"):
            torch.zeros(2, 3).to(CUDA)
        with NoWaiting(), pytest.raises(AssertionError, match=r"waits for a copy of \(2, 3\) to cpu"):
            torch.zeros(2, 3, device=CUDA).cpu()
    made.log.close()
