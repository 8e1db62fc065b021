"""Images of more than 8 bits per sample: their values, scaled to 8 bits so that the levels are kept, or refused.

Pillow's own conversion clips grey values at 255, and drops the low byte of 16-bit colours.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT

Range = tuple[float, float]
"""Values that become black and white."""
LEVELS = 48
"""Distinct levels that are enough in 8 bits, however many there were. With fewer, three quarters must remain."""
SIGNED = 2
"""TIFF's sample format of signed integers."""
SWAPPED = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBX", "RGBA") for a, b in ("BL", "LB", "NB")}
"""Pillow's raw modes that keep the high byte of a 16-bit sample, and the raw modes that keep its low byte instead."""
BLOCK = 1 << 20
"""Number of bytes of a file, or roughly of values, handled at a time: numpy's copies take up to 8 bytes a value."""
ADVICE = "give --data.pixel-range LOW HIGH, the values of black and white"


def is_deep(image: Any) -> bool:
    """Whether a sample of an open image, not yet loaded, has more than 8 bits or a sign."""
    if image.format == "TIFF":
        return _tag(image, BITSPERSAMPLE) > 8 or (image.mode == "L" and _tag(image, SAMPLEFORMAT) == SIGNED)
    # BMP's raw modes such as BGR;16 have 16 bits per pixel, not per sample.
    return image.mode[0] in "IF" or (image.format != "BMP" and ";16" in _raw_mode(image)) or _white(image) > 255


def to_eight_bits(image: Any, reopen: Callable[[], Any], pixel_range: Range | None) -> Image.Image:
    """A deep image with 8 bits per sample. `pixel_range` becomes black to white; None: the range of the samples' type.

    Raises: ValueError where the levels would be lost.
    """
    if image.mode == "L" or image.mode[0] in "IF":
        grey = _scaled(*_grey_values(image), pixel_range)
        white_is_0 = image.format == "TIFF" and _tag(image, PHOTOMETRIC_INTERPRETATION) == 0
        return Image.fromarray(255 - grey if white_is_0 else grey)
    raw_mode = "RGB;16B" if image.tile and image.tile[0][0] == "ppm" else _raw_mode(image)
    planes = image.format == "TIFF" and _tag(image, PLANAR_CONFIGURATION) != 1  # Pillow takes their bytes for samples
    if raw_mode in SWAPPED and not planes:
        return _colours(image, reopen, raw_mode, pixel_range)
    pixels = _loaded(image)
    if planes or pixel_range or _levels(pixels) < LEVELS:
        raise ValueError(
            f"{image.mode} pixels of more than 8 bits per sample, in a layout of which only the upper 8 bits are read "
            f"({_levels(pixels)} levels); convert the file to 8 bits"
        )
    return image


def _tag(image: Any, tag: int) -> int:
    """First value of a TIFF's tag; 1, the default of the tags used here, where it is missing."""
    value = image.tag_v2.get(tag, 1)
    return value[0] if isinstance(value, tuple) else value


def _raw_mode(image: Any) -> str:
    """Pillow's name of the layout of the samples in the file; empty where the format's decoder has none."""
    args = image.tile[0][3] if image.tile else ""
    raw_mode = args[0] if isinstance(args, tuple) and args else args
    return raw_mode if isinstance(raw_mode, str) else ""


def _white(image: Any) -> int:
    """Largest value of an integer sample, where the format says it: of PPM and JPEG 2000. Else 0."""
    if image.format == "PPM" and image.tile:
        codec, _, _, args = image.tile[0]
        return args[1] if codec.startswith("ppm") and isinstance(args, tuple) else 0
    if image.format == "JPEG2000":
        place = image.fp.tell()
        image.fp.seek(0)
        sizes = _behind(image.fp, b"\xff\x4f\xff\x51", 39)
        image.fp.seek(place)
        return 2 ** min(16, (sizes[38] & 0x7F) + 1) - 1 if sizes else 0
    return 0


def _behind(file: BinaryIO, marker: bytes, count: int) -> bytes:
    """The `count` bytes behind the first marker in a file, which is read in blocks; empty where there is none."""
    window = b""
    while block := file.read(BLOCK):
        window = window[-(len(marker) + count) :] + block
        behind = window.partition(marker)[2]
        if len(behind) >= count:
            return behind[:count]
    return b""


def _grey_values(image: Any) -> tuple[NDArray[Any], Range]:
    """Values (height, width) of a grey image as they are in the file, and what is black and white by their type.

    Integers of 32 bits have the range of 16 bits.
    """
    white = _white(image)
    values = _loaded(image)
    if image.mode == "F":
        return values, (0.0, 1.0)
    if image.format == "TIFF":
        bits, signed = _tag(image, BITSPERSAMPLE), _tag(image, SAMPLEFORMAT) == SIGNED
        if bits > 16:
            return values if signed else values.view(np.uint32), (0.0, 65535.0)
        if signed:
            return values.view(np.int8) if bits == 8 else values, (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
        return values, (0.0, 2.0**bits - 1)
    if white and image.format == "PPM":
        return np.rint(values * (white / 65535)), (0.0, white)  # Pillow has scaled them to 65535
    if white and image.format == "JPEG2000":
        return values // (65536 // (white + 1)), (0.0, white)  # Pillow has shifted them to the upper bits
    return values, (0.0, 65535.0)


def _colours(image: Any, reopen: Callable[[], Any], raw_mode: str, pixel_range: Range | None) -> Image.Image:
    """The image of 16-bit colours, read twice: once for the high bytes and once for the low bytes."""
    white = _white(image) or 65535
    high = _samples(image, raw_mode)
    with reopen() as again:
        values = high.astype(np.uint16)
        values <<= 8
        values |= _samples(again, SWAPPED[raw_mode])
    colours = _scaled(values[..., :3], (0.0, white), pixel_range)
    return Image.fromarray(np.concatenate([colours, high[..., 3:]], axis=2))  # the range is not one of the opacity


def _samples(image: Any, raw_mode: str) -> NDArray[np.uint8]:
    """Samples (height, width, channels) of an open image, unpacked by another raw mode."""
    image.tile = [
        tile._make(
            (
                "raw" if tile[0] == "ppm" else tile[0],
                *tile[1:3],
                (raw_mode, *tile[3][1:]) if image.format == "TIFF" else raw_mode,
            )
        )
        for tile in image.tile
    ]
    return _loaded(image)


def _loaded(image: Any) -> NDArray[Any]:
    """Pixels of an image, decoded first: within np.asarray an exception would be lost."""
    image.load()
    return np.asarray(image)


def _scaled(values: NDArray[Any], range_of_type: Range, pixel_range: Range | None) -> NDArray[np.uint8]:
    """Values from black to white as 0 to 255. Raises: ValueError where levels would be lost, or for a NaN."""
    low, high = pixel_range or range_of_type
    least, most = float(values.min()), float(values.max())
    found = f"values from {least:g} to {most:g}"
    if math.isnan(least):
        raise ValueError(f"{np.isnan(values).sum()} of {values.size} values are NaN; write numbers in their place")
    if pixel_range is None and (least < low or most > high):
        raise ValueError(f"{found}, outside of {low:g} to {high:g}; {ADVICE}")
    scaled = np.empty(values.shape, np.uint8)
    for block, out in zip(_blocks(values), _blocks(scaled), strict=True):
        exact = block.astype(np.float32 if values.itemsize <= 2 else np.float64)
        exact -= low
        exact.clip(0, high - low, out=exact)
        exact *= 255 / (high - low)
        out[:] = exact.round(out=exact)
    if pixel_range is None and (kept := _levels(scaled)) < LEVELS and kept < 0.75 * (levels := _distinct(values)):
        raise ValueError(f"{found}: of {levels} levels, 8 bits for {low:g} to {high:g} would keep {kept}; {ADVICE}")
    return scaled


def _levels(pixels: NDArray[np.uint8]) -> int:
    """Number of distinct values."""
    return np.count_nonzero(sum(np.bincount(block.ravel(), minlength=256) for block in _blocks(pixels)))


def _distinct(values: NDArray[Any]) -> int:
    """Number of distinct values of any type; sorting one block at a time needs no sorted copy of the image."""
    return len(np.unique(np.concatenate([np.unique(block) for block in _blocks(values)])))


def _blocks(pixels: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views of successive rows, of about BLOCK values each."""
    rows = max(1, BLOCK * len(pixels) // pixels.size)
    return (pixels[top : top + rows] for top in range(0, len(pixels), rows))
