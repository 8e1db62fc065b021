"""timm's own weights as a start: where they come from, the colours they expect, and what excludes them."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm

from driver import config, train, weights
from driver.config import UserError
from driver.evaluation import frozen


@pytest.fixture
def hub(monkeypatch):
    """Stand-in for the download of test_vit's weights, which expect colours of their own."""
    original = timm.create_model
    torch.save(original("test_vit", in_chans=3).state_dict(), "hub.pth")

    def create(name, pretrained=False, **options):
        overlay = {"file": "hub.pth"} if pretrained else None
        return original(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", create)


def test_a_run_and_an_evaluation_start_from_timms_weights(hub, capsys):
    model = config.Model(name="test_vit.r160_in1k", pretrained=True, frozen_patches=True, head_width=8, head_dim=4)
    options = config.Config(data=config.Data(size=64), model=model)
    network = train.make_networks(options, 3, torch.device("cpu"), torch.float32)[0]
    evaluated = frozen.Backbone(name="test_vit.r160_in1k", pretrained=True, size=64, device="cpu").load()
    theirs = torch.load("hub.pth")
    for backbone in (network.backbone[1], evaluated.model):
        own = backbone.state_dict()
        assert own["pos_embed"].shape[1] == 17 and own.keys() == theirs.keys() - {"head.weight", "head.bias"}
        assert all(torch.equal(value, theirs[name]) for name, value in own.items() if name != "pos_embed")
    expected = torch.tensor(timm.get_pretrained_cfg("test_vit.r160_in1k").mean)
    for standardize in (network.backbone[0], evaluated.standardize):
        assert torch.equal(standardize.mean.flatten(), expected)
    assert not torch.equal(expected, torch.tensor((0.485, 0.456, 0.406)))
    assert "timm's weights of test_vit.r160_in1k: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "convnet"}, "--model.pretrained True: convnet has no such thing"),
        ({"weights": Path("a.pth")}, "excludes --model.weights a.pth"),
        ({"heads": 4}, "timm's weights are for --model.heads 0, not for 4"),
        ({"positions": "sincos"}, "timm's weights are for --model.positions own, not for sincos"),
        ({"name": "resnet18", "stem": "small"}, "timm's weights are for --model.stem own, not for small"),
        ({"name": "vit_tiny_patch16_224.dino"}, "its tags are vit_tiny_patch16_224.augreg_in21k"),
        ({"name": "resnetblur18"}, "timm has no weights of resnetblur18; it has, e.g., resne"),
    ],
)
def test_timms_weights_that_cannot_be(options, message):
    model = config.Model(**({"name": "test_vit", "pretrained": True} | options))
    with pytest.raises(UserError, match=re.escape(message)):
        train.make_networks(
            config.Config(data=config.Data(size=64), model=model), 3, torch.device("cpu"), torch.float32
        )


def test_timms_weights_without_a_connection(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", fail)
    message = (
        r"could not get the weights of resnet18 \(no route to host\)\. .*--model\.weights weights\.pth: python -c "
    )
    with pytest.raises(UserError, match=message):
        weights.load_pretrained(torch.nn.Identity(), "resnet18")


@pytest.mark.parametrize("options", [{"weights": Path("a.pth")}, {"heads": 4}])
def test_an_evaluation_with_timms_weights_and_others(options):
    ((name, value),) = options.items()
    message = f"--backbone.{name} {value}: excludes --backbone.pretrained"
    with pytest.raises(UserError, match=re.escape(message)):
        frozen.Backbone(name="test_vit", pretrained=True, **options).load()
