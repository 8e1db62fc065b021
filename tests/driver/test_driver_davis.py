"""Segmentation of clips on disk: the script from frames to scores, and what masks, names and lists may hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videos import FRAME, Colours, square, two_squares, use_colours, write_clip

from driver import segment_video
from driver.config import UserError
from driver.distributed import World
from driver.evaluation import davis_clips, frozen
from driver.evaluation.davis_metrics import Scores

ONE = [np.where(mask == 1, mask, 0) for mask in two_squares()]
EMPTY = np.zeros(FRAME, np.uint8)


def segment(davis: Path | str, **more) -> Scores | None:
    options = segment_video.Options(davis=Path(davis), short_side=128, last_frames=2, radius=4, **more)
    return segment_video.main(options, World())


def test_segmenting_a_made_up_clip(monkeypatch, capsys):
    use_colours(monkeypatch)
    write_clip(Path("davis"), two_squares())
    scores = segment("davis", out=Path("masks"))
    assert scores.j_mean > 0.95 and scores.f_mean > 0.95 and scores.j_recall == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["J&F-Mean", "J-Mean", "J-Recall", "F-Mean", "F-Recall"]
    assert "all 1 clips" in printed and "note" not in printed
    assert json.loads(Path("masks/scores.json").read_text())["squares"]["j_mean"] == scores.j_mean
    mask = Image.open("masks/squares/00004.png")
    assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
    assert mask.size == (192, 128) and set(np.unique(np.array(mask))) == {0, 1, 2}
    # Within a radius of no use, labels stay where they were: the squares are lost.
    still = segment_video.Options(davis=Path("davis"), short_side=128, last_frames=1, radius=1, top_k=1)
    monkeypatch.setattr(Colours, "forward_intermediates", lambda self, x, **_: [torch.eye(384).view(1, 384, 16, 24)])
    assert segment_video.main(still, World()).j_mean < 0.6


def test_255_as_object_and_as_void(monkeypatch, capsys):
    """0/255 masks score as 0/1 masks; void on the background changes nothing; two objects stay two."""
    use_colours(monkeypatch)
    write_clip(Path("ones"), ONE)
    plain = segment("ones")
    assert "note" not in capsys.readouterr().out and 0.9 < plain.j_and_f < 1
    write_clip(Path("binary"), ONE, values={1: 255})
    assert segment("binary", out=Path("masks")) == plain
    assert "note: masks hold 0 and 255 alone, so 255 is the object: squares\n" in capsys.readouterr().out
    assert set(np.unique(np.array(Image.open("masks/squares/00003.png")))) == {0, 1}
    folder = write_clip(Path("void"), ONE)
    for path in folder.iterdir():
        mask = np.array(Image.open(path))
        mask[:3] = 255
        Image.fromarray(mask).save(path)
    assert segment("void", out=Path("of_void")) == plain
    assert "note: 255 is void, which counts as background: squares\n" in capsys.readouterr().out
    assert set(np.unique(np.array(Image.open("of_void/squares/00000.png")))) == {0, 1}


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_of_binary_masks(mode):
    folder = write_clip(Path("davis"), ONE, values={1: 255})
    for path in folder.iterdir():
        mask = Image.fromarray(np.array(Image.open(path)))
        if mode == "P":
            mask.putpalette(768 * [0])
        mask.convert(mode).save(path)
    (clip,) = davis_clips.read_clips(Path("davis"), "val")
    assert (clip.masks() == np.stack(ONE)).all()


def test_clips_without_an_object_or_with_one_mask(monkeypatch, capsys):
    """Clips that cannot be scored have no weight; their masks are written. Objects that come later are background."""
    use_colours(monkeypatch)
    write_clip(Path("davis"), two_squares(), "whole")
    alone = segment("davis")
    write_clip(Path("davis"), [EMPTY, *two_squares()[1:]], "empty")
    for path in sorted(write_clip(Path("davis"), two_squares(), "first").iterdir())[1:]:
        path.unlink()
    assert segment("davis", out=Path("masks")) == alone
    printed = capsys.readouterr().out
    assert "note: no object in the first frame, so no score: empty\n" in printed
    assert "note: the first frame alone has a mask, so no score: first\n" in printed
    assert "note: objects that the first frame lacks count as background: empty\n" in printed
    assert "all 1 clips" in printed
    same = [np.array(Image.open(f"masks/{name}/00004.png")) for name in ("whole", "first")]
    assert (same[0] == same[1]).all() and same[0].max() == 2
    assert not np.array(Image.open("masks/empty/00004.png")).any()
    # Without the clip that has all its masks there are no scores, only masks.
    Path("davis/ImageSets/2017/val.txt").write_text("first\n\nempty\n")
    with pytest.raises(UserError, match=r"of 2, 1 lack an object .* and 1 have a mask of that frame alone \(--out"):
        segment("davis")
    assert segment("davis", out=Path("more")) is None
    assert len(list(Path("more/first").iterdir())) == 6 and not Path("more/scores.json").exists()
    Path("davis/ImageSets/2017/val.txt").write_text("empty\n")
    with pytest.raises(UserError, match="no clip can be scored: of 1, 1 lack an object"):
        segment("davis", out=Path("more"))


def test_an_object_smaller_than_a_patch_is_lost(monkeypatch):
    """Object 1 has 2 x 2 pixels between the centres of patches of 8 pixels: it is never found, and object 2 is."""
    use_colours(monkeypatch)
    tiny = square(1, 101, 2, FRAME)
    write_clip(Path("davis"), [np.where(tiny, 1, np.where(mask == 2, 2, 0)).astype(np.uint8) for mask in two_squares()])
    scores = segment("davis")
    assert 0.47 < scores.j_mean < 0.5 and scores.j_recall == 0.5


def test_names_in_the_order_of_their_numbers():
    """Frames 8 to 13 without zeros in front, PNG and JPEG mixed, hidden files beside them."""
    folder = write_clip(Path("davis"), ONE)
    frames = Path("davis/JPEGImages/480p/squares")
    for t in range(6):
        (folder / f"{t:05d}.png").rename(folder / f"shot{t + 8}.PNG")
        (frames / f"{t:05d}.jpg").rename(frames / f"shot{t + 8}.jpeg")
    Image.open(frames / "shot9.jpeg").save(frames / "shot9.png")
    (frames / "shot9.jpeg").unlink()
    (frames / "._shot9.jpeg").write_bytes(b"a fork of a file system")
    (clip,) = davis_clips.read_clips(Path("davis"), "val")
    assert [path.stem for path in clip.frames] == [f"shot{t}" for t in range(8, 14)]
    assert (clip.masks() == np.stack(ONE)).all()


def test_objects_beyond_the_palette():
    """PNG's indices have as many bits as the palette needs; a palette of 3 colours would lose objects 4 and 5."""
    folder = write_clip(Path("davis"), two_squares())
    short = Image.fromarray(np.full(FRAME, 1, np.uint8))
    short.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    short.save(folder / "00000.png", bits=8)
    (clip,) = davis_clips.read_clips(Path("davis"), "val")
    found = np.arange(6 * 128 * 192, dtype=np.uint8).reshape(6, *FRAME) % 6
    segment_video.write_masks(found, clip, Path("masks"))
    assert (np.stack([np.array(Image.open(path)) for path in sorted(Path("masks").iterdir())]) == found).all()


def list_of(text: bytes):
    return lambda: Path("davis/ImageSets/2017/val.txt").write_bytes(text)


def mask_as(convert, number: int = 0):
    """Function that replaces a mask by `convert` of its image; `number`: its frame."""

    def change() -> None:
        path = Path(f"davis/Annotations/480p/squares/{number:05d}.png")
        convert(Image.fromarray(np.array(Image.open(path)))).save(path)

    return change


def mask_with(values: dict[int, int], number: int = 0):
    """Function that replaces values of a mask."""
    table = [values.get(value, value) for value in range(256)]
    return mask_as(lambda mask: mask.point(table), number)


def as_jpeg():
    path = Path("davis/Annotations/480p/squares/00000.png")
    Image.fromarray(np.array(Image.open(path)) * 100).save(path, format="JPEG", quality=60)


def frame_twice():
    for path in sorted(Path(FOLDER).iterdir())[1:]:
        path.unlink()
    Image.open(f"{FRAMES}/00003.jpg").save(f"{FRAMES}/00003.png")


def only(count: int):
    """Function that keeps the first frames and masks."""

    def change() -> None:
        for path in Path("davis").rglob("0*.*"):
            if int(path.stem) >= count:
                path.unlink()

    return change


FOLDER, FRAMES = "davis/Annotations/480p/squares", "davis/JPEGImages/480p/squares"


@pytest.mark.parametrize(
    "change, message",
    [
        (mask_with({1: 38, 2: 75}), r"00000.png: the objects .* numbered 1, 2, \.\.\. without a gap, got 38, 75;"),
        (mask_with({2: 3}), "without a gap, got 1, 3; write object numbers, not grey levels"),
        (mask_with({2: 255, 1: 128}), "without a gap, got 128;"),
        (as_jpeg, "a palette or 8-bit grey PNG whose values are object numbers, got JPEG of mode L"),
        (mask_as(lambda mask: mask.convert("RGB"), 3), "00003.png: a mask must be a palette .* got PNG of mode RGB;"),
        (mask_as(lambda mask: mask.convert("RGBA")), "got PNG of mode RGBA; write the numbers themselves, not their"),
        (mask_as(lambda mask: mask.convert("LA")), "got PNG of mode LA"),
        (mask_as(lambda mask: mask.convert("I;16")), "got PNG of mode I"),
        (mask_as(lambda mask: mask.resize((96, 64), 0), 2), "00002.png: .* the frames' size, 192 x 128, got 96 x 64"),
        (lambda: [mask_with({1: 255, 2: 255}, t)() for t in range(1, 6)], "are 1, 2, but the later masks hold 255"),
        (lambda: Path(FOLDER, "00004.png").unlink(), "needs a mask .* got 6 frames and 5 masks, .* twice: 00004"),
        (lambda: Path(FRAMES, "00001.jpg").unlink(), "got 5 frames and 6 masks, without a partner or twice: 00001"),
        (lambda: Path(FRAMES, "a.png").write_bytes(Path(FRAMES, "00000.jpg").read_bytes()), "7 frames and 6 .*: a$"),
        (frame_twice, "got 7 frames and 1 masks, without a partner or twice: 00001, 00002, 00003, 00004, 00005"),
        (only(2), "squares: at least 3 frames are needed, .* got 2 frames and 2 masks"),
        (only(0), "got 0 frames and 0 masks"),
        (lambda: Image.new("RGB", (96, 64)).save(f"{FRAMES}/00002.jpg"), "must have one size, got 96 x 64 after 192 x"),
        (lambda: Path(FRAMES, "00003.jpg").write_bytes(b"no image"), "00003.jpg: not a readable image"),
        (
            lambda: Path(FOLDER, "00003.png").write_bytes(Path(FOLDER, "00003.png").read_bytes()[:90]),
            "00003.png: not a",
        ),
        (list_of(b""), "there must be at least one clip, a name a line; the file is empty"),
        (list_of(b"squares\nsquares \n"), "each clip must be named once, got 'squares' twice"),
        (
            list_of(b"/JPEGImages/480p/a/00000.jpg /Annotations/480p/a/00000.png"),
            "the name of one clip's folder, got '/J",
        ),
        (list_of(b"squares\x1b]0;title\x07\n"), "the name of one clip's folder, got 'squares.x1b"),
        (list_of(b"\n" * 65_537), "not a readable list of clips .*not a plain file of at most 65536 bytes"),
        (list_of(b"circles\n"), "clip circles: no folder davis/JPEGImages/480p/circles"),
        (list_of(b"\xff\xfe\x00"), "val.txt: not a readable list of clips"),
        (lambda: Path("davis/ImageSets/2017/val.txt").unlink(), "no ImageSets/2017/val.txt there; is it DAVIS 2017"),
    ],
)
def test_bad_clips(change, message):
    write_clip(Path("davis"), two_squares())
    change()
    with pytest.raises(UserError, match=message):
        davis_clips.read_clips(Path("davis"), "val")


def test_a_list_from_windows():
    write_clip(Path("davis"), two_squares(), "two squares")
    Path("davis/ImageSets/2017/val.txt").write_bytes(b"\xef\xbb\xbftwo squares\r\n\r\n")
    assert [clip.name for clip in davis_clips.read_clips(Path("davis"), "val")] == ["two squares"]


def test_masks_are_not_written_over_annotations(monkeypatch):
    use_colours(monkeypatch)
    folder = write_clip(Path("davis"), two_squares())
    before = (folder / "00003.png").read_bytes()
    for out in ("davis/Annotations/480p", "davis/../davis/JPEGImages/480p"):
        with pytest.raises(UserError, match="masks would replace files of --davis davis; give another folder"):
            segment("davis", out=Path(out))
    assert (folder / "00003.png").read_bytes() == before
    Path("file").touch()
    with pytest.raises(UserError, match="--out file: file cannot be written: Not a directory"):
        segment("davis", out=Path("file"))


@pytest.mark.parametrize(
    "name, short_side, message",
    [
        ("test_vit", 72, "--short-side 72: must be a multiple of the backbone's patch of 16, as 64 or 80"),
        ("mixer_s32_224", 64, r"MlpMixer: cannot take images of 64 x 64 pixels \(.*\(224\)"),
        ("levit_128s", 64, r"Levit.*: cannot take images of 64 x 64 pixels \(The size of tensor"),
    ],
)
def test_networks_that_do_not_take_the_frames(name, short_side, message):
    pytest.importorskip("timm")
    write_clip(Path("davis"), two_squares())
    backbone = frozen.Backbone(name=name, device="cpu")
    with pytest.raises(UserError, match=message):
        segment_video.main(segment_video.Options(Path("davis"), backbone, short_side=short_side), World())
