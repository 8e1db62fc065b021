"""Clips of DAVIS 2017, or of a folder laid out like it: frames and annotated masks, checked before any is used.

Masks are integers (H, W): 0 is the background, 1 to O are the objects, 255 is void. As in the published semi-supervised
evaluation, the first frame's mask says which objects there are, and void pixels are background. Masks of 0 and 255
alone, as of DAVIS 2016, have one object, 255.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bam_kernels import user_files

from ..config import UserError
from ..data import decode
from ..data.unreadable import fault_of
from ..messages.text import listed
from .davis_metrics import VOID

FRAMES, MASKS = ("JPEGImages", "480p"), ("Annotations", "480p")
FRAME_SUFFIXES, MASK_SUFFIXES = (".jpg", ".jpeg", ".png"), (".png",)
LONGEST = 16
"""Longer side of a frame over the shorter one, at most: the shorter one is enlarged to --short-side."""
MOST_BYTES = 1 << 16
"""Largest list of clips. That of DAVIS's own training split has about 800 bytes."""
SHOWN = 8
"""Most values or names that a message lists."""


@dataclass(frozen=True)
class Clip:
    """Frames of a video, and annotated masks of all frames or of the first frame alone."""

    name: str
    frames: list[Path]
    annotations: list[Path]
    values: frozenset[int]
    """Values in all masks together."""
    objects: int
    """Number of objects in the first frame."""
    later: frozenset[int]
    """Objects that only later frames have."""

    @property
    def scored(self) -> bool:
        """Whether there is a mask for each frame, and an object to score."""
        return len(self.annotations) == len(self.frames) and self.objects > 0

    @property
    def binary(self) -> bool:
        """Whether 255 is the object, since it is the only value but 0."""
        return self.objects == 1 and self.values <= {0, VOID}

    def masks(self) -> NDArray[np.uint8]:
        """Annotated masks (F, H, W) without void pixels; F is 1 where the first frame alone has a mask."""
        masks = np.stack([read_mask(path) for path in self.annotations])
        return np.where(masks == VOID, int(self.binary), masks).astype(np.uint8)


def read_clips(davis: Path, split: str) -> list[Clip]:
    """Clips in the list of a split. Raises: UserError where the list, a frame or a mask is missing or wrong."""
    path = davis / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"--davis {davis}: no {path.relative_to(davis)} there; is it DAVIS 2017?")
    try:
        text = user_files.read(path, MOST_BYTES).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable list of clips ({error})") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: there must be at least one clip, a name a line; the file is empty")
    for number, name in enumerate(names):
        if Path(name).name != name or not name.isprintable():
            raise UserError(f"{path}: each line must be the name of one clip's folder, got {name!r}")
        if name in names[:number]:
            raise UserError(f"{path}: each clip must be named once, got {name!r} twice")
    return [read_clip(davis, name) for name in names]


def read_clip(davis: Path, name: str) -> Clip:
    """Check all images of a clip. Raises: UserError where they cannot be read, or do not belong together."""
    frames = _files(davis.joinpath(*FRAMES, name), FRAME_SUFFIXES)
    annotations = _files(davis.joinpath(*MASKS, name), MASK_SUFFIXES)
    _check_names(name, frames, annotations)
    size = read_frame(frames[0]).size
    if max(size) > LONGEST * min(size):
        raise UserError(f"{frames[0]}: a frame's longer side may be {LONGEST} times its shorter one, got {_by(size)}")
    for path in frames[1:]:
        if (found := read_frame(path).size) != size:
            raise UserError(f"{path}: frames must have one size, got {_by(found)} after {_by(size)}")
    values = []
    for path in annotations:
        mask = read_mask(path)
        if mask.shape[::-1] != size:
            raise UserError(f"{path}: a mask must have the frames' size, {_by(size)}, got {_by(mask.shape[::-1])}")
        values.append(frozenset(np.unique(mask).tolist()))
    return _clip_of_values(name, frames, annotations, values)


def read_frame(path: Path) -> Image.Image:
    """Frame as 8-bit RGB. Raises: UserError where it is not readable."""
    with _readable(path):
        return decode.DEFAULT(path)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Values (H, W) in a mask. Raises: UserError where it is not a PNG of object numbers."""
    with _readable(path), decode.open_image(path) as image:
        if image.format != "PNG" or image.mode not in ("P", "L", "1"):
            raise UserError(
                f"{path}: a mask must be a palette or 8-bit grey PNG whose values are object numbers, got "
                f"{image.format} of mode {image.mode}; write the numbers themselves, not their colours"
            )
        return np.array(image).astype(np.uint8)


def notes(clips: list[Clip]) -> list[str]:
    """Sentences on what is not scored as its owner may expect."""
    first_alone = [clip for clip in clips if len(clip.annotations) < len(clip.frames)]
    kinds = (
        ("masks hold 0 and 255 alone, so 255 is the object", [clip for clip in clips if clip.binary]),
        ("255 is void, which counts as background", [c for c in clips if VOID in c.values and not c.binary]),
        ("no object in the first frame, so no score", [clip for clip in clips if not clip.objects]),
        ("the first frame alone has a mask, so no score", first_alone),
        ("objects that the first frame lacks count as background", [clip for clip in clips if clip.later]),
    )
    return [f"{text}: {listed([clip.name for clip in of_kind], SHOWN)}" for text, of_kind in kinds if of_kind]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Images in a folder in the order of the numbers in their names: 2.jpg is before 10.jpg."""
    if not folder.is_dir():
        raise UserError(f"clip {folder.name}: no folder {folder}")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]

    def order(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", path.stem)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    return sorted(paths, key=order)


def _check_names(name: str, frames: list[Path], annotations: list[Path]) -> None:
    """Raise a UserError unless each frame, or the first frame alone, has a mask of its name."""
    stems, masks = ([path.stem for path in paths] for paths in (frames, annotations))
    counts = f"got {len(frames)} frames and {len(annotations)} masks"
    if len(set(stems)) < len(stems) or masks not in (stems, stems[:1]):
        odd = [s for s in dict.fromkeys([*stems, *masks]) if stems.count(s) != 1 or masks.count(s) != 1]
        raise UserError(
            f"clip {name}: each frame ({' '.join(FRAME_SUFFIXES)}), or the first frame alone, needs a mask (.png) of "
            f"its name; {counts}, without a partner or twice: {listed(odd, SHOWN)}"
        )
    if masks == stems and len(frames) < 3:
        raise UserError(
            f"clip {name}: at least 3 frames are needed, since the first and the last do not count; {counts}"
        )


def _clip_of_values(name: str, frames: list[Path], annotations: list[Path], values: list[frozenset[int]]) -> Clip:
    """Clip with the values of each of its masks. Raises: UserError where they are not object numbers."""
    whole, first = frozenset().union(*values), values[0] - {0, VOID}
    if VOID in values[0] and whole <= {0, VOID}:
        return Clip(name, frames, annotations, whole, 1, frozenset())
    if first != set(range(1, len(first) + 1)):
        raise UserError(
            f"{annotations[0]}: the objects of a first frame must be numbered 1, 2, ... without a gap, got "
            f"{listed(sorted(first), SHOWN)}; write object numbers, not grey levels, and not as JPEG"
        )
    rest = frozenset().union(*values[1:]) - {0}
    if first and rest == {VOID}:
        raise UserError(
            f"{annotations[0]}: the objects are {listed(sorted(first), SHOWN)}, but the later masks hold 255 alone, "
            "which is void; give an object one number in all masks"
        )
    return Clip(name, frames, annotations, whole, len(first), rest - first - {VOID})


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Context in which a fault of an image file becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # on damaged files, decoders raise nearly anything
        raise UserError(f"{path}: not a readable image ({fault_of(error)})") from error


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
