"""Shards whose headers were written to do harm: one clear line each, at once, and never more bytes than there are."""

from pathlib import Path

import pytest
from tars import attributes, header, link, padded, picture, write_tar

from driver.config import UserError
from driver.data import archive, decode, shard_labels
from driver.data.shards import Shards

SHARD = Path("s.tar")
SIZE = b"%011o" % len(picture(10))
CONTENT = padded(picture(10))
FIRST = header(b"ok.png", SIZE) + CONTENT
SPARSE = {"GNU__sparse__major": b"1", "GNU__sparse__minor": b"0", "GNU__sparse__realsize": b"10"}


def binary(size: int) -> bytes:
    """GNU's field for large numbers, of base 256."""
    return b"\x80" + size.to_bytes(11, "big")


def opened(content: bytes) -> Shards:
    SHARD.write_bytes(content + bytes(1024))
    return Shards(SHARD, 0.0)


REFUSED = {
    "a terabyte": (
        header(size=binary(10**12)),
        "x.png has 1,000,000,000,000 bytes from byte 1,536 on, the shard ends at",
    ),
    "8 GB in octal": (header(size=b"77777777777\0"), "x.png has 8,589,934,591 bytes from byte 1,536 on"),
    "8 GB, spaces": (header(size=b"77777777000 "), "x.png has 8,589,934,080 bytes from byte 1,536 on"),
    "negative": (header(size=b"\xff" * 12), "x.png has -1 bytes from byte 1,536 on"),
    "negative octal": (header(size=b"-0000000010\0"), "x.png has -8 bytes from byte 1,536 on"),
    "pax -1": (attributes(size=b"-1") + header(size=SIZE), "x.png has -1 bytes from byte 2,560 on"),
    "pax -512": (attributes(size=b"-512") + header(size=SIZE), "x.png has -512 bytes from byte 2,560 on"),
    "pax 10**30": (
        attributes(size=b"1" + b"0" * 30) + header(size=SIZE),
        "has 1,000,000,000,000,000,000,000,000,000,000 b",
    ),
    "pax 5000 digits": (attributes(size=b"9" * 5000) + header(size=SIZE), "a broken header at byte"),
    "sparse, 10**30": (
        attributes(size=b"1" + b"0" * 30, GNU__sparse__map=b"0,1") + header(size=SIZE),
        "offset-sized integer",
    ),
    "no file, 10**30": (attributes(size=b"1" + b"0" * 30) + header(size=SIZE, kind=b"Z"), "offset-sized integer"),
    "pax nan": (attributes(size=b"nan") + header(size=SIZE), "a broken header at byte"),
    "pax of all, -1": (attributes(b"g", size=b"-1") + header(size=SIZE), "x.png has -1 bytes from byte 2,560 on"),
    "pax of all, 10**30": (
        attributes(b"g", size=b"1" + b"0" * 30) + header(size=SIZE),
        "has 1,000,000,000,000,000,000",
    ),
    "path of 2 MB": (attributes(path=b"a" * 2_000_000) + header(size=SIZE), "a name or attributes of 2,000,014 bytes"),
    "5000 headers": (attributes(comment=b"a") * 5000 + header(size=SIZE), "hundreds of headers of one member"),
    "sparse map": (
        attributes(**SPARSE) + header(size=SIZE) + padded(b"9999999999\n0\n1\n"),
        "invalid literal for int()",
    ),
    "sparse map, long": (attributes(**SPARSE) + header(size=b"%011o" % 512_000) + b"9" * 512_000, "not enough values"),
    "old sparse": (header(size=SIZE, kind=b"S")[:386] + b"\xff" * 126, "a broken header at byte 1,024"),
    "a label of 1 GB": (
        header(b"ok.cls", b"%011o" % (1 << 30)) + b"7" * 512,
        "ok.cls has 1,073,741,824 bytes from byte",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_absurd_headers_are_refused_when_the_shard_is_listed(name):
    content, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        opened(FIRST + content + CONTENT)
    said = str(error.value)
    assert said.startswith("s.tar: not a readable shard, an uncompressed .tar (") and words in said
    assert "\n" not in said and len(said) < 450


LEFT_OUT = {
    "sparse, 10**30 bytes": (
        attributes(GNU__sparse__size=b"9" * 30, GNU__sparse__map=b"0," + b"9" * 30) + header(size=SIZE) + CONTENT,
        "1 left out as sparse (first: s.tar:x.png)",
    ),
    "link to itself": (
        header(b"l.png", b"0", b"2", b"l.png"),
        "link to no file of its shard (first: s.tar:l.png -> l.png)",
    ),
    "hard link to itself": (header(b"l.png", b"0", b"1", b"l.png"), "(first: s.tar:l.png -> l.png)"),
    "label that is itself": (header(b"ok.cls", b"0", b"2", b"ok.cls"), "(first: s.tar:ok.cls -> ok.cls)"),
    "label to nothing": (header(b"ok.cls", b"0", b"2", b"no"), "(first: s.tar:ok.cls -> no)"),
    "label to a folder": (
        header(b"d/", b"0", b"5") + header(b"ok.cls", b"0", b"2", b"d"),
        "(first: s.tar:ok.cls -> d)",
    ),
    "pipe of a terabyte": (
        header(b"p.png", binary(10**12), b"6"),
        "1 left out as neither file nor folder (first: s.tar:p.png)",
    ),
    "odd ending": (
        attributes(path=b"a.\x1b[31m" + b"x" * 2000) + header(size=SIZE) + CONTENT,
        r"left out: 1 .\x1b[31mxxxxx",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_named_on_a_short_line(name):
    content, words = LEFT_OUT[name]
    shards = opened(FIRST + content)
    assert len(shards.labels) == 1 and words in shards.summary
    assert shards.summary.isprintable() and len(shards.summary) < 400


def test_a_label_that_is_a_link_to_an_image_is_no_label():
    with pytest.raises(UserError, match=r"^s.tar:ok.cls: a label must be an integer or the name .* got b'\\x89PNG"):
        opened(FIRST + header(b"ok.cls", b"0", b"2", b"ok.png"))


def test_sizes_of_links_and_folders_mean_nothing():
    shards = opened(FIRST + header(b"l.png", binary(10**12), b"1", b"ok.png") + header(b"d/", binary(10**12), b"5"))
    assert [shards.read(i).getpixel((5, 5)) for i in range(len(shards.labels))] == [(10, 10, 10)] * 2


@pytest.mark.parametrize("kind", [b"1", b"2"], ids=["hard", "symbolic"])
def test_a_chain_of_links_is_followed_once(kind, monkeypatch):
    """Each of 2,000 links leads to the next. Following every link to the end by itself takes 2 million steps."""
    steps, target = [], archive._target
    monkeypatch.setattr(archive, "_target", lambda info: steps.append(0) or target(info))
    write_tar(SHARD, [*(link(f"{i}.png", f"{i + 1}.png", kind) for i in range(2000)), ("2000.png", picture(10))])
    shards = Shards(SHARD, 0.0)
    assert len(shards.labels) == 2001 and len(steps) <= 4000
    assert shards.read(7).getpixel((5, 5)) == shards.read(1999).getpixel((5, 5)) == (10, 10, 10)


def test_chains_that_meet_and_go_round():
    """`in` leads into a circle, from where nothing is reached; `to` and `on` meet before their end."""
    chain = {"in": "a", "a": "b", "b": "c", "c": "a", "to": "mid", "on": "mid", "mid": "x", "out": "gone"}
    write_tar(SHARD, [*(link(f"{name}.png", f"{end}.png") for name, end in chain.items()), ("x.png", picture(10))])
    shards = Shards(SHARD, 0.0)
    assert [shards.name(i) for i in range(4)] == ["s.tar:mid.png", "s.tar:on.png", "s.tar:to.png", "s.tar:x.png"]
    assert "5 left out as a link to no file of its shard (first: s.tar:in.png -> a.png)" in shards.summary


def test_an_image_of_gigabytes_is_unreadable_and_not_read(monkeypatch):
    """A file of holes takes no room on the disk. One image is at fault, not the shard."""
    with SHARD.open("wb") as file:
        file.write(FIRST + header(b"x.png", binary(5 << 30)))
        file.truncate(file.tell() + (5 << 30) + 1024)
    shards = Shards(SHARD, 0.0)
    monkeypatch.setattr(decode.Decoder, "__call__", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"a file of 5,368,709,120 bytes, above the limit of 4,294,967,296"):
        shards.read(1)


def test_a_name_of_a_megabyte_is_cut_in_messages():
    shards = opened(FIRST + attributes(path=b"a" * 1_000_000 + b".png") + header(size=SIZE) + CONTENT)
    names = sorted((shards.name(i) for i in range(2)), key=len)
    assert names[0] == "s.tar:ok.png" and names[1].startswith("s.tar:aaaaa") and len(names[1]) < 400
    assert all(shards.read(i).getpixel((5, 5)) == (10, 10, 10) for i in range(2))


def test_a_name_of_many_dots_is_compared_once_with_a_label():
    """An image's label may have its name up to any dot. Trying every dot of a name with a million takes minutes."""
    met = []

    class Counted(dict):
        def __contains__(self, key: object) -> bool:
            met.append(key)
            return super().__contains__(key)

    assert shard_labels._key("a" + "." * 1000 + ".png", Counted(a=[]), [1]) == "a" == "".join(met)


@pytest.mark.parametrize("path, name", [(b"a\0b.png", r"s.tar:a\x00b.png"), (b"a\nb.png", r"s.tar:a\nb.png")])
def test_names_with_odd_characters_are_read_and_shown_on_one_line(path, name):
    shards = opened(attributes(path=path) + header(size=SIZE) + CONTENT)
    assert shards.name(0) == name and shards.read(0).getpixel((5, 5)) == (10, 10, 10)
