"""Small made-up photographs, folders of them, and options of the driver that read such a folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from driver import config, data
from driver.data.images import Images
from driver.distributed import World

PHOTOGRAPHS = config.Data(
    source="folder",
    root=Path("pets"),
    size=16,
    batch_size=4,
    augmentation="dino",
    local_views=3,
    local_size=8,
    workers=0,
)


def make(options: config.Data, seed: int = 3, world: World | None = None) -> Images:
    """Images on the CPU, without boxes."""
    return data.make_images(options, config.Boxes(), torch.device("cpu"), seed, world or World())


def write_images(folder: Path, count: int, seed: int = 0, side: int = 20) -> None:
    """PNGs of noise, a little wider than high."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side + 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")


def write_classes(root: Path, count: int, **options: int) -> None:
    """Two classes of `count` images each."""
    for label in ("cats", "dogs"):
        write_images(root / label, count, seed=ord(label[0]), **options)
