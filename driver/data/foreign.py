"""What a file is that is read as no image, in words: often a web page, a pointer or a scan under an image's name."""

from typing import BinaryIO

from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from ..messages.text import amount

DAMAGED = "damaged or of a kind that is not read"
"""What is wrong with a file of a known format."""
STARTS = {
    b"\xff\xd8\xff": f"a JPEG, {DAMAGED}",
    b"\x89PNG": f"a PNG, {DAMAGED}",
    b"GIF8": f"a GIF, {DAMAGED}",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the image",
    b"<svg": "an SVG drawing",
    b"<": "a web page (HTML) or XML",
    b"{": "JSON text",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\x00\x00\x01\x00": "an icon (ICO)",
    b"8BPS": "a Photoshop document",
    b"PK": "a zip archive",
    b"\x1f\x8b": "compressed with gzip",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SIMPLE  =": "a FITS image",
    b"\xff\x0a": "a JPEG XL",
}
"""First bytes of files that are saved or downloaded under an image's name, and what they are."""
BRANDS = {b"hei": "HEIF", b"hev": "HEIF", b"mif": "HEIF", b"msf": "HEIF", b"avi": "AVIF"}
"""First letters of the brand of a file of ISO's media format; others are films."""
NUMBERS = {1: "unsigned", 2: "signed", 3: "float"}
"""Formats of a TIFF's samples."""
COLOURS = {0: "grey", 1: "grey", 2: "RGB"}
"""Meanings of a TIFF's samples, where they are grey levels or colours."""
SHOWN = 12
"""Bytes of an unknown file that are shown."""


def what_it_is(file: BinaryIO) -> str:
    """What a file is that no known format of images fits, as text."""
    file.seek(0)
    start = file.read(512)
    if start[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(file)
    if not start:
        return "an empty file"
    if not start.strip(b"\0"):
        return "zeros, as a download or copy that was cut leaves"
    if start[4:8] == b"ftyp":
        return f"{BRANDS.get(start[8:11], 'a film')}, which is not read; convert it to JPEG or PNG"
    if start[128:132] == b"DICM":
        return "a DICOM file; convert it to PNG or TIFF of 16 bits"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    known = next((what for magic, what in STARTS.items() if text.startswith(magic)), "")
    return known or f"no format of images that is known; it starts with {start[:SHOWN]!r}"


def _tiff(file: BinaryIO) -> str:
    """Layout of the samples of a TIFF that Pillow does not read."""
    try:
        file.seek(0)
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        samples, bits = tags.get(SAMPLESPERPIXEL, 1), tags.get(BITSPERSAMPLE, (1,))[0]
        number = NUMBERS.get(tags.get(SAMPLEFORMAT, (1,))[0], "other")
        colour = COLOURS.get(tags.get(PHOTOMETRIC_INTERPRETATION, 0), "other colours")
        each = f"{amount(int(samples), f'{number} sample')} of {int(bits)} bits per pixel, marked as {colour}"
    except Exception:  # damaged entries: Pillow raises nearly anything, and numbers may be texts
        return "a damaged TIFF"
    return f"a TIFF of {each}, is not read; convert it to grey or RGB of 8 or 16 unsigned bits"
