"""Views of photographs made by torchvision in worker processes, and their plain crops for the evaluation.

A view is cropped, flipped, and changed in colour; it may become grey, blurred or solarised. Pixels are (3, S, S) uint8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from ..config import Data
from .crops import DRAWS, rectangles
from .random_keys import seed_of, uniform

CUBIC = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
MARGIN = 8 / 7
"""Shorter side over the side of the middle square in the published evaluations: 256 and 224 pixels."""
LONGEST = 64
"""Longer side of an image over the shorter one, up to which it is resized as it is; a strip that is longer would take
gigabytes when its shorter side is enlarged."""
UNCUT = 64
"""Images of at most so many pixels a side are not cut in the evaluation, since they have no margin."""


@dataclass(frozen=True)
class Kind:
    """Probabilities and half-widths of the random changes that make one kind of view."""

    scale: tuple[float, float]
    """Least and largest share of the image's area that the crop takes."""
    jitter: tuple[float, float, float, float]
    """Half-widths of brightness, contrast, saturation (factors) and hue (turns)."""
    blur_p: float
    solarize_p: float
    jitter_p: float = 0.8
    grey_p: float = 0.2
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, pixels."""


def kinds(data: Data) -> list[Kind]:
    """The kind of each view of an image, local views last.

    Sources: SimCLR (Chen et al., ICML 2020) with weaker colours; DINO (Caron et al., ICCV 2021) with BAM's saturation,
    0.4 where DINO has 0.2.
    """
    a = data.augment
    saturation = 0.4 if data.augmentation == "dino" else 0.2
    jitter = (min(1.0, 0.4 * a), min(1.0, 0.4 * a), min(1.0, saturation * a), min(0.5, 0.1 * a))
    grey, sigma = min(1.0, 0.2 * a), (0.1, 0.1 + 1.9 * a)

    def view(local: bool, blur: float, solarize: float) -> Kind:
        scale = data.local_scale if local else data.global_scale
        return Kind(scale, jitter, min(1.0, blur * a), min(1.0, solarize * a), min(1.0, 0.8 * a), grey, sigma)

    if data.augmentation == "simclr":
        return [view(v >= data.views, data.blur, 0.0) for v in range(data.views + data.local_views)]
    first, others = [view(False, 1.0, 0.0)], [view(False, 0.1, 0.2)] * (data.views - 1)
    return first + others + [view(True, 0.5, 0.0)] * data.local_views


def blur_kernel(sigma: float, size: int) -> int:
    """Side of the blur's kernel: odd, three standard deviations to each side, within the image."""
    return min(2 * math.ceil(3 * sigma) + 1, (size - 1) | 1)


class Blur(v2.Transform):
    """Gaussian blur as two passes of one dimension: many times as fast as torchvision's one pass of two."""

    def __init__(self, sigma: tuple[float, float], size: int) -> None:
        super().__init__()
        self.sigma, self.kernel = sigma, blur_kernel(sigma[1], size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"sigma": float(torch.empty(1).uniform_(*self.sigma))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        down, across = [1, self.kernel], [self.kernel, 1]
        return functional.gaussian_blur(functional.gaussian_blur(inpt, down, params["sigma"]), across, params["sigma"])


class View:
    """One view (3, S, S) uint8 of an image; it follows from its key, in any process."""

    def __init__(self, kind: Kind, size: int, alpha: float) -> None:
        self.kind, self.size, self.alpha = kind, size, alpha
        self.colour = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*kind.jitter)], p=kind.jitter_p),
                v2.RandomGrayscale(p=kind.grey_p),
                v2.RandomApply([Blur(kind.sigma, size)], p=kind.blur_p),
                v2.RandomSolarize(threshold=128, p=kind.solarize_p),
            ]
        )

    def __call__(self, image: Tensor, key: int, box: Tensor | None) -> Tensor:
        """Make the view of image (3, H, W) uint8, its crop's centre in the box (4,) where there is one."""
        height, width = image.shape[1:]
        u = uniform(torch.tensor([key]), DRAWS)
        boxes = None if box is None else box[None]
        shares = rectangles(u, self.kind.scale, boxes, self.alpha, width / height)[0].tolist()
        top, left, h, w = (round(x * side) for x, side in zip(shares, (height, width) * 2, strict=True))
        h, w = max(h, 1), max(w, 1)
        crop = functional.resized_crop(
            image, min(top, height - h), min(left, width - w), h, w, [self.size] * 2, InterpolationMode.BICUBIC
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            return self.colour(crop)


class Views:
    """All views of an image: (V, 3, S, S) uint8 and, with local views, (V', 3, S', S')."""

    def __init__(self, data: Data, alpha: float) -> None:
        sizes = [data.size] * data.views + [data.local_size] * data.local_views
        self.views = [View(kind, size, alpha) for kind, size in zip(kinds(data), sizes, strict=True)]
        self.plain = [centred(size) for size in sizes] if data.augment == 0 else []
        self.first = data.views

    def __call__(self, image: Image.Image, key: Sequence[int], box: Tensor | None) -> list[Tensor]:
        """Make the views of an image by its key: seed, epoch and place."""
        if self.plain:
            views = [crop(image) for crop in self.plain]
        else:
            pixels = functional.pil_to_tensor(image)
            views = [view(pixels, seed_of(*key, v), box) for v, view in enumerate(self.views)]
        return [torch.stack(part) for part in (views[: self.first], views[self.first :]) if part]


def centred(size: int) -> v2.Compose:
    """Transform to the middle square of an image."""
    return v2.Compose([v2.ToImage(), without_ends, v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def squeezed(size: int) -> v2.Compose:
    """Transform to the whole image, squeezed to a square."""
    return v2.Compose([v2.ToImage(), shortened, v2.Resize((size, size), antialias=True)])


def published_crop(size: int) -> v2.Compose:
    """Test crop of the published evaluations: the shorter side at 8/7 of S, then the middle square of S."""
    side = size if size <= UNCUT else round(size * MARGIN)
    return v2.Compose([v2.ToImage(), without_ends, v2.Resize(side, **CUBIC), v2.CenterCrop(size)])


def without_ends(image: Tensor) -> Tensor:
    """The middle of an image, whose longer side is LONGEST times the shorter one at most; its middle square is whole.

    Both ends lose the same number of pixels, so the middle stays where it is.
    """
    height, width = image.shape[-2:]
    top, left = (max(0, side - LONGEST * min(height, width)) // 2 for side in (height, width))
    return image[..., top : height - top, left : width - left]


def shortened(image: Tensor) -> Tensor:
    """The whole image, whose longer side is scaled down to LONGEST times the shorter one if it is above that."""
    height, width = image.shape[-2:]
    size = [min(height, LONGEST * width), min(width, LONGEST * height)]
    return image if size == [height, width] else functional.resize(image, size, antialias=True)


def published_random_crop(size: int) -> v2.Compose:
    """Training crop of the published linear evaluations: RandomResizedCrop, bilinear unlike the test crop, and flip."""
    return v2.Compose([v2.ToImage(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
