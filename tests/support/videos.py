"""Made-up clips in DAVIS's layout, and a network whose features are mean colours, for tests of segment_video."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from driver.evaluation import frozen

FRAME = (128, 192)


class Colours(torch.nn.Module):
    """Features of a patch of 8 pixels: its mean colour."""

    def forward_intermediates(self, images, **_):
        return [torch.nn.functional.avg_pool2d(images - 0.5, 8)]


def use_colours(monkeypatch) -> None:
    """Let segment_video load a network of mean colours instead of its backbone."""
    colours = frozen.Frozen(torch.nn.Identity(), Colours(), 128, torch.device("cpu"))
    monkeypatch.setattr(frozen.Backbone, "load", lambda *_: colours)


def square(top: int, left: int, side: int = 20, frame: tuple[int, int] = (60, 90)) -> np.ndarray:
    mask = np.zeros(frame, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def two_squares(frames: int = 6) -> list[np.ndarray]:
    """Masks of two squares that move by 8 pixels a frame: objects 1 and 2."""
    return [
        (square(8, 8 * t, 32, FRAME) + 2 * square(80, 152 - 8 * t, 32, FRAME)).astype(np.uint8) for t in range(frames)
    ]


def write_clip(
    root: Path, masks: list[np.ndarray], name: str = "squares", values: dict[int, int] | None = None
) -> Path:
    """Write a clip of coloured squares on grey whose masks have other `values`, and add it to the list of clips.

    Returns the folder of its masks.
    """
    folders = [root / part / "480p" / name for part in ("JPEGImages", "Annotations")]
    for folder in (*folders, root / "ImageSets" / "2017"):
        folder.mkdir(parents=True, exist_ok=True)
    with (root / "ImageSets" / "2017" / "val.txt").open("a") as file:
        file.write(f"{name}\n")
    for t, mask in enumerate(masks):
        image = np.full((*mask.shape, 3), 90, np.uint8)
        image[mask == 1], image[mask == 2] = (230, 30, 30), (30, 30, 230)
        Image.fromarray(image).save(folders[0] / f"{t:05d}.jpg", quality=98)
        replaced = np.array([(values or {}).get(value, value) for value in range(256)], np.uint8)[mask]
        annotation = Image.fromarray(replaced)
        annotation.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + 759 * [0])
        annotation.save(folders[1] / f"{t:05d}.png")
    return folders[1]
