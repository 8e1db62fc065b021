"""Pixels that the driver's decoder makes of image files: grey levels, transparency, orientation, formats."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from driver.data.decode import DEFAULT, EXTENSIONS, FORMATS, Decoder

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
"""64 levels from left to right."""
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP.T], axis=2)
OPAQUE = np.full((64, 64, 1), 65535)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF in strips of 16 rows, for kinds of pixels that Pillow does not write."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    order, data = (">" if values.dtype.byteorder == ">" else "<"), values.tobytes()
    formats = {"u": 1, "i": 2, "f": 3}
    entries = {256: [64], 257: [64], 258: [8 * values.itemsize] * channels, 259: [1], 277: [channels], 278: [16]}
    entries |= {262: [tags.get("photometric", 1)], 284: [tags.get("planar", 1)], 339: [formats[values.dtype.kind]]}
    entries |= {273: [8 + i * len(data) // 4 for i in range(4)], 279: [len(data) // 4] * 4}
    if "extra" in tags:
        entries[338] = [tags["extra"]]
    head, more, place = b"", b"", 8 + len(data) + 6 + 12 * len(entries)
    for tag, numbers in sorted(entries.items()):
        long = tag in (273, 279)
        packed = struct.pack(f"{order}{len(numbers)}{'I' if long else 'H'}", *numbers).ljust(4, b"\0")
        inline = packed if len(packed) == 4 else struct.pack(f"{order}I", place + len(more))
        more += packed if len(packed) > 4 else b""
        head += struct.pack(f"{order}HHI", tag, 4 if long else 3, len(numbers)) + inline
    begin = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return begin + data + struct.pack(f"{order}H", len(entries)) + head + bytes(4) + more


def png16(values: np.ndarray, colour_type: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 64, 64, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def up_to(white: float, kind: str, values: np.ndarray = RAMP) -> np.ndarray:
    return (values * white).astype(kind)


def pnm(white: int, largest: int, values: np.ndarray = RAMP) -> bytes:
    return b"P%d\n64 64\n%d\n" % (5 if values.ndim == 2 else 6, largest) + up_to(white, ">u2", values).tobytes()


def ascii_pnm(white: int, largest: int, values: np.ndarray) -> bytes:
    numbers = " ".join(map(str, up_to(white, "int64", values).ravel()))
    return b"P%d\n64 64\n%d\n" % (2 if values.ndim == 2 else 3, largest) + numbers.encode()


def read(data: bytes, **options) -> np.ndarray:
    image = Decoder(**options)(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


EXPECTED = RAMP[:, :, None] * [255, 255, 255]

KEPT = {
    "PNG": encoded(up_to(65535, "uint16"), "PNG"),
    "TIFF": encoded(up_to(65535, "uint16"), "TIFF"),
    "TIFF, LZW": encoded(up_to(65535, "uint16"), "TIFF", compression="tiff_lzw"),
    "TIFF, big-endian": tiff(up_to(65535, ">u2")),
    "TIFF, white is 0": tiff(up_to(65535, "<u2", 1 - RAMP), photometric=0),
    "TIFF, several": encoded(
        Image.fromarray(up_to(65535, "uint16")), "TIFF", save_all=True, append_images=[Image.new("I;16", (64, 64))]
    ),
    "TIFF, signed": tiff((up_to(65535, "int64") - 32768).astype("<i2")),
    "TIFF, 8 bits, signed": tiff((up_to(255, "int64") - 128).astype("i1")),
    "TIFF, 32 bits": encoded(up_to(65535, "int32"), "TIFF"),
    "TIFF, 32 bits, unsigned": tiff(up_to(65535, "<u4")),
    "TIFF, float": encoded(RAMP.astype("float32"), "TIFF"),
    "TIFF, float, white is 0": tiff((1 - RAMP).astype("<f4"), photometric=0),
    "PFM": encoded(RAMP.astype("float32"), "PPM"),
    "PGM": pnm(65535, 65535),
    "PGM, 12 bits": pnm(4095, 4095),
    "PGM, text": ascii_pnm(1023, 1023, RAMP),
    "JPEG 2000": encoded(up_to(65535, "uint16"), "JPEG2000"),
    "PNG with opacity": png16(np.concatenate([up_to(65535, "int64")[..., None], OPAQUE], axis=2), 4),
}


@pytest.mark.parametrize("name", KEPT)
def test_grey_levels_of_more_than_8_bits_are_kept(name):
    assert np.abs(read(KEPT[name]) - EXPECTED).max() <= 1


COLOURED = {
    "PNG": png16(up_to(65535, "int64", COLOURS), 2),
    "PNG with opacity": png16(np.concatenate([up_to(65535, "int64", COLOURS), OPAQUE], axis=2), 6),
    "TIFF": tiff(up_to(65535, "<u2", COLOURS), photometric=2),
    "TIFF, big-endian": tiff(up_to(65535, ">u2", COLOURS), photometric=2),
    "PPM": pnm(65535, 65535, COLOURS),
    "PPM, 12 bits": pnm(4095, 4095, COLOURS),
    "PPM, text": ascii_pnm(4095, 4095, COLOURS),
    **{
        f"TIFF, 4 channels, {extra}": tiff(
            np.concatenate([up_to(65535, "<u2", COLOURS), OPAQUE], axis=2).astype("<u2"), photometric=2, extra=extra
        )
        for extra in (0, 1, 2)
    },
}


@pytest.mark.parametrize("name", COLOURED)
def test_colours_of_16_bits_are_kept(name):
    assert np.abs(read(COLOURED[name]) - COLOURS * 255).max() <= 1


LOST = {
    "10 bits in 16": (
        encoded(up_to(1023, "uint16"), "PNG"),
        "values from 0 to 1023: of 64 levels, .* keep 5; give --data",
    ),
    "12 bits in 16": (encoded(up_to(4095, "uint16"), "TIFF"), "values from 0 to 4095: of 64 levels, .* would keep 17"),
    "12 bits in colours": (png16(up_to(4095, "int64", COLOURS), 2), "values from 0 to 4095: of 64 levels"),
    "12 bits in TIFF's colours": (tiff(up_to(4095, ">u2", COLOURS), photometric=2), "values from 0 to 4095"),
    "12 bits in a PPM": (pnm(4095, 65535, COLOURS), "values from 0 to 4095"),
    "12 bits in text": (ascii_pnm(4095, 65535, COLOURS), "RGB pixels of .* only the upper 8 bits are read .17 levels"),
    "12 bits with opacity": (
        png16(np.concatenate([up_to(4095, "int64")[..., None], OPAQUE], axis=2), 4),
        "only the upper 8 bits are read .17 levels.; convert the file to 8 bits",
    ),
    "planes": (tiff(up_to(65535, "<u2", COLOURS), photometric=2, planar=2), "convert the file to 8 bits"),
    "CT": (tiff((RAMP * 1400 - 1000).astype("<i2")), "values from -1000 to 400: of 64 levels, .* -32768 to 32767"),
    "CT, 32 bits": (encoded((RAMP * 1400 - 1000).astype("int32"), "TIFF"), "from -1000 to 400, outside of 0 to 65535"),
    "32 bits": (
        tiff(up_to(2**32 - 1, "<u4")),
        r"values from 0 to 4.29497e\+09, outside of 0 to 65535; give --data.pixel",
    ),
    "float to 255": (
        encoded(up_to(255, "float32"), "TIFF"),
        "values from 0 to 255, outside of 0 to 1; give --data.pixel",
    ),
    "float to 0.01": (encoded(up_to(0.01, "float32"), "TIFF"), "values from 0 to 0.01: of 64 levels"),
    "infinity": (
        encoded(np.where(RAMP > 0.9, np.inf, RAMP).astype("float32"), "TIFF"),
        "values from 0 to inf, outside",
    ),
    "NaN": (encoded(np.where(RAMP > 0.9, np.nan, RAMP).astype("float32"), "TIFF"), "448 of 4096 values are NaN"),
    "a mask of 0 and 1": (encoded((RAMP > 0.5).astype("uint16"), "PNG"), "of 2 levels, 8 bits .* would keep 1"),
}


@pytest.mark.parametrize("name", LOST)
def test_an_image_that_would_lose_its_levels_is_refused(name):
    data, words = LOST[name]
    with pytest.raises(ValueError, match=words):
        read(data)


@pytest.mark.parametrize("kind", ["<f2", "<f8"])
def test_floats_that_pillow_does_not_know_are_refused(kind):
    with pytest.raises(Image.UnidentifiedImageError):
        read(tiff(RAMP.astype(kind)))


def test_few_levels_and_a_constant_image_are_read():
    assert np.unique(read(encoded((RAMP > 0.5).astype("uint16") * 65535, "PNG"))).tolist() == [0, 255]
    assert np.unique(read(encoded(np.full((4, 4), 32768, "uint16"), "PNG"))).tolist() == [128]


@pytest.mark.parametrize(
    "pixel_range, data",
    [
        ((0, 4095), encoded(up_to(4095, "uint16"), "PNG")),
        ((0, 4095), pnm(4095, 65535)),
        ((0, 4095), pnm(4095, 4095)),  # which Pillow scales to 65535
        ((-1000, 400), tiff((RAMP * 1400 - 1000).astype("<i2"))),
        ((-1000, 400), encoded((RAMP * 1400 - 1000).astype("int32"), "TIFF")),
        ((0, 2**32 - 1), tiff(up_to(2**32 - 1, "<u4"))),
        ((0, 255), encoded(up_to(255, "float32"), "TIFF")),
    ],
)
def test_a_given_range_becomes_black_to_white(pixel_range, data):
    assert np.abs(read(data, pixel_range=pixel_range) - EXPECTED).max() <= 1


def test_values_outside_a_given_range_are_black_and_white():
    pixels = read(encoded(up_to(4000, "uint16"), "PNG"), pixel_range=(1000, 2000))[0, :, 0]
    assert (pixels == 0).sum() == 16 and (pixels == 255).sum() == 32 and (np.diff(pixels) >= 0).all()
    colours = up_to(4095, "int64", COLOURS)
    with_opacity = png16(np.concatenate([colours, OPAQUE], axis=2), 6)
    assert np.abs(read(with_opacity, pixel_range=(0, 4095)) - COLOURS * 255).max() <= 1  # the opacity keeps its range
    assert read(encoded(up_to(255, "uint8"), "PNG"), pixel_range=(0, 4095)).max() == 255  # 8 bits have none
    with pytest.raises(ValueError, match="only the upper 8 bits are read"):
        read(KEPT["PNG with opacity"], pixel_range=(0, 4095))


@pytest.mark.parametrize(
    "mode, kind", [("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "BMP"), ("CMYK", "TIFF")]
)
def test_other_modes_of_8_bits_are_kept(mode, kind):
    grey = Image.fromarray(np.rint(RAMP * 255).astype("uint8"))
    assert np.abs(read(encoded(grey.convert(mode), kind)) - EXPECTED).max() <= 1


def test_inverted_cmyk_of_photographs_and_bilevel():
    grey = Image.fromarray(np.rint(RAMP * 255).astype("uint8"))
    assert np.abs(read(encoded(grey.convert("CMYK"), "JPEG", quality=95)) - EXPECTED).max() <= 4
    assert np.array_equal(read(encoded(RAMP > 0.5, "TIFF")), np.where(RAMP > 0.5, 255, 0)[..., None].repeat(3, 2))


def test_portable_bitmaps_and_pixmaps_of_8_bits():
    for data in (b"P1 2 1 0 1", b"P4 2 1\n\x40", b"P2 2 1 255 255 0", b"P5 2 1 255\n\xff\0", b"P2 2 1 9 9 0"):
        assert read(data).tolist() == [[[255] * 3, [0] * 3]], data
    for data in (b"P3 1 1 255 1 2 3", b"P6 1 1 255\n\1\2\3"):
        assert read(data).tolist() == [[[1, 2, 3]]], data


# Transparency

SEEN, HIDDEN = (10, 20, 30, 255), (200, 0, 0, 0)


def half_hidden(below: tuple[int, ...] = HIDDEN) -> Image.Image:
    pixels = np.empty((8, 8, 4), np.uint8)
    pixels[:4], pixels[4:] = SEEN, below
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "data",
    [
        encoded(half_hidden(), "PNG"),
        encoded(half_hidden(), "GIF"),
        encoded(half_hidden().quantize(8), "PNG"),
        encoded(half_hidden().convert("RGB"), "PNG", transparency=HIDDEN[:3]),
        encoded(half_hidden(), "TIFF"),
    ],
    ids=["PNG", "GIF", "palette", "colour key", "TIFF"],
)
def test_transparent_parts_are_white(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read(data)
    assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[7, 7].tolist() == [255, 255, 255]


def test_transparency_between():
    assert read(encoded(half_hidden((200, 0, 0, 51)), "PNG"))[7, 7].tolist() == [244, 204, 204]
    nothing_visible = half_hidden()
    nothing_visible.putalpha(0)
    assert read(encoded(nothing_visible, "PNG"))[7, 7].tolist() == [200, 0, 0]


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(kind, orientation):
    """The upright image has a red corner at the top left and a green corner at the top right."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16, 0] = upright[:16, 32:, 1] = 255
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud]
    turns += [lambda a: a.swapaxes(0, 1), np.rot90, lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a, -1)]
    stored = np.ascontiguousarray(turns[orientation - 1](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    assert np.abs(read(data) - upright).max() < 30
    if kind != "TIFF":
        assert np.abs(read(data, exif=False) - stored).max() < 30


@pytest.mark.parametrize(
    "exif",
    [b"junk", b"MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0", b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01"],
)
def test_damaged_exif_data_does_not_matter(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        assert read(encoded(Image.new("RGB", (6, 4)), kind, exif=b"Exif\0\0" + exif)).shape == (4, 6, 3)


def test_damaged_entries_beside_the_orientation_do_not_matter():
    """A width that is text, which Pillow's exif_transpose fails to write anew."""
    entries = struct.pack("<HHI4s", 256, 2, 4, b"wide") + struct.pack("<HHII", 274, 3, 1, 6)
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert read(data).shape == (6, 4, 3)


# Formats


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_whatever_the_name(kind):
    Path("image.dat").write_bytes(encoded(half_hidden().convert("RGB"), kind))
    assert DEFAULT(Path("image.dat")).size == (8, 8)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "PCX", "ICO"])
def test_other_formats_are_not_opened(kind):
    Path("image.png").write_bytes(encoded(half_hidden().convert("RGB"), kind))
    with pytest.raises(Image.UnidentifiedImageError):
        DEFAULT(Path("image.png"))


def test_endings_of_names():
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".webp"} <= EXTENSIONS
    assert not {".eps", ".pdf", ".ps", ".mpg", ".h5", ".txt"} & EXTENSIONS
    assert all(re.fullmatch(r"\.[a-z0-9]+", ending) for ending in EXTENSIONS)


def test_large_images_are_read_without_a_warning_and_huge_ones_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(encoded(half_hidden(), "PNG")).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="81 pixels, above the limit of 80; scale the image down"):
        read(encoded(Image.new("RGB", (9, 9)), "PNG"))


def test_the_first_of_several_frames():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(read(data)[4, 4] - [255, 0, 0]).max() < 10
