"""Exports of a run's backbone: the code that is printed makes the same features, for every family of models."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

from driver_runs import content
from photographs import write_classes

from driver import checkpoint, cli, config, export, model, train, weights
from driver.config import UserError
from driver.evaluation import frozen

VIT = config.Model(name="test_vit", heads=4, positions="sincos", frozen_patches=True, head_width=8, head_dim=4)


def write_run(backbone: config.Model, size: int, local_views: int = 0) -> model.Network:
    """Write the options and the checkpoint of an untrained run into the folder `run`."""
    data = config.Data(source="folder", root=Path("images"), augmentation="simclr", size=size)
    data = dataclasses.replace(data, local_views=local_views, local_size=32)
    Path("run").mkdir()
    options = config.Config(data=data, model=backbone)
    config.save(options, Path("run"))
    torch.manual_seed(0)
    network = model.Network(backbone, 3, size, data.local_size if local_views else None)
    content = {"network": network.state_dict(), "teacher": None, "config": config.as_plain(options)}
    torch.save(content, Path("run") / checkpoint.FILE)
    return network.eval()


def run_printed_code(said: str) -> torch.nn.Module:
    """Backbone that the indented lines of the output make, in a namespace of their own."""
    names: dict = {}
    exec("\n".join(line[4:] for line in said.splitlines() if line.startswith("    ")), names)
    return names["backbone"].eval()


FAMILIES = [
    ("convnet", 8, {}),
    ("test_vit", 32, {"heads": 4, "positions": "sincos", "drop_path": 0.1}),
    ("deit_tiny_patch16_224", 32, {}),
    ("deit_tiny_distilled_patch16_224", 32, {}),
    ("vit_small_patch14_reg4_dinov2", 28, {}),
    ("vit_tiny_r_s16_p8_224", 64, {}),
    ("eva02_tiny_patch14_224", 28, {}),
    ("swin_tiny_patch4_window7_224", 64, {}),
    ("cait_xxs24_224", 32, {}),
    ("mixer_s32_224", 64, {}),
    ("xcit_nano_12_p8_224", 32, {}),
    ("convnext_atto", 32, {}),
    pytest.param("caformer_s18", 32, {}, marks=pytest.mark.slow),
    ("test_resnet", 32, {}),
    ("coat_tiny", 64, {}),
    ("resnet18", 32, {"stem": "small"}),
    pytest.param("beit_base_patch16_224", 32, {}, marks=pytest.mark.slow),
    pytest.param("maxvit_tiny_tf_224", 64, {}, marks=pytest.mark.slow),
    pytest.param("volo_d1_224", 64, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, size, options", FAMILIES)
def test_printed_code_makes_the_backbone(name, size, options, capsys):
    network = write_run(config.Model(name=name, head_width=8, head_dim=4, **options), size)
    assert export.main(["run"]) == 0
    said = capsys.readouterr().out
    mean, std = (torch.tensor(eval(part)).view(3, 1, 1) for part in re.findall(r"\[\d[^\]]*\]", said)[-2:])
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = network.backbone(images)
        found = run_printed_code(said)((images - mean) / std)
    assert expected.std() > 0 and (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_printed_code_with_local_views_and_an_odd_path(capsys):
    network = write_run(dataclasses.replace(VIT, name="test_vit.r160_in1k"), 64, local_views=1)
    Path("my 'best' run (2)").mkdir()
    assert export.main(["run", "--out=my 'best' run (2)/a.safetensors"]) == 0
    backbone = run_printed_code(capsys.readouterr().out)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert (backbone(network.backbone[0](images)) - network.backbone(images)).abs().max() < 1e-5


# Exports of a trained run


@pytest.fixture
def run() -> Path:
    """A run of a small ViT with a teacher."""
    write_classes(Path("pets"), 4)
    options = ["--data.root=pets", "--data.size=64", "--data.batch-size=8", "--data.workers=0", "--optim.epochs=1"]
    options += ["--model.name=test_vit", "--model.heads=4", "--model.positions=sincos", "--data.held-out=0"]
    return train.pretrain(cli.parse([*options, "--model.teacher-momentum=0.5"]))


@pytest.mark.parametrize("whose", [None, "student"])
def test_exported_weights_are_the_teachers_or_the_students(run, whose, capsys):
    assert export.main([str(run), *([] if whose is None else [f"--whose={whose}"])]) == 0
    backbone = run_printed_code(capsys.readouterr().out)
    saved = content(run)["network" if whose else "teacher"]
    assert all(torch.equal(value, saved[f"backbone.1.{name}"]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    "out, message",
    [
        ("nowhere/backbone.safetensors", "--out nowhere/backbone.safetensors: there is no folder nowhere"),
        ("backbone.pth", "--out backbone.pth: its name must end in .safetensors"),
    ],
)
def test_export_to_a_file_that_cannot_be(out, message, capsys):
    write_run(VIT, 32)
    assert export.main(["run", f"--out={out}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_exported_onnx_gives_the_features(run):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    assert export.main([str(run), "--format=onnx"]) == 0
    onnx.checker.check_model(str(run / "backbone.onnx"))
    options = cli.parse([f"--config={run}/config.yaml"])
    network = model.Network(options.model, 3, 64)
    network.load_state_dict(content(run)["teacher"])
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected = network.backbone.eval()(images)
    (found,) = ReferenceEvaluator(str(run / "backbone.onnx")).run(None, {"images": images.numpy()})
    assert abs(found - expected.numpy()).max() < 1e-4


def test_a_run_starts_from_weights(run):
    """Exported ones, or a run's own directory: the network's backbone is theirs, with another head."""
    assert export.main([str(run), "--out=some.safetensors"]) == 0
    teacher = content(run)["teacher"]

    def start(path: str, backbone: config.Model = VIT) -> model.Network:
        part = dataclasses.replace(backbone, weights=Path(path), frozen_patches=False)
        options = config.Config(data=config.Data(size=64), model=part)
        return train.make_networks(options, 3, torch.device("cpu"), torch.float32)[0]

    for path in ("some.safetensors", str(run)):
        network = start(path)
        assert all(torch.equal(v, teacher[k]) for k, v in network.state_dict().items() if k.startswith("backbone"))
    with pytest.raises(UserError, match=r"some\.safetensors: does not fit the backbone convnet: 0 of its"):
        start("some.safetensors", config.Model())
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        start("nowhere.pth")
    student = config.Model(name="test_vit", heads=4)
    backbone = model.Network(student, 3, 64).backbone[1]
    weights.load_backbone(backbone, run, "student", student)
    assert torch.equal(backbone.cls_token, content(run)["network"]["backbone.1.cls_token"])


def test_weights_for_another_number_of_heads(run):
    """No shape tells 2 heads from 4, but the features differ."""
    assert export.main([str(run), "--out=some.safetensors"]) == 0
    evaluated = frozen.Backbone(name="test_vit", size=64, device="cpu", weights=Path("some.safetensors"))
    for path in ("some.safetensors", str(run)):
        message = (
            rf"{path}: its run has --model\.heads 4, here heads is 0 .*give --model\.heads 4, or --backbone\.heads 4"
        )
        with pytest.raises(UserError, match=message):
            dataclasses.replace(evaluated, weights=Path(path)).load()
    images = torch.rand(2, 3, 64, 64)
    expected = frozen.Backbone(run=run, device="cpu").load().features(images)
    assert torch.equal(dataclasses.replace(evaluated, heads=4).load().features(images), expected)


def test_a_note_where_a_run_standardised_images_in_another_way(capsys):
    """The run began with timm's weights, which expect another mean; weights of its export are evaluated with ours."""
    name = "test_vit.r160_in1k"
    write_run(config.Model(name=name, pretrained=True, head_width=8, head_dim=4), 64)
    assert export.main(["run"]) == 0
    assert "note" not in capsys.readouterr().out
    frozen.Backbone(run=Path("run"), device="cpu").load()
    assert "note" not in capsys.readouterr().out
    for path in ("run", "run/backbone.safetensors"):
        frozen.Backbone(name="test_vit", size=64, device="cpu", weights=Path(path)).load()
        assert f"note: the run of {path} standardised images with mean (" in capsys.readouterr().out
