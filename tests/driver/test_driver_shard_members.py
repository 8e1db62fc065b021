"""Members of a shard: none is lost or misread, whatever its name or kind; a broken shard is an error of one line."""

import random
import tarfile
from pathlib import Path

import pytest
from tars import link, picture, samples, write_tar

from driver.config import UserError
from driver.data.sources import Shards

FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
SHARD = Path("s.tar")


def found(shards: Shards) -> dict[str, list[int]]:
    """Grey levels of the images of each name."""
    levels: dict[str, list[int]] = {}
    for i in range(len(shards.labels)):
        levels.setdefault(shards.name(i).partition(":")[2], []).append(shards.read(i).getpixel((5, 5))[0])
    return levels


@pytest.mark.parametrize("format", FORMATS)
def test_images_by_any_name(format):
    names = ["a.png", "2021.05.01.png", "b.v2.png", "b.v1.PNG", "./c/d.png", "x.y/e.png", "f g.png", "ü.png", "-.png"]
    names += [f"{'folder/' * 12}{'n' * 90}.png"]
    names += [] if format == tarfile.USTAR_FORMAT else ["long" * 60 + ".png"]
    write_tar(SHARD, [(name, picture(10 * i)) for i, name in enumerate(names)], format)
    assert found(Shards(SHARD, 0.0)) == {name: [10 * i] for i, name in enumerate(names)}


def test_an_image_that_comes_twice_is_two_images():
    write_tar(Path("shards/0.tar"), [("a.png", picture(10)), ("b.png", picture(20)), ("a.png", picture(30))])
    write_tar(Path("shards/1.tar"), [("b.png", picture(40)), ("c.left.png", picture(50)), ("c.right.png", picture(60))])
    shards = Shards(Path("shards"), 0.0)
    levels = {"a.png": [10, 30], "b.png": [20, 40], "c.left.png": [50], "c.right.png": [60]}
    assert found(shards) == levels
    assert "4 images share their key with another of their shard (first: shards/0.tar:a.png); all" in shards.summary


def test_keys_that_begin_anew_in_each_shard_are_nothing_to_mention():
    for shard in "01":
        write_tar(Path(f"shards/{shard}.tar"), [("0.png", picture(10)), ("1.png", picture(20))])
    shards = Shards(Path("shards"), 0.0)
    assert len(shards.labels) == 4 and "key" not in shards.summary


def test_links_are_followed_within_the_shard():
    hard = tarfile.LNKTYPE
    write_tar(
        SHARD,
        [
            ("d/a.png", picture(10)),
            link("hard.png", "d/a.png", hard),
            link("./d/a.png", "d/a.png", hard),  # as tar writes a file that it was given twice
            link("hard2.png", "hard.png", hard),
            link("d/soft.png", "a.png"),
            link("soft2.png", "hard2.png"),
            link("up.png", "d/../d/./a.png"),
            link("chain.png", "d/soft.png"),
            link("chain2.png", "chain.png", hard),
            link("later.png", "z.png"),
            ("z.png", picture(20)),
            ("d/a.png", picture(30)),  # a hard link leads to what had the name before, a symbolic link to what has it
            (".store/blob", picture(40)),
            link("stored.png", ".store/blob"),
            link("none.png", "other-shard.png"),
            link("absolute.png", "/d/a.png"),
            link("round.png", "round2.png"),
            link("round2.png", "round.png"),
            link("self.png", "self.png"),
            link(".trash/x.png", "none.png"),
        ],
    )
    shards = Shards(SHARD, 0.0)
    assert found(shards) == {
        "d/a.png": [10, 30],
        "hard.png": [10],
        "hard2.png": [10],
        "soft2.png": [10],
        "d/soft.png": [30],
        "up.png": [30],
        "chain.png": [30],
        "chain2.png": [30],
        "later.png": [20],
        "z.png": [20],
        "stored.png": [40],
    }
    fault = (
        "left out: 2 hidden; 5 left out as a link to no file of its shard (first: s.tar:none.png -> other-shard.png)"
    )
    assert fault in shards.summary


def test_links_to_labels_are_followed():
    members = [*samples(2), ("x.png", picture(9)), link("x.cls", "001.cls"), ("y.png", picture(8))]
    write_tar(SHARD, [*members, link("y.cls", "000.cls", tarfile.LNKTYPE)])
    assert Shards(SHARD, 0.0).labels.tolist() == [0, 1, 1, 0]


def test_what_is_no_image():
    folder, pipe, sparse = (tarfile.TarInfo(name) for name in ("folder.png", "pipe.png", "sparse.png"))
    folder.type, pipe.type, sparse.type = tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE
    hidden = ["._a.png", "./__MACOSX/a.png", ".DS_Store", "b/.cache/a.png", "PaxHeaders.7/a.png", "@eaDir/a.png"]
    write_tar(SHARD, [("a.png", picture(10)), folder, pipe, sparse, *((name, picture(20)) for name in hidden)])
    shards = Shards(SHARD, 0.0)
    assert found(shards) == {"a.png": [10]}
    for remark in (
        "left out: 6 hidden",
        "1 left out as neither file nor folder (first: s.tar:pipe.png)",
        "1 left out as sparse (first: s.tar:sparse.png)",
    ):
        assert remark in shards.summary


def test_an_empty_image_is_an_unreadable_one():
    write_tar(SHARD, [("a.png", b""), ("b.png", picture(10))])
    shards = Shards(SHARD, 0.0)
    assert shards.name(0) == "s.tar:a.png"
    with pytest.raises(OSError):
        shards.read(0)
    assert shards.read(1).getpixel((0, 0)) == (10, 10, 10)


def test_names_that_are_not_utf8_can_be_printed():
    write_tar(SHARD, [("a\udcff\n.png", picture(10)), link("b\udcff.png", "c\udcff")])
    shards = Shards(SHARD, 0.0)
    assert shards.name(0) == r"s.tar:a\udcff\n.png"
    assert r"(first: s.tar:b\udcff.png -> c\udcff)" in shards.summary
    write_tar(SHARD, [("a\udcff\n.png", picture(10)), ("a\udcff\n.cls", b"")])
    with pytest.raises(UserError, match=r"^s.tar:a\\udcff\\n.cls: a label must"):
        Shards(SHARD, 0.0)


def test_archives_one_after_another_are_read_to_the_end():
    for i in range(3):
        write_tar(Path(f"{i}.tar"), samples(2, first=2 * i))
    SHARD.write_bytes(b"".join(Path(f"{i}.tar").read_bytes() for i in range(3)))
    assert len(found(Shards(SHARD, 0.0))) == 6


def test_a_shard_without_an_end_mark_is_named():
    write_tar(SHARD, samples(2))
    SHARD.write_bytes(SHARD.read_bytes().rstrip(b"\0").ljust(4 * 1024, b"\0")[: 4 * 1024])
    assert "1 without an end mark, as a shard that was cut (first: s.tar)" in Shards(SHARD, 0.0).summary


def offsets() -> list[int]:
    """Offsets of the headers of the shard."""
    with tarfile.open(SHARD) as tar:
        return [member.offset for member in tar]


def with_size(shard: bytes, offset: int, size: bytes, kind: bytes = b"0") -> bytes:
    """The shard, with this size and type in a header whose checksum is right again."""
    header = bytearray(shard[offset : offset + 512])
    header[124:136], header[156:157], header[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return shard[:offset] + bytes(header) + shard[offset + 512 :]


@pytest.mark.parametrize(
    "size, kind, wrong",
    [
        (b"\xff" * 10 + b"\xfe\x00", b"0", "has -512 bytes from byte 2,560"),  # the header would be read for ever
        (b"\x80" + bytes(6) + b"\x10" + bytes(4), b"0", "has 68,719,476,736 bytes from byte 2,560 on"),
        (b"\x80" + b"\x7f" * 11, b"0", "has 154,"),
        (b"\x80" + bytes(6) + b"\x10" + bytes(4), b"L", "a name or attributes of 68,719,476,736 bytes"),
        (b"\x80" + bytes(6) + b"\x10" + bytes(4), b"x", "a name or attributes of 68,719,476,736 bytes"),
        (b"\xff" * 12, b"L", "a name or attributes of -1 bytes"),
        (b"zzz", b"0", "a broken header at byte 2,048"),
    ],
)
def test_absurd_sizes(size, kind, wrong):
    write_tar(SHARD, samples(4))
    assert 2048 in offsets()
    SHARD.write_bytes(with_size(SHARD.read_bytes(), 2048, size, kind))
    with pytest.raises(UserError) as error:
        Shards(SHARD, 0.0)
    assert str(error.value).startswith("s.tar: not a readable shard, an uncompressed .tar (")
    assert wrong in str(error.value)


def test_a_broken_header_loses_no_members_silently():
    """tarfile alone would end there as if the shard were at its end."""
    write_tar(SHARD, samples(4))
    whole = SHARD.read_bytes()
    for offset in offsets()[1:]:
        SHARD.write_bytes(whole[: offset + 3] + b"?" + whole[offset + 4 :])
        with pytest.raises(UserError, match=f"s.tar: not a readable shard.*a broken header at byte {offset:,}"):
            Shards(SHARD, 0.0)
    SHARD.write_bytes(whole.rstrip(b"\0").ljust(len(whole), b"\0") + b"no archive".ljust(512))
    with pytest.raises(UserError, match=f"s.tar: not a readable shard.*a broken header at byte {len(whole):,}"):
        Shards(SHARD, 0.0)


@pytest.mark.parametrize("format", FORMATS[:2])
def test_damaged_bytes_give_an_error_of_one_line_or_a_shard(format):
    members = [*samples(4), ("n" * 150 + ".png", picture(50)), link("x.png", "000.png"), ("é" * 70 + ".png", b"")]
    write_tar(SHARD, members, format)
    whole, rng, errors = SHARD.read_bytes(), random.Random(0), 0
    heads = [offset for offset in range(0, len(whole), 512) if whole[offset + 257 : offset + 262] == b"ustar"]
    for _ in range(150):
        offset, size = rng.choice(heads), rng.choice([b"", b"-1", b"\xff" * 12, b"7" * 11, b"\x80" + b"\x01" * 11])
        shard = bytearray(with_size(whole, offset, size, rng.choice([b"0", b"1", b"2", b"L", b"x", b"g", b"S", b"?"])))
        if rng.random() < 0.5:
            shard[offset + rng.randrange(512)] = rng.randrange(256)
        SHARD.write_bytes(shard[: rng.randrange(512, len(shard))] if rng.random() < 0.2 else shard)
        try:
            shards = Shards(SHARD, 0.0)
        except UserError as error:
            errors += 1
            assert "s.tar" in str(error) and "\n" not in str(error)
        else:
            assert all("\n" not in shards.name(i) for i in range(len(shards.labels)))
    assert errors > 50
