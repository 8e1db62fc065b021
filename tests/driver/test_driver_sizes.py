"""Image sizes at which a backbone would ignore part of the image, or fails, are refused with sizes that work."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from driver import checkpoint, config, model, segment_video
from driver.config import UserError
from driver.distributed import World
from driver.evaluation import frozen

# ViTs of 16 and 14 pixels; MLPs and a network of convolutions with such patches; stems of 4 x 4 without padding; a stem
# of 7 x 7 whose later layers need more; pools in a ViT; positions of a fixed grid; windows.
REFUSED = [
    ("vit_tiny_patch16_224", 40, "its patches of 16 pixels do not divide --data.size 40; give 32 or 48"),
    ("vit_tiny_patch16_224", 8, "give 16"),
    ("deit_tiny_patch16_224", 47, "its patches of 16 pixels do not divide --data.size 47; give 32 or 48"),
    ("cait_xxs24_224", 33, "its patches of 16 pixels do not divide --data.size 33; give 32 or 48"),
    ("eva02_tiny_patch14_224", 32, "its patches of 14 pixels do not divide --data.size 32; give 28 or 42"),
    ("mixer_s32_224", 48, "have no influence on its features at --data.size 48; give 32 or 64"),
    ("convmixer_768_32", 32, "have no influence on its features at --data.size 32; give 28 or 35"),
    ("convnext_atto", 50, "have no influence on its features at --data.size 50; give 48 or 52"),
    ("swin_tiny_patch4_window7_224", 63, "its patches of 4 pixels do not divide --data.size 63; give 60 or 64"),
    ("caformer_s18", 50, "have no influence on its features at --data.size 50; give 48 or 52"),
    ("pit_ti_224", 36, "give 32 or 40"),
    ("levit_128s", 40, "cannot take images of 40 x 40 pixels (The size of tensor a (9)"),
    pytest.param("efficientformer_l1", 32, "at --data.size 32; give 224", marks=pytest.mark.slow),
    pytest.param("mvitv2_tiny", 36, "cannot take images of 36 x 36 pixels (index", marks=pytest.mark.slow),
    pytest.param("inception_v3", 100, "at --data.size 100; give 99 or 101", marks=pytest.mark.slow),
    pytest.param("beit_base_patch16_224", 40, "give 32 or 48", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, size, message", REFUSED)
def test_sizes_that_are_refused(name, size, message):
    with pytest.raises(UserError, match=rf"^--model\.name {name}: .*{re.escape(message)}") as error:
        model.Network(config.Model(name=name), 3, size)
    if near := re.search(r"give (\d+)(?: or (\d+))?$", str(error.value)):
        assert all(int(side) != size for side in near.groups() if side)


# Sides that are no multiple of the stride, in networks that pad; and ResNets whose residual branches begin at zero.
TAKEN = [("convnet", 7), ("resnet18", 33), ("test_efficientnet", 33), ("pvt_v2_b0", 50), ("xcit_nano_12_p16_224", 40)]


@pytest.mark.parametrize("name, size", TAKEN)
def test_sizes_that_are_taken(name, size):
    """The gradient of the features says that the last row and column have influence."""
    network = model.Network(config.Model(name=name, head_width=8, head_dim=4), 3, size).eval()
    images = torch.rand(2, 3, size, size, requires_grad=True)
    network.backbone(images).square().sum().backward()
    influence = images.grad.abs().sum((0, 1))
    assert influence[-1].max() > 0 and influence[:, -1].max() > 0


def test_a_small_stem_before_zero_branches_is_taken():
    model.Network(config.Model(name="resnet18", stem="small"), 3, 32)


def test_the_size_of_local_views():
    message = "its patches of 16 pixels do not divide --data.local-size 40; give 32 or 48"
    with pytest.raises(UserError, match=re.escape(message)):
        model.Network(config.Model(name="test_vit"), 3, 64, local_size=40)


def test_the_size_of_an_evaluation():
    message = "its patches of 16 pixels do not divide --backbone.size 72; give 64 or 80"
    with pytest.raises(UserError, match=re.escape(message)):
        frozen.Backbone(name="test_vit", size=72, device="cpu").load()
    assert frozen.Backbone(name="swin_tiny_patch4_window7_224", size=64, device="cpu").load().size == 64


def test_an_evaluation_at_another_size_than_the_runs():
    """A convnet keeps the depth that it has from its run, and timm's positions are resampled to the new size."""
    for name in ("convnet", "test_vit"):
        directory = Path(name)
        directory.mkdir()
        options = config.Model(name=name, head_width=8, head_dim=4)
        data = config.Data(source="folder", root=Path("images"), augmentation="simclr", size=32)
        config.save(config.Config(data=data, model=options), directory)
        network = model.Network(options, 3, 32)
        torch.save({"network": network.state_dict(), "teacher": None}, directory / checkpoint.FILE)
        found = frozen.Backbone(run=directory, size=64, device="cpu").load()
        assert found.features(torch.rand(2, 3, 64, 64)).isfinite().all()
        weight = "blocks.0.attn.qkv.weight" if name == "test_vit" else "0.weight"
        assert torch.equal(found.model.state_dict()[weight], network.backbone[1].state_dict()[weight])


def test_frames_of_a_film():
    """Patches of 14 pixels divide neither 480 nor 64; a model of a fixed size cannot take frames at all."""
    backbone = frozen.Backbone(name="vit_small_patch14_dinov2", size=28, device="cpu")
    message = "--short-side 480: must be a multiple of the backbone's patch of 14, as 476 or 490"
    with pytest.raises(UserError, match=re.escape(message)):
        segment_video.main(segment_video.Options(davis=Path("davis"), backbone=backbone), World())
    assert segment_video.network_size((854, 480), 476, 14) == (476, 840)
    cait = frozen.Backbone(name="cait_xxs24_224", size=64, device="cpu").load()
    with pytest.raises(UserError, match=r"Cait: cannot take images of 64 x 96 pixels \("):
        cait.patches(torch.rand(1, 3, 64, 96))
