"""Images many times as long as wide: crops and squeezes of them stay small, and those of other images are the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

views = pytest.importorskip("driver.data.views")
v2 = views.v2

SHAPES = [(20, 24), (24, 20), (333, 500), (500, 333), (224, 224), (256, 300), (7, 9), (64, 1000), (1, 64), (4, 256)]
SHAPES += [(192, 3), (100, 2049)]  # 64 times as long as wide, up to which images are as they were
STRIPS = [(1, 65), (65, 1), (3, 600), (1, 6000), (1, 60_000), (60_001, 1)]


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def crops() -> dict:
    """The driver's transforms without random numbers, and torchvision's own."""
    return {
        "centred": (views.centred(32), v2.Compose([v2.ToImage(), v2.Resize(32, antialias=True), v2.CenterCrop(32)])),
        "published": (
            views.published_crop(96),
            v2.Compose([v2.ToImage(), v2.Resize(110, **views.CUBIC), v2.CenterCrop(96)]),
        ),
        "squeezed": (views.squeezed(32), v2.Compose([v2.ToImage(), v2.Resize((32, 32), antialias=True)])),
    }


@pytest.mark.parametrize("name", ["centred", "published", "squeezed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_crops_of_ordinary_images_are_those_of_torchvision_to_the_bit(name, shape):
    ours, plain = crops()[name]
    assert torch.equal(ours(noise(*shape)), plain(noise(*shape)))


class Resizes(TorchDispatchMode):
    """Largest number of pixels that torch makes in a resize: of its result, or between its passes, rows first."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "upsample" in func.__name__:
            height, (out_height, out_width) = args[0].shape[-2], args[1]
            self.largest = max(self.largest, max(height, out_height) * out_width)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["centred", "published", "squeezed"])
@pytest.mark.parametrize("shape", STRIPS)
def test_strips_are_not_enlarged_from_end_to_end(name, shape):
    with Resizes() as resizes:
        square = crops()[name][0](noise(*shape))
    assert square.shape[1] == square.shape[2]
    assert 0 < resizes.largest <= max(65 * 110**2, shape[0] * shape[1])


@pytest.mark.parametrize("name", ["centred", "published", "squeezed"])
@pytest.mark.parametrize("shape", [(8, 521), (521, 8), (8, 600), (40, 3001), (3000, 40), (1, 66), (2, 131)])
def test_strips_just_above_the_threshold_keep_their_middle(name, shape):
    """A smooth wave, 4 pixels long or more: within 3 levels of what resizing the whole strip gives."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    wave = 128 + 100 * np.sin((columns - width / 2) / 12) * np.cos((rows - height / 2) / 12)
    image = Image.fromarray(np.stack([wave] * 3, axis=2).astype(np.uint8))
    ours, plain = (transform(image).int() for transform in crops()[name])
    assert (ours - plain).abs().max() <= 3
