"""The driver's backbones, heads, schedules and arithmetic; recipes."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm
from driver_runs import TINY, content, pretrain, rows
from photographs import write_classes

from bam_kernels import BAMLoss
from driver import backbones, checkpoint, cli, config, contrastive_crop, model, optim, recipes, train
from driver.config import UserError

VIT = config.Model(name="test_vit", heads=4, positions="sincos", frozen_patches=True, head_width=8, head_dim=4)


# Recipes


LARGE = ("imagenet-vit-b", "imagenet-caformer-m36")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in sorted(recipes.RECIPES)]
)
def test_every_recipe_takes_two_steps(name, monkeypatch):
    """On 8 training images of 32 pixels and with a small head; else as it is. Large states are not written."""
    options = [f"--recipe={name}", "--optim.epochs=1", "--model.head-width=16", "--model.head-dim=8"]
    if name == "digits":
        options += ["--data.batch-size=512"]
    else:
        write_classes(Path("pets/train"), 4)
        write_classes(Path("pets/val"), 3)
        options += ["--data.root=pets", "--data.batch-size=2", "--virtual-batch=4", "--data.workers=0"]
        options += ["--data.size=32", *(["--data.local-size=16"] if recipes.RECIPES[name].data.local_views else [])]
    if name.startswith("imagenet-"):
        monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    steps = []
    monkeypatch.setattr(optim.Schedules, "apply", recorded(optim.Schedules.apply, steps))
    directory = train.pretrain(cli.parse(options))
    assert len(steps) == 2 and all(rate >= 0 for rate in steps)
    assert cli.parse([f"--config={directory}/config.yaml"]).recipe == name


def recorded(function, results: list):
    def call(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return call


PUBLISHED = {
    "data": {"virtual_batch": 16 * 256, "batch_size": 256, "views": 2, "size": 224, "global_scale": (0.25, 1.0)}
    | {"local_views": 6, "local_size": 96, "local_scale": (0.05, 0.25), "augmentation": "dino"},
    "model": {"head_layers": 3, "head_width": 4096, "head_dim": 4096, "activation": "gelu", "norm": "none"}
    | {"teacher_momentum": 0.995, "teacher_momentum_end": 1.0, "teacher_views": "all"},
    "loss": {"epsilon": 0.05, "epsilon_end": None, "temperature": 0.1, "iterations": 3, "top_k": 128},
    "optim": {"name": "adamw", "epochs": 400, "warmup_epochs": 40, "lr": 3e-4, "lr_images": 256, "lr_end": 1e-3}
    | {"weight_decay": 0.04, "weight_decay_end": 0.4, "clip_norm": 0.3},
}
VITS = {"positions": "sincos", "frozen_patches": True, "heads": 12}
BACKBONES = {
    "imagenet-vit-s": {"name": "vit_small_patch16_224"} | VITS,
    "imagenet-vit-b": {"name": "vit_base_patch16_224"} | VITS,
    "imagenet-caformer-m36": {"name": "caformer_m36", "positions": "own", "frozen_patches": False, "heads": 0},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_published_recipes(name):
    """What a run of the recipe saves as its options, number by number, against the paper's."""
    plain = config.as_plain(cli.parse([f"--recipe={name}", "--data.root=PATH"]))
    for part, published in (PUBLISHED | {"model": PUBLISHED["model"] | BACKBONES[name]}).items():
        expected = {key: list(value) if isinstance(value, tuple) else value for key, value in published.items()}
        assert {key: plain[part][key] for key in published} == expected, part
    assert plain["data"]["source"] == "folder" and plain["boxes"]["every"] > 0


def test_the_published_schedules():
    """For 4096 images per step, 312 steps an epoch."""
    schedules = optim.Schedules(recipes.recipe("imagenet-vit-s"), steps=312, G=4096)
    epochs = [schedules.lr(epoch * 312) for epoch in (0, 40, 400)]
    assert epochs == pytest.approx([4.8e-3 / (40 * 312 + 1), 4.8e-3, 1e-3])
    assert [schedules.weight_decay(epoch * 312) for epoch in (0, 200, 400)] == pytest.approx([0.04, 0.22, 0.4])
    assert [schedules.teacher_momentum(epoch * 312) for epoch in (0, 400)] == pytest.approx([0.995, 1.0])
    assert schedules.epsilon(17) == 0.05


# Backbones


def test_vit_as_published():
    network = model.Network(VIT, 3, 64, local_size=32)
    vit = network.backbone[1]
    assert vit.blocks[0].attn.num_heads == 4
    positions = vit.pos_embed[0]
    assert (positions[0] == 0).all() and (positions[1:].norm(dim=1) - math.sqrt(32)).abs().max() < 1e-4
    assert positions[1:].unique(dim=0).shape[0] == 16
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {name.removeprefix("backbone.1.") for name in frozen} == {
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    trained = sum(len(group["params"]) for group in optim.parameter_groups(network, 0.1))
    assert trained == len(list(network.parameters())) - 3
    out = network([torch.rand(4, 3, 64, 64), torch.rand(6, 3, 32, 32)])
    assert out.shape == (10, 4)


def test_embeddings_of_several_sizes_are_in_order():
    network = model.Network(dataclasses.replace(VIT, norm="layer"), 3, 64, local_size=32).eval()
    large, small = torch.rand(4, 3, 64, 64), torch.rand(6, 3, 32, 32)
    together = network([large, small])
    assert (together - torch.cat([network(large), network(small)])).abs().max() < 1e-5


def test_the_teacher_drops_nothing():
    network = model.Network(dataclasses.replace(VIT, drop_path=0.5, norm="layer"), 3, 64)
    teacher, images = model.make_teacher(network), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher(images), teacher(images)) and not torch.equal(network(images), network(images))


def test_small_stem():
    resnet = model.Network(config.Model(name="resnet18", stem="small"), 3, 32).eval().backbone[1]
    assert resnet.forward_features(torch.rand(1, 3, 32, 32)).shape[-1] == 4
    plain = timm.create_model("resnet18", num_classes=0).eval()
    assert plain.forward_features(torch.rand(1, 3, 32, 32)).shape[-1] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "test_resnet", "positions": "sincos"}, "test_resnet is not a ViT"),
        ({"name": "test_resnet", "frozen_patches": True}, "test_resnet is not a ViT"),
        ({"name": "test_resnet", "heads": 3}, "--model.name test_resnet"),
        ({"name": "test_vit", "heads": 5}, "--model.name test_vit: dim should be divisible by num_heads"),
        ({"name": "test_vit", "stem": "small"}, "--model.stem small: test_vit does not begin"),
        ({"name": "convnet", "checkpointing": True}, "--model.checkpointing True: convnet has no such thing"),
        ({"name": "convnet", "positions": "sincos"}, "convnet has its own"),
    ],
)
def test_options_that_do_not_fit_the_backbone(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.Network(config.Model(**change), 3, 32)


def test_sync_batch_norm():
    """Of GPUs alone. Every norm is one, those that timm joins with an activation keep it, weights keep their names."""
    network = model.Network(config.Model(name="test_efficientnet"), 3, 32).eval()
    images, names = torch.rand(4, 3, 32, 32), list(network.state_dict())
    before = network(images)
    network = model.synchronised(network)
    norms = [part for part in network.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    assert list(network.state_dict()) == names and torch.equal(network(images), before)
    with pytest.raises(UserError, match=r"--model.sync-batch-norm True: .* between GPUs, not on cpu"):
        pretrain("--model.sync-batch-norm=True")


# Where the boxes look


@pytest.mark.parametrize("name", ["test_vit2", "cait_xxs24_224"])  # no class token; attention that is not ours to read
def test_boxes_that_a_backbone_cannot_have_are_told_before_training(name):
    write_classes(Path("pets"), 8)
    options = ["--data.root=pets", "--data.size=32", "--data.batch-size=8", "--data.workers=0", "--model.norm=layer"]
    with pytest.raises(UserError, match=r"--boxes\.every: this"):
        train.pretrain(cli.parse([*options, f"--model.name={name}", "--boxes.every=40", "--boxes.after=40"]))
    assert not Path("runs").exists()


def test_the_look_before_training_changes_nothing():
    network = model.Network(config.Model(name="test_resnet"), 3, 32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    contrastive_crop.check(network, 3, 32)
    assert network.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_look_leaves_each_part_of_a_teacher_in_its_mode():
    """Its dropout is in evaluation, while its norms train."""
    teacher = model.make_teacher(model.Network(config.Model(name="test_vit", drop_path=0.2), 3, 160))
    before = [module.training for module in teacher.modules()]
    assert len(set(before)) == 2
    contrastive_crop.check(teacher, 3, 160)
    assert [module.training for module in teacher.modules()] == before


@pytest.mark.parametrize("name", ["test_mambaout", "swin_tiny_patch4_window7_224"])
def test_heat_where_channels_are_last(name):
    network = model.Network(config.Model(name=name), 3, 64).eval()
    standardize, backbone = network.backbone
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = contrastive_crop.heat(network.backbone, images)
        map_ = backbone.forward_features(standardize(images))
    assert map_.shape == (2, 2, 2, backbone.num_features)
    assert found.shape == (2, 2, 2) and ((found.square() - map_.square().sum(3)).abs() <= 1e-4 * found.square()).all()


def test_heat_of_a_vit_over_a_resnet():
    """Its patches are of the convolutional map."""
    network = model.Network(config.Model(name="vit_tiny_r_s16_p8_224"), 3, 64).eval()
    with torch.no_grad():
        assert contrastive_crop.heat(network.backbone, torch.rand(1, 3, 64, 64)).shape == (1, 2, 2)


def test_checkpointing_and_memory_format_change_nothing():
    images = torch.rand(4, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = model.Network(dataclasses.replace(VIT, checkpointing=checkpointing, norm="layer"), 3, 64)
        if checkpointing:
            network = network.to(memory_format=torch.channels_last)
        network(images).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert network.backbone[1].grad_checkpointing
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-7


def test_head_as_published():
    head = model.make_head(6, config.Model(norm="none", head_layers=3, head_width=8, head_dim=4, activation="gelu"))
    assert [type(layer).__name__ for layer in head] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert all((layer.bias == 0).all() for layer in head if isinstance(layer, torch.nn.Linear))


# Schedules, optimisers, arithmetic


def test_schedules_with_both_ends():
    options = cli.parse(
        ["--loss.epsilon=0.2", "--loss.epsilon-end=0.1", "--optim.lr=1", "--optim.lr-images=64", "--optim.lr-end=0.5"]
    )
    schedules = optim.Schedules(options, steps=10, G=128)
    assert [schedules.epsilon(step) for step in (0, 500, 1000)] == pytest.approx([0.2, 0.15, 0.1])
    assert [schedules.lr(step) for step in (50, 1000)] == pytest.approx([2.0, 0.5])


def test_epsilon_reaches_the_loss(monkeypatch):
    seen = []

    class Recorded(BAMLoss):
        def forward(self, student, teacher=None, step=None):
            seen.append(self.epsilon(step))
            return super().forward(student, teacher, step)

    monkeypatch.setattr("driver.loss.BAMLoss", Recorded)
    pretrain("--optim.epochs=2", "--loss.epsilon=0.2", "--loss.epsilon-end=0.1")
    assert seen[-4:] == pytest.approx([0.2 - 0.05 * (1 - math.cos(math.pi * step / 4)) for step in range(4)])


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_optimisers_train_and_resume(name):
    options = [f"--optim.name={name}", "--optim.lr=0.01", "--optim.epochs=2"]
    straight = content(pretrain(*options))
    first = pretrain(*options, "--run.stop-after=1")
    train.pretrain(cli.parse([f"--run.resume={first}"]))
    assert all(torch.equal(value, straight["network"][key]) for key, value in content(first)["network"].items())
    assert rows(straight, "train")[-1]["loss"] > 0


def test_lamb_does_not_clip_by_itself():
    """timm's would clip the gradient's norm to 1: a huge gradient after a small one is then as small."""
    network = torch.nn.Linear(3, 2, bias=False)
    optimizer = optim.make_optimizer(network, config.Optim(name="lamb"))
    network.weight.grad = torch.full((2, 3), 1e3)
    optimizer.step()
    (state,) = optimizer.state.values()
    assert torch.allclose(state["exp_avg"], torch.full((2, 3), 100.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(dtype):
    options = ["--optim.epochs=2", "--optim.clip-norm=1", "--model.teacher-momentum=0.9"]
    half, full = (content(pretrain(*options, f"--run.dtype={kind}")) for kind in (dtype, "float32"))
    assert all(value.dtype != getattr(torch, dtype) for value in half["network"].values())
    assert (half["scaler"] is not None) == (dtype == "float16")
    losses = [rows(part, "train")[0]["loss"] for part in (half, full)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_teacher_views_and_momentum():
    """All crops or the first two: other rows in the balance, another loss. Momentum 1 leaves the teacher as it was."""
    options = ["--optim.epochs=1", "--data.views=3", "--model.teacher-momentum=0.9"]
    losses = [
        rows(content(pretrain(*options, f"--model.teacher-views={views}")), "train")[0]["loss"]
        for views in ("global", "all")
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.2)
    torch.manual_seed(3)
    untrained = model.Network(cli.parse(TINY).model, 1, 8)
    directory = pretrain(*options[:2], "--model.teacher-momentum=0.999999", "--model.teacher-momentum-end=1")
    teacher, student = content(directory)["teacher"], content(directory)["network"]
    for name, parameter in untrained.named_parameters():
        assert (teacher[name] - parameter).abs().max() < 1e-4
    assert not all(torch.equal(teacher[name], student[name]) for name in teacher)


@pytest.mark.slow
def test_compiled_run():
    """Student and teacher: the losses of the eager run, under the same names of weights."""
    options = ["--optim.epochs=1", "--run.log-every=1", "--model.teacher-momentum=0.9"]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, compiled = (content(pretrain(*options, f"--model.compile={flag}")) for flag in ("False", "True"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2
    assert eager["network"].keys() == compiled["network"].keys()
    first, second = zip(*([line["loss"] for line in rows(part, "train")] for part in (eager, compiled)), strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-4) and second[0] == pytest.approx(second[1], rel=0.05)


def test_deterministic_mode_is_torchs(monkeypatch):
    assert not torch.are_deterministic_algorithms_enabled()
    seen = []
    monkeypatch.setattr(train, "follow", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    options = ["--optim.epochs=1", "--model.teacher-momentum=0.9"]
    pretrain(*options, "--run.deterministic=True")
    pretrain(*options)
    assert seen == [True, True, False, False]


def test_unknown_models_are_told_near_names():
    with pytest.raises(UserError, match=r"neither convnet nor a model of timm; near: .*resnet18"):
        backbones.make(config.Model(name="resnet1"), 3, 32)
