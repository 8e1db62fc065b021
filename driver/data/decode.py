"""Pixels of photographs: from the bytes of an image file to 8-bit RGB."""

import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import EXTRASAMPLES, TILELENGTH, TILEWIDTH

from . import deep_pixels
from .foreign import what_it_is

Image.init()
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what Pillow logs as an error, it raises too
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats that Pillow may have been built without, and their names among Pillow's features."""
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", *CODECS)
    if name in Image.OPEN and (name not in CODECS or features.check(CODECS[name]))
)
"""Image formats that are read, by their names in Pillow; a format that the installed Pillow cannot decode is left out.

The content of a file decides its format. PostScript, PDF, films and others are never opened, whatever their name.
"""
EXTENSIONS = frozenset(name for name, kind in Image.registered_extensions().items() if kind in FORMATS)
"""Lower-case endings of the names of image files, each with its dot."""
PIXELS = 178_956_970
"""Most pixels of an image that is decoded: about 1.3 GB of memory in RGB, 4.4 GB with 16 bits per sample.

Pillow has the same limit by default, but any library may change or remove it there.
"""
BYTES = 4 << 30
"""Most bytes of an image file: WebP, AVIF and the members of shards are read whole before they are decoded."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


@dataclass(frozen=True)
class Decoder:
    """Reads image files as 8-bit RGB."""

    pixel_range: tuple[float, float] | None = None
    """Values that become black and white in images of more than 8 bits. None: the range of the pixels' type."""
    exif: bool = True
    """Whether to turn an image upright by its EXIF orientation."""

    def __call__(self, file: Path | BinaryIO) -> Image.Image:
        """Decode one image, the first of several in a file.

        Raises: ValueError where the grey levels would be lost; where the file is damaged, any exception of Pillow.
        """
        with open_image(file) as image:
            if deep_pixels.is_deep(image):
                pixels = deep_pixels.to_eight_bits(image, lambda: open_image(file), self.pixel_range)
            else:
                image.load()  # first: only then are palette and EXIF data complete
                pixels = image
            if image.format == "TIFF" and pixels.mode == "RGBA" and EXTRASAMPLES not in image.tag_v2:
                pixels = pixels.convert("RGB")  # Pillow takes a fourth sample of no declared meaning for opacity
            pixels = _on_white(pixels)
            turn = TURNS.get(_orientation(image)) if self.exif else None
        return pixels if turn is None else pixels.transpose(turn)


DEFAULT = Decoder()
"""Decoder without options."""


@contextmanager
def open_image(file: Path | BinaryIO) -> Iterator[Any]:
    """Context of an image of one of FORMATS, open but not yet decoded; nothing else in the driver opens images.

    Raises: ValueError where it has too many pixels or bytes; UnidentifiedImageError where it is no image; where it is
    damaged, any exception of Pillow.
    """
    with warnings.catch_warnings(), _regular(file) if isinstance(file, Path) else nullcontext(file) as opened:
        warnings.simplefilter("ignore")  # of Pillow, on each image of a kind, e.g. with a transparent palette
        try:
            image = Image.open(opened, formats=FORMATS)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(what_it_is(opened)) from None
        except Image.DecompressionBombError as error:
            pixels, limit = map(int, re.findall(r"\d+", str(error)))
            raise _too_large(f"{pixels:,} pixels", limit) from None
        with image:
            _check_pixels(image)
            yield image


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """Context of an open file. A pipe that has taken its place since it was listed is an error, and not waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a pipe or a device, not a file")
        check_bytes(status.st_size)
        yield file


def check_bytes(size: int) -> None:
    """Raise a ValueError for an image file of more than BYTES bytes, before it is read."""
    if size > BYTES:
        raise ValueError(f"a file of {size:,} bytes, above the limit of {BYTES:,} for an image; write it smaller")


def _check_pixels(image: Any) -> None:
    """Raise a ValueError where an open image, or the tile of a TIFF, which is allocated whole, is above PIXELS."""
    width, height = image.size
    if width * height > PIXELS:
        raise _too_large(f"{width:,} x {height:,} pixels", PIXELS)
    if image.format == "TIFF":
        width, height = (image.tag_v2.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH))
        if width * height > PIXELS:
            raise _too_large(f"tiles of {width:,} x {height:,} pixels", PIXELS)


def _too_large(what: str, limit: int) -> ValueError:
    return ValueError(f"{what}, above the limit of {limit:,}; scale the image down, or cut it into several")


def _orientation(image: Image.Image) -> Any:
    """EXIF orientation of a loaded image.

    Pillow's exif_transpose would also write the EXIF data anew, which fails on damaged entries of no interest here.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data: Pillow raises nearly anything
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, its transparent parts over white. Where nothing is visible, the hidden colours are shown."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    lowest, highest = rgba.getchannel("A").getextrema()
    if lowest == 255 or highest == 0:
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
