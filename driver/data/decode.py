"""Pixels of photographs: from the bytes of an image file to 8-bit RGB."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, features

Image.init()
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats that Pillow may have been built without, and their names among Pillow's features."""
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", *CODECS)
    if name in Image.OPEN and (name not in CODECS or features.check(CODECS[name]))
)
"""Image formats that are read, by their names in Pillow; a format that the installed Pillow cannot decode is left out.

The content of a file decides its format. PostScript, PDF, films and other formats are never opened, whatever their name.
"""
EXTENSIONS = frozenset(name for name, kind in Image.registered_extensions().items() if kind in FORMATS)
"""Lower-case endings of the names of image files, each with its dot."""


@dataclass(frozen=True)
class Decoder:
    """Reads image files as 8-bit RGB."""

    def __call__(self, file: Path | BinaryIO) -> Image.Image:
        """Decode one image. Raises: OSError, ValueError or SyntaxError where it is not readable."""
        with Image.open(file, formats=FORMATS) as image:
            return image.convert("RGB")


DEFAULT = Decoder()
"""Decoder without options."""
