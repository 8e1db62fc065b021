"""Small made-up photographs, and folders of them."""

from pathlib import Path

import numpy as np
from PIL import Image


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
