"""Backbone weights in files that hold objects, wrappers of single blocks, or tensors divided among several files."""

import argparse
import collections
import datetime
import functools
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm

from driver import weights
from driver.config import UserError


@pytest.fixture
def source() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_vit")


def check_loads(path: str, source: torch.nn.Module) -> None:
    """Load a file, and compare every tensor of the backbone with the source's."""
    backbone = timm.create_model("test_vit", num_classes=0)
    weights.load_backbone(backbone, Path(path))
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.state_dict().items())


class Settings:
    """Class of a user's own script, which the reader of a checkpoint does not have."""

    def __init__(self) -> None:
        self.rate = 0.1


def training_objects(model: torch.nn.Module) -> dict:
    """Objects that training code saves beside the weights."""
    counts: collections.defaultdict = collections.defaultdict(list)
    counts["loss"].append(0.5)
    hyper_parameters = {
        "criterion": torch.nn.MSELoss(),
        "activation": functools.partial(torch.nn.GELU, approximate="tanh"),
        "started": datetime.datetime(2024, 5, 1),
        "settings": Settings(),
        "kind": Settings,
        "space": types.SimpleNamespace(a=1),
    }
    return {
        "hyper_parameters": hyper_parameters,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "args": argparse.Namespace(out=Path("a")),
        "metric": np.float64(3),
        "history": np.ones(3),
        "meters": counts,
    }


def test_objects_beside_the_weights(source):
    torch.save({"state_dict": source.state_dict()} | training_objects(source), "all.ckpt")
    check_loads("all.ckpt", source)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, torch.nn.DataParallel])
def test_whole_modules(wrap, source):
    torch.save(wrap(source), "module.pth")
    check_loads("module.pth", source)


def test_buffers_of_a_whole_module():
    """Only persistent buffers are part of the weights."""
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    torch.save(module, "module.pth")
    found = weights.read(Path("module.pth"))
    assert {name for name, value in found.items() if value is not None} == module.state_dict().keys()


class Table(dict):
    """Dictionary of a user's own class, which has no stand-in."""


def test_a_damaged_file_with_objects(source):
    """Objects are named only where they are what cannot be read."""
    torch.save({"table": Table(a=1)} | training_objects(source), "table.pth")
    with pytest.raises(UserError, match=r"table\.pth: not read, since .* run code .*weights_only=False"):
        weights.read(Path("table.pth"))
    torch.save({"state_dict": source.state_dict()} | training_objects(source), "all.ckpt")
    content = Path("all.ckpt").read_bytes()
    header = content.rindex(b"PK\x03\x04", 0, content.index(b"all/data/0"))
    Path("all.ckpt").write_bytes(content[:header] + b"XXXX" + content[header + 4 :])
    with pytest.raises(UserError, match=r"all\.ckpt: damaged in its member data/0 \("):
        weights.read(Path("all.ckpt"))


class Intruder:
    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [eval, exec])
def test_code_beside_the_weights_is_not_run(call, source):
    code = "__import__('pathlib').Path('intruded').touch()"
    torch.save({"state_dict": source.state_dict(), "x": Intruder(call, code)}, "code.pth")
    check_loads("code.pth", source)
    assert not Path("intruded").exists()


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_single_blocks(wrapper, source):
    state = {re.sub(r"^(blocks\.\d+)\.", rf"\1.{wrapper}.", k): v for k, v in source.state_dict().items()}
    torch.save(state, "blocks.pth")
    check_loads("blocks.pth", source)


def test_weights_divided_among_files(source):
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = Path("hub")
    folder.mkdir()
    items = sorted(source.state_dict().items())
    places = {}
    for number, part in enumerate((items[:40], items[40:])):
        save_file(dict(part), folder / f"model-{number}.safetensors")
        places |= {name: f"model-{number}.safetensors" for name, _ in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (folder, index):
        check_loads(str(path), source)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"hub/model-1\.safetensors: no such file"):
        weights.read(folder)
