"""Pixels of photographs: from the bytes of an image file to 8-bit RGB."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image


@dataclass(frozen=True)
class Decoder:
    """Reads image files as 8-bit RGB."""

    def __call__(self, file: Path | BinaryIO) -> Image.Image:
        """Decode one image. Raises: OSError, ValueError or SyntaxError where it is not readable."""
        with Image.open(file) as image:
            return image.convert("RGB")


DEFAULT = Decoder()
"""Decoder without options."""
