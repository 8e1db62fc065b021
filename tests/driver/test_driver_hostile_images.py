"""Image files made to do harm: foreign formats, bombs, pipes, strips; each is read in bounded memory or refused."""

import ast
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from imports import ROOT
from PIL import EpsImagePlugin, Image
from tars import write_tar
from videos import square, write_clip

from driver.config import UserError
from driver.data import deep_pixels
from driver.data.decode import DEFAULT, FORMATS, PIXELS
from driver.data.folders import Files
from driver.data.shards import Shards
from driver.evaluation.davis_clips import Clip, read_clip, read_frame, read_mask
from driver.segment_video import write_masks

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(gs.ran) (w) file closefile showpage\n"


# One opener


def test_one_function_opens_images():
    """No other call can open PostScript, for which Pillow starts Ghostscript, or an image above the limit."""
    calls = []
    for path in sorted((ROOT / "driver").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            calls += [path.name] if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open" else []
            names = [name.name for name in getattr(node, "names", [])] if isinstance(node, ast.ImportFrom) else []
            assert not {"default_loader", "read_image", "decode_image", "ImageFolder"} & set(names), path
            assert not (isinstance(node, ast.ImportFrom) and node.module == "PIL.Image"), path
    assert calls == ["decode.py"]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """File that a stand-in for Ghostscript leaves when it is started."""
    (tmp_path / "bin").mkdir()
    program, marker = tmp_path / "bin" / "gs", tmp_path / "gs.ran"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where Pillow keeps what it has found on PATH
    return marker


def in_folder() -> None:
    Path("pets").mkdir()
    Path("pets/photo.jpg").write_bytes(POSTSCRIPT)
    Files(Path("pets"), 0.0).read(0)


def in_shard() -> None:
    write_tar(Path("s.tar"), [("photo.jpg", POSTSCRIPT)])
    Shards(Path("s.tar"), 0.0).read(0)


def as_frame() -> None:
    Path("00000.jpg").write_bytes(POSTSCRIPT)
    read_frame(Path("00000.jpg"))


def as_mask() -> None:
    Path("00000.png").write_bytes(POSTSCRIPT)
    read_mask(Path("00000.png"))


def as_palette() -> None:
    Path("00000.png").write_bytes(POSTSCRIPT)
    clip = Clip("a", [], [Path("00000.png")], frozenset(), 1, frozenset())
    write_masks(np.zeros((0, 4, 4), np.uint8), clip, Path("out"))


@pytest.mark.parametrize("read", [in_folder, in_shard, as_frame, as_mask, as_palette])
def test_postscript_never_starts_ghostscript(read, ghostscript):
    with pytest.raises((UserError, Image.UnidentifiedImageError), match="PostScript"):
        read()
    assert not ghostscript.exists()


def test_pillow_by_itself_starts_ghostscript(ghostscript):
    """The stand-in is found, so the test above can fail."""
    with pytest.raises(OSError), Image.open(io.BytesIO(POSTSCRIPT)) as image:
        image.load()
    assert ghostscript.exists()


# Bombs


def png(width: int, height: int, rows: bytes = b"", bits: int = 8, **chunks: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *((k.encode(), data) for k, data in chunks.items()), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*parts, (b"IEND", b"")]
    )


def small(kind: str, **options) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 20, 30)).save(file, kind, **options)
    return bytearray(file.getvalue())


def changed(data: bytearray, place: int, layout: str, side: int = 50_000) -> bytes:
    """The file, with another width and height at a place of its header."""
    struct.pack_into(layout, data, place, side, side)
    return bytes(data)


def tiff(**tags: int) -> bytes:
    """TIFF of 100 x 100 grey pixels, its values changed by `tags` (t256=... is the width)."""
    values = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 100, 279: 11}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    data = zlib.compress(bytes(999)).ljust(40, b"\0")
    return struct.pack("<2sHI", b"II", 42, 48) + data + struct.pack("<H", len(values)) + entries + bytes(4)


def animated(side: int) -> bytes:
    """WebP animation whose canvas has this side, and whose one frame is small."""
    three = struct.pack("<I", side - 1)[:3] * 2
    frame = bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + bytes(small("WEBP")[12:])
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + three + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


GIF, JP2 = small("GIF"), small("JPEG2000")
BOMBS = {
    "PNG": png(50_000, 50_000),
    "PNG, wide": png(2_000_000_000, 1),
    "PNG, one row too high": png(178_956_971, 1),
    "GIF, its screen": changed(small("GIF"), 6, "<HH"),
    "GIF, its first frame": changed(small("GIF"), GIF.index(b",", 13) + 5, "<HH"),
    "BMP": changed(small("BMP"), 18, "<ii"),
    "TIFF": tiff(t256=50_000, t257=50_000),
    "TIFF, tiles": tiff(t322=32_000, t323=32_000, t324=8, t325=20),
    "PPM": b"P6 50000 50000 255\n\0",
    "PFM": b"Pf 50000 50000 1.0\n\0",
    "WEBP, animated": animated(16_384),
    "JPEG2000": changed(bytearray(changed(JP2, JP2.index(b"ihdr") + 4, ">II")), JP2.index(b"\xff\x51") + 6, ">II"),
}
AVIF = "AVIF" in FORMATS and small("AVIF")
BOMBS |= {"AVIF": changed(AVIF, AVIF.index(b"ispe") + 8, ">II", 16_000)} if AVIF else {}


@pytest.mark.parametrize("default", [True, False], ids=["as Pillow comes", "Pillow's limit removed"])
@pytest.mark.parametrize("name", BOMBS)
def test_an_image_above_the_limit_is_refused_before_room_is_made_for_it(name, default, monkeypatch):
    if not default:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("room was made"))
    monkeypatch.setattr(Image.core, "fill", lambda *_: pytest.fail("room was made"))
    with pytest.raises(ValueError, match=r"[0-9,]{5,}.* pixels, above the limit of 178,956,970; scale the image down"):
        DEFAULT(io.BytesIO(BOMBS[name]))
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_message_names_the_sides(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"^50,000 x 50,000 pixels, above"):
        DEFAULT(io.BytesIO(BOMBS["PNG"]))
    with pytest.raises(ValueError, match=r"^tiles of 32,000 x 32,000 pixels, above"):
        DEFAULT(io.BytesIO(BOMBS["TIFF, tiles"]))


def test_the_limit_is_that_of_pillow_so_nothing_smaller_is_refused():
    assert 2 * Image.MAX_IMAGE_PIXELS == PIXELS
    with pytest.raises(OSError, match="truncated"):  # taken as an image, whose rows are missing
        DEFAULT(io.BytesIO(b"P5 178956970 1 255\n\0"))


def test_a_large_later_frame_is_no_fault_of_the_first():
    file = io.BytesIO()
    frames = [Image.new("L", (16, 16), level) for level in (60, 200)]
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    place = data.rindex(struct.pack("<HHII", 256, 4, 1, 16))
    struct.pack_into("<HHII", data, place, 256, 4, 1, 4_000_000_000)
    assert DEFAULT(io.BytesIO(data)).getpixel((3, 3)) == (60, 60, 60)


def test_attributes_of_a_small_file_take_no_memory():
    """100 MB of zeros in 100 kB each: refused by Pillow, or not unpacked."""
    zeros = zlib.compress(bytes(10**8))
    for kind, data in {"iCCP": b"a\0\0" + zeros, "zTXt": b"a\0\0" + zeros, "iTXt": b"a\0\1\0\0\0" + zeros}.items():
        Path(f"{kind}.png").write_bytes(png(2, 1, bytes(7), **{kind: data}))
    assert peak_of("iCCP.png", "zTXt.png", "iTXt.png") < 30 << 20


def peak_of(*files: str) -> int:
    """Bytes by which reading images raises the peak of the resident memory of a new process."""
    program = (
        "import resource, sys; from pathlib import Path; from driver.data.decode import DEFAULT\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = peak()\n"
        "for name in sys.argv[1:]:\n try: DEFAULT(Path(name))\n except (ValueError, OSError): pass\n"
        "print(peak() - before)"
    )
    command, environment = [sys.executable, "-c", program, *files], os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout) << 10


def test_sixteen_bit_images_take_no_copies_of_eight_times_their_size():
    """18 million samples, 36 MB: as int64 for a histogram alone they would be 144 MB more."""
    Path("a.png").write_bytes(png(3000, 2000, bytes(2000 * 18_001), 16))
    assert peak_of("a.png") < 200 << 20


# Files that are no files


@pytest.fixture
def no_waiting():
    """End a test that waits for a pipe."""

    def end(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "replace, error, what",
    [
        (lambda path: os.mkfifo(path), ValueError, "a pipe or a device, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), ValueError, "a pipe or a device, not a file"),
        (lambda path: path.mkdir(), IsADirectoryError, "Is a directory"),
        (lambda path: None, FileNotFoundError, "No such file"),
        (lambda path: path.touch(), Image.UnidentifiedImageError, "an empty file"),
        (lambda path: path.symlink_to(path.name), OSError, "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/proc/self/status"), Image.UnidentifiedImageError, "no format of images"),
    ],
    ids="pipe device folder gone empty loop proc".split(),
)
def test_what_takes_the_place_of_an_image_after_the_listing(replace, error, what, no_waiting):
    Path("pets").mkdir()
    Path("pets/a.png").write_bytes(small("PNG"))
    files = Files(Path("pets"), 0.0)
    Path("pets/a.png").unlink()
    replace(Path("pets/a.png"))
    with pytest.raises(error, match=what):
        files.read(0)


def test_a_pipe_as_a_frame_is_no_frame(no_waiting):
    os.mkfifo("00000.jpg")
    with pytest.raises(UserError, match=r"00000.jpg: not a readable image \(a pipe or a device, not a file\)"):
        read_frame(Path("00000.jpg"))


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000", "TIFF"])
def test_a_file_of_gigabytes_is_not_read(kind):
    """A file of holes takes no room on the disk. Pillow reads a WebP whole before it looks at its size."""
    with open("a.webp", "wb") as file:
        file.write(small(kind))
        file.truncate(5 << 30)
    with pytest.raises(ValueError, match=r"a file of 5,368,709,120 bytes, above the limit of 4,294,967,296"):
        DEFAULT(Path("a.webp"))


@pytest.mark.parametrize("gap", [0, 5, (1 << 20) - 40, (1 << 20) - 2, 3 << 20])
def test_the_bits_of_a_jpeg_2000_are_found_behind_any_header(gap):
    """The file is searched in blocks of 1 MiB; the size marker may lie across two of them."""
    file = io.BytesIO(bytes(gap) + b"marker" + bytes(range(50)) + bytes(gap) + b"marker")
    assert deep_pixels._behind(file, b"marker", 39) == bytes(range(39))
    assert deep_pixels._behind(file, b"another", 39) == b""


def test_names_of_files_are_one_line():
    Path("pets").mkdir()
    for name in (b"a\n\x1b[31m.png", b"b\xff.png"):
        Path(os.fsdecode(b"pets/" + name)).write_bytes(small("PNG"))
    files = Files(Path("pets"), 0.0)
    assert [files.name(i) for i in range(2)] == [r"pets/a\n\x1b[31m.png", r"pets/b\udcff.png"]
    assert all(files.read(i).size == (16, 16) for i in range(2))


# DAVIS


def test_frames_much_longer_than_wide_are_refused():
    """The shorter side would become --short-side, and the longer one 65,535 / 20 times as much."""
    write_clip(Path("davis"), [square(0, 0, 2, (2, 33)).astype(np.uint8)] * 3)
    with pytest.raises(
        UserError, match=r"00000.jpg: a frame's longer side may be 16 times its shorter one, got 33 x 2"
    ):
        read_clip(Path("davis"), "squares")


def test_a_mask_that_is_cut_short_is_called_so():
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save("a.png")
    Path("a.png").write_bytes(Path("a.png").read_bytes()[:90])
    with pytest.raises(UserError, match=r"a.png: not a readable image \(.*truncated"):
        read_mask(Path("a.png"))


def test_a_mask_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Path("a.png").write_bytes(BOMBS["PNG"])
    with pytest.raises(UserError, match=r"a.png: not a readable image \(50,000 x 50,000 pixels, above"):
        read_mask(Path("a.png"))
