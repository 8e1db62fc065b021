"""Backbone weights from files that people have: layouts of training code, heads, sizes; files that are no weights."""

import argparse
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm
import torchvision

from driver import weights
from driver.config import UserError
from driver.weights import search

HEAD = {"head.mlp.0.weight": torch.ones(2, 2), "projector.0.weight": torch.ones(2, 2)}


def vit(value: float = 1.0, **options) -> dict[str, torch.Tensor]:
    """Weights of a small ViT, all of one value."""
    model = timm.create_model("test_vit", num_classes=0, **options)
    return {name: torch.full_like(weight, value) for name, weight in model.state_dict().items()}


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def load(content: dict, name: str = "test_vit", whose: str | None = None, **options) -> torch.nn.Module:
    torch.save(content, "weights.pth")
    backbone = timm.create_model(name, num_classes=0, **options)
    weights.load_backbone(backbone, Path("weights.pth"), whose)
    return backbone


def value_of(backbone: torch.nn.Module) -> float:
    """The one value of all weights."""
    (value,) = {number for weight in backbone.state_dict().values() for number in weight.unique().tolist()}
    return value


# Layouts


def timm_training() -> dict:
    state = vit(1.0) | {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}
    ema = {name: 2 * value for name, value in state.items()}
    arguments = argparse.Namespace(lr=0.1, output=Path("out"))
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    more = {"arch": "test_vit", "args": arguments, "metric": np.float64(3), "optimizer": optimizer}
    return {"epoch": 3, "state_dict": state, "state_dict_ema": ema} | more


def mae() -> dict:
    decoder = {
        "masked_embed": torch.ones(1, 8),
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 5, 8),
    }
    return {"model": vit(1.0) | decoder | under("decoder_blocks.0.", {"norm1.weight": torch.ones(8)})}


def lightning() -> dict:
    state = under("model.encoder.", vit(1.0)) | under("model.", HEAD) | {"criterion.center": torch.ones(2)}
    return {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "callbacks": {"ModelCheckpoint{}": {"best": "x"}}}


LAYOUTS = {
    "bare": (lambda: vit(1.0), 1, 1, 1),
    "timm": (timm_training, 2, 1, 2),
    "compiled-ddp": (lambda: {"model": under("module._orig_mod.", vit(1.0))}, 1, 1, 1),
    "lightning": (lightning, 1, 1, 1),
    "mae": (mae, 1, 1, 1),
    "dino": (
        lambda: {
            "student": under("module.backbone.", vit(1.0)) | under("module.", HEAD),
            "teacher": under("backbone.", vit(2.0)) | HEAD,
            "args": argparse.Namespace(arch="vit"),
        },
        2,
        1,
        2,
    ),
    "moco": (
        lambda: {
            "state_dict": under("module.encoder_q.", vit(1.0) | {"fc.0.weight": torch.ones(2)})
            | under("module.encoder_k.", vit(2.0) | {"fc.0.weight": torch.ones(2)})
            | {"module.queue": torch.ones(2, 3), "module.queue_ptr": torch.ones(1)}
        },
        1,
        1,
        2,
    ),
    "moco-v3": (
        lambda: {
            "state_dict": under("module.base_encoder.", vit(1.0) | HEAD)
            | under("module.momentum_encoder.", vit(2.0) | HEAD)
            | {"module.predictor.0.weight": torch.ones(2)}
        },
        1,
        1,
        2,
    ),
    "byol": (
        lambda: {"state_dict": under("backbone.", vit(1.0)) | under("backbone_momentum.", vit(2.0)) | HEAD},
        1,
        1,
        2,
    ),
    "lightly": (
        lambda: {"state_dict": under("student_backbone.", vit(1.0)) | under("teacher_backbone.", vit(2.0))},
        2,
        1,
        2,
    ),
    "averaged": (
        lambda: {"state_dict": under("model.", vit(1.0)) | under("swa_model.module.", vit(2.0))},
        2,
        1,
        2,
    ),
    "swav": (lambda: under("module.", vit(1.0)) | {"module.prototypes.weight": torch.ones(2, 2)}, 1, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_training_code(layout):
    """Student and teacher have weights of different values, so that the wrong one is seen."""
    make, default, student, teacher = LAYOUTS[layout]
    for whose, expected in ((None, default), ("student", student), ("teacher", teacher)):
        assert value_of(load(make(), whose=whose)) == expected


def test_what_was_taken_and_left_out_is_printed(capsys):
    load(LAYOUTS["dino"][0]())
    assert capsys.readouterr().out == (
        f"weights.pth: {len(vit())} of {2 * len(vit()) + 4} tensors under teacher.backbone; "
        f"left out: student ({len(vit()) + 2}), teacher.head (1), teacher.projector (1)\n"
    )


def test_a_resnet_by_the_indices_of_its_children():
    """As Lightly and torchvision's feature extractors hold it, in a Sequential without the classifier."""
    resnet = torchvision.models.resnet18()
    parts = torch.nn.Sequential(*list(resnet.children())[:-1])
    content = {"state_dict": under("backbone.", parts.state_dict()) | under("projection_head.", HEAD)}
    found = load(content, "resnet18").state_dict()
    assert len(found) == len(resnet.state_dict()) - 2
    assert all(torch.equal(value, resnet.state_dict()[name]) for name, value in found.items())


def test_dinov2_with_registers_and_chunked_blocks():
    """Position embeddings of its class token are added to that token, and those of the patches are resampled."""
    name = "vit_small_patch14_reg4_dinov2"
    own = timm.create_model(name, num_classes=0, depth=2, img_size=28).state_dict()
    theirs = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", key): torch.ones_like(value) for key, value in own.items()}
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["pos_embed"] = torch.full((1, 1 + 9, 384), 2.0)
    theirs["mask_token"] = torch.zeros(1, 384)
    found = load({"teacher": under("backbone.", theirs)}, name, depth=2, img_size=28).state_dict()
    assert (found["cls_token"] == 3).all() and (found["pos_embed"] - 2).abs().max() < 1e-5
    assert found["pos_embed"].shape == (1, 4, 384)
    assert all((value == 1).all() for key, value in found.items() if key not in ("cls_token", "pos_embed"))


def test_a_folder_of_a_model_hub():
    save_file = pytest.importorskip("safetensors.torch").save_file
    Path("model").mkdir()
    save_file(vit(3.0), "model/model.safetensors")
    backbone = timm.create_model("test_vit", num_classes=0)
    weights.load_backbone(backbone, Path("model"))
    assert value_of(backbone) == 3


@pytest.mark.parametrize("name", ["test_vit", "cait_xxs24_224"])  # its converter resamples; its does not
def test_positions_are_resampled_to_the_size(name, capsys):
    big = timm.create_model(name, num_classes=0, img_size=64)
    rows = torch.arange(4.0).repeat_interleave(4)
    with torch.no_grad():
        big.pos_embed[0, -16:] = rows[:, None]
    found = load(big.state_dict(), name, img_size=128).pos_embed[0]
    grid = found[-64:].view(8, 8, -1)
    assert torch.equal(found[:-64], big.pos_embed[0, :-16]) and (grid - grid[:, :1]).abs().max() < 1e-5
    assert (grid[1:] - grid[:-1] > 0).all() and grid.mean().item() == pytest.approx(1.5, abs=1e-4)
    assert re.search(r"pos_embed resampled from 1x\d+x\d+ to 1x\d+x", capsys.readouterr().out)


def test_colour_weights_on_grey_images(capsys):
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    found = load(state, "resnet18", in_chans=1).conv1.weight
    assert torch.allclose(found[:, 0], state["conv1.weight"].sum(1), atol=1e-6)
    assert "conv1.weight adapted from 3 channels to 1" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchvisions_vit(prefix, capsys):
    """The features agree, so heads, norms and the order of queries, keys and values do, too."""
    shape = {"patch_size": 16, "num_layers": 2, "num_heads": 2}
    source = torchvision.models.VisionTransformer(image_size=64, hidden_dim=64, mlp_dim=192, num_classes=5, **shape)
    source.requires_grad_(False).eval()
    for weight in source.parameters():
        weight.add_(0.05 * torch.randn(weight.shape))
    found = load(under(prefix, source.state_dict()), "test_vit", depth=2, img_size=64).eval()
    source.heads = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    assert (found(images) - source(images)).abs().max() < 1e-4
    assert "30 of 32 tensors" in capsys.readouterr().out


def test_half_precision_files():
    """Such files often hold the counters of batch norms as numbers of half precision, too."""
    state = {name: value.half() for name, value in timm.create_model("test_resnet", num_classes=0).state_dict().items()}
    found = load({"state_dict": state}, "test_resnet").state_dict()
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in found.items())
    assert found["conv1.0.weight"].dtype == torch.float32


def test_positions_that_cannot_be_resampled():
    state = timm.create_model("levit_128s", num_classes=0).state_dict()
    with pytest.raises(
        UserError, match=r"attention_biases is 4x196 but must be 4x16, .*the size that the file was trained at"
    ):
        load(state, "levit_128s", img_size=64)


# Files of another network


def resnet(name: str) -> dict:
    return timm.create_model(name).state_dict()


@pytest.mark.parametrize(
    "content, name, message",
    [
        (lambda: resnet("resnet34"), "resnet18", "which has no layer1.2.conv1.weight, .* and 77 more"),
        (lambda: resnet("resnet18"), "resnet34", "100 of its 180 tensors are there; missing are layer1.2.conv1.weight"),
        (lambda: vit(depth=8), "test_vit", r"which has no blocks\.6\.norm1\.weight"),
        (lambda: vit(embed_dim=96), "test_vit", "cls_token is 1x1x96 but must be 1x1x64, .* more"),
        (lambda: vit(patch_size=8, img_size=80), "test_vit", "patch_embed.proj.weight is 64x3x8x8 but must be 64x3x16"),
        (lambda: vit(reg_tokens=4), "test_vit", "which has no reg_token"),
        (lambda: vit(init_values=1e-5), "test_vit", "which has no blocks.0.ls1.gamma"),
        (lambda: dict(list(vit().items())[:3]), "test_vit", r"3 of its \d+ tensors are there; missing are patch_embed"),
        (lambda: vit(in_chans=1), "test_vit", "proj.weight is 64x1x16x16 but must be 64x3x16x16"),
        (lambda: vit(torch.nan), "test_vit", "cls_token holds values that are not finite"),
        (
            lambda: {"encoder1": vit(1.0), "encoder2": vit(2.0)},
            "test_vit",
            "several backbones that fit, 'encoder1.' and",
        ),
        (lambda: {k: v.to(torch.int8) for k, v in vit().items()}, "test_vit", "cls_token is torch.int8, torch.strided"),
        (
            lambda: {k: v.to("meta") for k, v in vit().items()},
            "test_vit",
            r"without values \(meta tensors\): cls_token",
        ),
        (lambda: {"student": vit()}, "test_vit", "no teacher in it, only student"),
        (lambda: {"teacher": vit()}, "test_resnet", r"0 of its \d+ tensors are there"),
        (lambda: {"features.0.0.weight": torch.ones(2)}, "test_vit", "These are names of a network of torchvision"),
        (lambda: {"state_dict": {}, "epoch": 3}, "test_vit", "it holds no tensors"),
    ],
)
def test_files_of_another_network(content, name, message):
    """The backbone is as before."""
    torch.save(content(), "weights.pth")
    backbone = timm.create_model(name, num_classes=0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    whose = "teacher" if "no teacher" in message else None
    with pytest.raises(UserError, match=rf"^weights\.pth: .*{message}"):
        weights.load_backbone(backbone, Path("weights.pth"), whose)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


# Files that are no weights


class Intruder:
    def __reduce__(self):
        return (Path("intruded").touch, ())


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.png", b"image")


def write_old(content: object, path: Path) -> None:
    """Write a file in the format before PyTorch 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_truncated(path: Path) -> None:
    torch.save(vit(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("nowhere.safetensors", None, "no such file"),
        ("folder.safetensors", Path.mkdir, "a folder without weights; none of checkpoint.pt, "),
        ("empty.pth", Path.touch, "an empty file"),
        ("page.pth", lambda p: p.write_text("\n<!DOCTYPE html><html>"), "a web page"),
        ("error.pth", lambda p: p.write_text('{"error": "gated"}'), "JSON text"),
        ("lfs.safetensors", lambda p: p.write_text("version https://git-lfs"), "a pointer of Git LFS"),
        ("packed.pth.gz", lambda p: p.write_bytes(b"\x1f\x8b\x08\x00"), "compressed with gzip"),
        ("keras.h5", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
        ("own.pkl", lambda p: p.write_bytes(pickle.dumps({"a": 1})), "a pickle of Python"),
        ("google.npz", lambda p: np.savez(p, a=np.ones(2)), "a NumPy archive"),
        ("images.zip", write_zip, "a zip archive of cat.png"),
        ("cut.pth", write_truncated, r"not whole: it ends within its content, after \d+ bytes"),
        ("script.pt", lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p), "a TorchScript program"),
        ("text.pth", lambda p: p.write_bytes(b"no tensors"), "neither a checkpoint .* starts with b'no tensors'"),
        ("bad.pth", lambda p: p.write_bytes(b"\x80\x02no"), r"not a readable checkpoint \("),
        ("list.pth", lambda p: torch.save([torch.ones(2)], p), "not a checkpoint but a list"),
        ("model.pth", lambda p: torch.save({"model": [1]}, p), "no backbone in it: it holds no tensors"),
        ("numbers.pth", lambda p: torch.save({0: torch.ones(2)}, p), "no backbone in it: it holds no tensors"),
        ("module.pth", lambda p: torch.save(torch.nn.Linear(2, 2), p), "does not fit the backbone test_vit: 0 of its"),
        ("index.index.json", lambda p: p.write_text("[]"), "not an index of files of weights"),
        (
            "old.pth",
            lambda p: write_old(torch.nn.Linear(2, 2), p),
            r".*run code.*holds objects of torch.nn.modules.linear.Linear\. Only if",
        ),
        ("code.pth", lambda p: torch.save({"a": Intruder()}, p), r"not read, .* code .*getattr.*weights_only=False"),
    ],
)
def test_files_that_are_no_weights(name, write, message):
    if write is not None:
        write(Path(name))
    with pytest.raises(UserError, match=rf"^{name}: {message}") as error:
        weights.load_backbone(timm.create_model("test_vit", num_classes=0), Path(name))
    assert "\n" not in str(error.value) and not Path("intruded").exists()


def test_the_printed_command_saves_weights_alone():
    write_old(torch.nn.Linear(2, 2), Path("module.pth"))
    with pytest.raises(UserError) as error:
        weights.read(Path("module.pth"))
    command = str(error.value).partition("weights.pth: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    assert weights.read(Path("weights.pth")).keys() == {"weight", "bias"}


def test_safetensors_that_are_not_whole():
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(vit(), "cut.bin")
    Path("cut.bin").write_bytes(Path("cut.bin").read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut\.bin: not a readable safetensors file \(.*copy it again"):
        weights.read(Path("cut.bin"))


def test_safetensors_that_is_not_installed(monkeypatch):
    Path("a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"a\.safetensors needs safetensors, which is not installed"):
        weights.read(Path("a.safetensors"))


def test_a_note_where_supervised_weights_expect_other_colours(capsys):
    name = "vit_tiny_patch16_224"
    load(timm.create_model(name, depth=1).state_dict(), name, depth=1)
    assert "expects images standardised with mean (0.5, 0.5, 0.5)" in capsys.readouterr().out
    load(timm.create_model(name, depth=1, num_classes=0).state_dict(), name, depth=1)
    assert "note" not in capsys.readouterr().out


def test_the_converter_is_of_the_models_family():
    """Official Swin checkpoints number the merging layers from 0, timm from 1."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=8)
    state = swin.state_dict()
    official = {re.sub(r"^layers\.(\d).down", lambda m: f"layers.{int(m[1]) - 1}.down", k): v for k, v in state.items()}
    assert official.keys() != state.keys() and search.convert(official, swin).keys() == state.keys()
