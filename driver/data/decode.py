"""Pixels of photographs: from the bytes of an image file to 8-bit RGB."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import EXTRASAMPLES

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on each image of a kind, e.g. with a transparent palette
            with _open(file) as image:
                if deep_pixels.is_deep(image):
                    pixels = deep_pixels.to_eight_bits(image, lambda: _open(file), self.pixel_range)
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


def _open(file: Path | BinaryIO) -> Any:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(what_it_is(file)) from None


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
