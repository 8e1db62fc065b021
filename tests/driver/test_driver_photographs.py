"""The driver's photographs: views in workers and on the device, unreadable ones, ContrastiveCrop."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("kornia")
pytest.importorskip("timm")

from driver_runs import content, rows, torchrun
from photographs import PHOTOGRAPHS, make, write_classes, write_images
from torchvision.transforms.v2 import functional

from driver import cli, config, contrastive_crop, model, train
from driver.config import UserError
from driver.data import crops, random_keys, unreadable, views, views_on_device
from driver.data.images import Images, floats
from driver.distributed import World

CPU = torch.device("cpu")


# Random numbers


def test_keyed_numbers():
    """Keys are those of seed_of; numbers are uniform, differ between neighbouring keys, and do not repeat."""
    images = torch.arange(500)
    keys = random_keys.keys_of(7, 2, images, range(3))
    assert keys.tolist() == [random_keys.seed_of(7, 2, i, v) for v in range(3) for i in range(500)]
    u = random_keys.uniform(keys, 40)
    assert ((u > 0) & (u < 1)).all() and torch.equal(u[7:8], random_keys.uniform(keys[7:8], 40))
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n) and abs(u.var() - 1 / 12) < 0.002
    bins = (u * 20).long().flatten().bincount(minlength=20)
    assert ((bins - n / 20).abs() < 6 * math.sqrt(n / 20)).all()
    assert torch.corrcoef(torch.stack([u[:500].flatten(), u[500:1000].flatten()]))[0, 1].abs() < 0.04
    z = random_keys.normal(keys, 40)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


# Crops


@pytest.mark.parametrize("scale, aspect", [((0.2, 1.0), 1.0), ((0.05, 0.25), 1.5), ((0.9, 1.0), 3.0)])
def test_crops_lie_inside_and_have_the_area_and_ratio_asked_for(scale, aspect):
    u = random_keys.uniform(torch.arange(2000), crops.DRAWS)
    top, left, height, width = crops.rectangles(u, scale, None, 1.0, aspect).T
    assert (torch.stack([top, left, height, width]) >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()
    if aspect == 3.0:  # an image too long for most: those that fit are right, the others reach from edge to edge
        assert ((height == 1) | (width * aspect / height >= 0.74)).all()
        return
    area, ratio = height * width, width * aspect / height
    fits = (height < 1) & (width < 1)
    assert fits.float().mean() > 0.9
    assert ((area[fits] >= scale[0] - 1e-5) & (area[fits] <= scale[1] + 1e-5)).all()
    assert ((ratio[fits] >= 0.75 - 1e-4) & (ratio[fits] <= 4 / 3 + 1e-4)).all()
    assert abs((top + height / 2).mean() - 0.5) < 0.02


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_crops_keep_their_centres_in_the_box_and_avoid_its_middle(alpha):
    box = torch.tensor([0.3, 0.5, 0.7, 0.9]).expand(4000, 4)
    u = random_keys.uniform(torch.arange(4000), crops.DRAWS)
    top, left, height, width = crops.rectangles(u, (0.02, 0.1), box, alpha).T
    row, column = top + height / 2, left + width / 2
    assert ((row >= 0.3 - 1e-5) & (row <= 0.7 + 1e-5) & (column >= 0.5 - 0.2) & (column <= 0.9 + 1e-5)).all()
    share = (row - 0.3) / 0.4
    assert abs(share.mean() - 0.5) < 0.02
    assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.01  # of Beta(alpha, alpha)


def test_a_crop_on_the_device_is_the_pixels_themselves():
    images = torch.rand(2, 3, 16, 16)
    rectangle = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.0, 0.125, 0.5, 0.5]])
    out = views_on_device.cropped(images, rectangle, torch.tensor([False, True]), 8)
    assert (out[0] - images[0, :, 4:12, 8:16]).abs().max() < 1e-5
    assert (out[1] - images[1, :, 0:8, 2:10].flip(-1)).abs().max() < 1e-5


def test_colours_on_the_device_are_those_of_torchvision():
    images = torch.rand(3, 3, 12, 12) * 0.5 + 0.2
    factors = [torch.tensor(f) for f in ([0.7, 1.2, 1.0], [1.3, 0.8, 1.0], [0.5, 1.5, 1.0], [1.1, 0.95, 1.0])]
    out = views_on_device.coloured(images, *factors)
    for i, image in enumerate(images):
        brightness, contrast_, saturation, hue = (f[i].item() for f in factors)
        expected = functional.adjust_brightness(image, brightness)
        expected = functional.adjust_contrast(expected, contrast_)
        expected = functional.adjust_saturation(expected, saturation)
        expected = functional.adjust_hue(expected, hue - 1)
        assert (out[i] - expected).abs().max() < 5e-3


# Views


@pytest.mark.parametrize("on_device", [False, True])
def test_views_of_two_sizes(on_device):
    """View-major, seeded, each view another; the tail of an epoch is that of the whole; strength 0 repeats images."""
    write_classes(Path("pets"), 9)
    options = dataclasses.replace(PHOTOGRAPHS, on_device=on_device)
    steps = list(make(options).views(epoch=1))
    assert len(steps) == 3 and all(len(step) == 1 for step in steps)
    large, small = steps[0][0]
    assert large.shape == (8, 3, 16, 16) and small.shape == (12, 3, 8, 8)
    assert large.dtype == (torch.float32 if on_device else torch.uint8)  # workers send bytes
    assert 0 <= floats(large).min() < 0.1 and 0.9 < floats(large).max() <= 1
    views = [*large.unflatten(0, (2, 4)), *small.unflatten(0, (3, 4))]
    assert all(not torch.equal(a, b) for a in views for b in views if a is not b and a.shape == b.shape)

    again = list(make(options).views(epoch=1, first=1))
    assert len(again) == 2
    for step, whole in zip(again, steps[1:], strict=True):
        assert all(map(torch.equal, step[0], whole[0]))
    assert not torch.equal(next(make(options).views(epoch=2))[0][0], large)
    assert not torch.equal(next(make(options, seed=4).views(epoch=1))[0][0], large)

    still = next(make(dataclasses.replace(options, augment=0.0)).views(epoch=1))[0][0].unflatten(0, (2, 4))
    assert torch.equal(still[0], still[1]) and not torch.equal(still[0, 0], still[0, 1])


def test_workers_do_not_matter():
    write_classes(Path("pets"), 9)
    alone = [step[0] for step in make(PHOTOGRAPHS).views(epoch=1)]
    workers = make(dataclasses.replace(PHOTOGRAPHS, workers=2))
    for epoch in (0, 1):  # the second is that of processes that have stayed
        steps = [step[0] for step in workers.views(epoch)]
    for a, b in zip(alone, steps, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("on_device", [False, True])
def test_views_do_not_depend_on_ranks(on_device):
    write_classes(Path("pets"), 9)
    whole = [step[0] for step in make(dataclasses.replace(PHOTOGRAPHS, on_device=on_device, batch_size=8)).views(2)]
    options = dataclasses.replace(PHOTOGRAPHS, on_device=on_device, batch_size=2, virtual_batch=8)
    ranks = [list(make(options, world=World(rank, 2)).views(2)) for rank in range(2)]
    for step, expected in enumerate(whole):
        for size, count in enumerate((2, 3)):
            parts = [part[size].unflatten(0, (count, -1)) for rank in ranks for part in rank[step]]
            assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), expected[size])


def test_blur_is_gaussian():
    """A square spreads as the density says, to the bytes' rounding."""
    image = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    image[..., 12:21, 12:21] = 200
    blur = views.Blur((1.5, 1.5 + 1e-9), 33)
    places = torch.arange(33.0)
    spread = torch.exp(-((places[:, None] - places) ** 2) / (2 * 1.5**2))
    spread /= spread.sum(1, keepdim=True)
    expected = spread @ image.float() @ spread.T
    middle = slice(6, 27)  # away from the borders, where the density is cut
    assert (blur(image).float() - expected)[..., middle, middle].abs().max() <= 1.5


def test_kinds_of_views():
    dino = views.kinds(PHOTOGRAPHS)
    assert [kind.blur_p for kind in dino] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [kind.solarize_p for kind in dino] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert [kind.scale for kind in dino] == [(0.2, 1.0)] * 2 + [(0.05, 0.25)] * 3
    simclr = views.kinds(dataclasses.replace(PHOTOGRAPHS, augmentation="simclr", blur=0.0, local_views=0))
    assert [(kind.blur_p, kind.solarize_p) for kind in simclr] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("on_device", [False, True])
def test_crops_keep_to_boxes_once_there_are_some(on_device):
    """Images that are black but for one bright quarter: with its box, small crops become brighter."""
    from PIL import Image

    Path("pets").mkdir()
    for i in range(16):
        image = Image.new("RGB", (32, 32))
        image.paste((255, 255, 255), (16, 16, 32, 32))
        image.save(f"pets/{i:02d}.png")
    options = dataclasses.replace(PHOTOGRAPHS, on_device=on_device, augmentation="simclr", blur=0.0, size=32)
    images = make(options)
    assert images.boxes is None
    before = torch.cat([floats(step[0][1]) for step in images.views(0)]).mean()
    images.set_boxes(torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(16, 1))
    assert torch.equal(images.boxes[3], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    assert torch.cat([floats(step[0][1]) for step in images.views(0)]).mean() > 1.8 * before


@pytest.mark.parametrize("teacher_views", ["global", "all"])
def test_micro_batches_of_two_sizes_give_the_same_run(teacher_views):
    """float64, and nothing but the loss mixes images: one micro-batch of 8 images, or four of 2."""
    write_classes(Path("pets"), 11)
    options = ["--data.root=pets", "--data.size=16", "--data.local-views=2", "--data.local-size=8", "--data.workers=0"]
    options += ["--model.name=convnet", "--model.norm=layer", "--model.width=4", "--model.teacher-momentum=0.9"]
    options += [
        f"--model.teacher-views={teacher_views}",
        "--run.dtype=float64",
        "--optim.epochs=3",
        "--run.log-every=1",
    ]
    options += ["--virtual-batch=8", "--optim.name=sgd", "--run.eval-every=0"]
    whole, parts = (content(train.pretrain(cli.parse([*options, f"--data.batch-size={size}"]))) for size in (8, 2))
    losses = [[line["loss"] for line in rows(run, "train")] for run in (whole, parts)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-9)
    for name, value in whole["teacher"].items():
        assert (value - parts["teacher"][name]).abs().max() < 1e-9, name


# Unreadable images


def damage(root: str, *numbers: int) -> None:
    for number in numbers:
        Path(f"{root}/{number:02d}.png").write_bytes(b"not a picture")


def read_passes(images: Images, passes: int) -> None:
    for epoch in range(passes):
        for batches in (images.views(epoch), images.bank(), images.held_out()):
            list(batches)


@pytest.mark.parametrize("seed, workers", [*((seed, 0) for seed in range(3)), (0, 1)])
def test_unreadable_images_within_the_share_are_no_error_wherever_they_fall(seed, workers, capsys, monkeypatch):
    """2 of 24 in three passes, of 0.1 that may be; the third is too many, in any order."""
    monkeypatch.setattr(unreadable, "FEW", 1)
    write_images(Path("pets"), 24)
    damage("pets", 3, 5)
    options = dataclasses.replace(PHOTOGRAPHS, max_unreadable=0.1, batch_size=8, workers=workers)
    images = make(options, seed)
    read_passes(images, 3)
    images.tally.settle(World())
    read_passes(images, 1)
    images.tally.settle(World())
    assert capsys.readouterr().err.count("note: ") == 2
    damage("pets", 7)
    images = make(options, seed)
    read_passes(images, 1)
    with pytest.raises(
        UserError, match=r"07.png: not a readable.* 3 unreadable.*--data.max-unreadable 0.1 of 24 images"
    ):
        images.tally.settle(World())


def test_held_out_images_are_of_the_set(monkeypatch):
    """3 of 100 images, of which 25 are held out: 0.03 is not too many, 0.02 is."""
    monkeypatch.setattr(unreadable, "FEW", 1)
    write_classes(Path("pets"), 50)
    files = make(dataclasses.replace(PHOTOGRAPHS, held_out=0.25)).source
    for number in (*files.test[:2], *files.train[:1]):
        Path(files.name(number)).write_bytes(b"not a picture")
    for share in (0.03, 0.02):
        images = make(dataclasses.replace(PHOTOGRAPHS, held_out=0.25, max_unreadable=share))
        read_passes(images, 1)
        if share == 0.03:
            images.tally.settle(World())
            continue
        with pytest.raises(UserError, match=r"3 unreadable, a share above --data.max-unreadable 0.02 of 100 images"):
            images.tally.settle(World())


RANKS = ["--data.root=pets", "--data.size=16", "--data.batch-size=10", "--data.workers=0", "--model.name=convnet"]
RANKS += ["--model.width=4", "--optim.epochs=4", "--run.eval-every=1", "--run.log-every=3", "--run.device=cpu"]


@pytest.mark.slow
def test_an_unreadable_image_is_named_once_over_ranks():
    """1 of 100, of 0.01 that may be: in four epochs and five evaluations both ranks meet it."""
    write_images(Path("pets"), 100)
    damage("pets", 3)
    run = torchrun(2, *RANKS)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("pets/03.png: not a readable image") == 1 and "(1 so far)" in run.stderr


@pytest.mark.slow
def test_too_many_unreadable_images_over_ranks_end_them_all():
    """10 of 100, five of each rank in the first evaluation, after which the run ends: neither alone has too many."""
    write_images(Path("pets"), 100)
    source = make(PHOTOGRAPHS).source
    chosen = source.train[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    damage("pets", *sorted(chosen[:10].tolist()))
    run = torchrun(2, *RANKS, "--run.log-every=1")
    assert run.returncode == 1
    assert run.stderr.count("\nerror: ") == 1 and run.stderr.count("note: pets/") == 9, run.stderr
    assert "10 unreadable, a share above --data.max-unreadable 0.01 of 100 images" in run.stderr
    assert len(Path("runs/pets-001/history.jsonl").read_text().splitlines()) == 1
    assert 'pretrain.py", line' not in run.stderr


# ContrastiveCrop's boxes


def test_boxes_of_heat():
    heat = torch.zeros(3, 8, 8)
    heat[0, 2:4, 5:7] = 1.0
    heat[1, 0, 0] = 5.0  # the third has no place that stands out
    top, left, bottom, right = contrastive_crop.boxes_of(heat, 0.5).T
    assert (top[0] - 2 / 8).abs() < 0.07 and (bottom[0] - 4 / 8).abs() < 0.07
    assert (left[0] - 5 / 8).abs() < 0.07 and (right[0] - 7 / 8).abs() < 0.07
    assert top[1] == left[1] == 0 and bottom[1] < 0.2 and right[1] < 0.2
    assert contrastive_crop.boxes_of(heat, 0.5)[2].tolist() == [0, 0, 1, 1]


def test_heat_of_a_vit_is_its_attention():
    network = model.Network(config.Model(name="test_vit", head_width=8, head_dim=4), 3, 64).eval()
    images, vit = torch.rand(2, 3, 64, 64), network.backbone[1]
    attention = vit.blocks[-1].attn
    seen = []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        vit(network.backbone[0](images))
        found = contrastive_crop.heat(network.backbone, images)
    expected = seen[0][:, :, 0, 1:].sum(1).view(2, 4, 4)  # patches of 16 pixels
    assert (found - expected).abs().max() < 1e-6


def test_heat_of_convolutional_models():
    images = torch.rand(2, 3, 64, 64)
    for name, side in (("test_resnet", 2), ("convnet", 2)):
        network = model.Network(config.Model(name=name, width=4, head_width=8, head_dim=4), 3, 64).eval()
        with torch.no_grad():
            found = contrastive_crop.heat(network.backbone, images)
        assert found.shape == (2, side, side) and (found > 0).all() and found.std() > 0


def test_boxes_are_refreshed_in_a_run_and_resume_bit_exactly():
    write_classes(Path("pets"), 11)
    options = ["--data.root=pets", "--data.size=32", "--data.batch-size=8", "--data.workers=0", "--optim.epochs=4"]
    options += ["--model.name=test_vit", "--boxes.every=2", "--boxes.after=1", "--run.eval-every=0"]
    straight = content(train.pretrain(cli.parse(options)))
    boxes = straight["boxes"]
    assert boxes.shape == (20, 4) and (boxes[:, 2:] > boxes[:, :2]).all() and boxes.unique(dim=0).shape[0] > 1
    first = train.pretrain(cli.parse([*options, "--run.stop-after=2"]))
    assert not torch.equal(content(first)["boxes"], boxes)
    train.pretrain(cli.parse([f"--run.resume={first}"]))
    assert torch.equal(content(first)["boxes"], boxes)
    assert all(torch.equal(value, straight["network"][name]) for name, value in content(first)["network"].items())
