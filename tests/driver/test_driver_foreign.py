"""Files that are read as no image, as people have them under an image's name, are called what they are."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from driver.data.decode import DEFAULT
from driver.data.unreadable import fault_of

FOREIGN = [
    (b"", "an empty file"),
    (bytes(2000), "zeros, as a download or copy that was cut leaves"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html><html>404", "a web page (HTML) or XML"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    (b'{"error": "not found"}', "JSON text"),
    (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS; `git lfs pull` fetches the image"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF, which is not read; convert it to JPEG or PNG"),
    (b"\0\0\0\x18ftypisom\0\0\0\0", "a film, which is not read; convert it to JPEG or PNG"),
    (bytes(128) + b"DICM", "a DICOM file; convert it to PNG or TIFF of 16 bits"),
    (b"%PDF-1.4", "a PDF"),
    (b"\xff\xd8\xff\xe0", "a JPEG, damaged or of a kind that is not read"),
    (b"II*\0", "a damaged TIFF"),
    (b"II*\0\x08\0\0\0\x01\0\x15\x01\x02\0\x02\0\0\0a\0\0\0" + bytes(9), "a damaged TIFF"),  # "a" samples
    (b"junk of its own", "no format of images that is known; it starts with b'junk of its '"),
]


@pytest.mark.parametrize("content, what", FOREIGN, ids=[what.partition(";")[0] for _, what in FOREIGN])
def test_a_file_is_called_what_it_is(content, what):
    Path("a.jpg").write_bytes(content)
    for file in (Path("a.jpg"), io.BytesIO(content)):
        with pytest.raises(UnidentifiedImageError) as error:
            DEFAULT(file)
        assert fault_of(error.value) == what


def tiff(samples: int, bits: int, number: int, photometric: int) -> bytes:
    """TIFF of 4 x 4 pixels."""
    data = bytes(16 * samples * bits // 8)
    entries = [(256, 4), (257, 4), (258, bits), (259, 1), (262, photometric), (273, 8), (277, samples), (278, 4)]
    entries += [(279, len(data)), (339, number)]
    packed = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    "layout, what",
    [
        ((13, 16, 1, 1), "13 unsigned samples of 16 bits per pixel, marked as grey"),  # all bands of a satellite
        ((3, 16, 1, 1), "3 unsigned samples of 16 bits per pixel, marked as grey"),  # GDAL's default for 16 bits
        ((3, 32, 3, 2), "3 float samples of 32 bits per pixel, marked as RGB"),
        ((1, 64, 3, 1), "1 float sample of 64 bits per pixel, marked as grey"),
    ],
)
def test_a_tiff_that_is_not_read_has_its_layout_named(layout, what, capfd):
    with pytest.raises(UnidentifiedImageError) as error:
        DEFAULT(io.BytesIO(tiff(*layout)))
    assert str(error.value) == f"a TIFF of {what}, is not read; convert it to grey or RGB of 8 or 16 unsigned bits"
    assert capfd.readouterr().err == ""  # of Pillow's log, which would be a line per image


@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_band_that_is_not_declared_as_opacity_is_left_out(bits):
    """Red, green, blue and near infrared, as satellites have them; Pillow takes the fourth for an opacity."""
    bands = np.broadcast_to(np.array([10, 20, 30, 40], f"uint{bits}") * (1 if bits == 8 else 257), (64, 64, 4))
    entries = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 4, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 4), (278, 3, 1, 64), (279, 4, 1, bands.size * bits // 8)]
    data = np.ascontiguousarray(bands).tobytes()
    after = 8 + len(data) + 2 + 12 * len(entries) + 4
    packed = b"".join(struct.pack("<HHII", *entry[:3], after if entry[0] == 258 else entry[3]) for entry in entries)
    file = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + packed + bytes(4)
    file += struct.pack("<4H", *[bits] * 4)
    assert Image.open(io.BytesIO(file)).mode == "RGBA"
    assert np.asarray(DEFAULT(io.BytesIO(file)))[5, 5].tolist() == [10, 20, 30]


def test_bitmaps_of_16_bits_per_pixel_are_not_deep():
    """Five or six bits per colour, in a dark image of few levels."""
    green = np.arange(16, dtype="<u2").repeat(4) << 5
    head = struct.pack("<IiiHHIIiiII3I", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    file = b"BM" + struct.pack("<IHHI", 66 + 128, 0, 0, 66) + head + green.tobytes()
    levels = np.unique(np.asarray(DEFAULT(io.BytesIO(file)))[..., 1])
    assert len(levels) == 16 and abs(levels.max() - 15 * 255 / 63) <= 2
