"""Files of weights that were made to do harm: none runs code, takes memory or leads elsewhere; each is one error."""

import itertools
import json
import os
import re
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from driver_runs import elsewhere  # noqa: F401

from driver import backbones, weights
from driver.config import Model, UserError
from driver.weights import exports, unpickling

START = b"\x80\x02"
TOUCH = b"X\x0e\x00\x00\x00touch intruded"
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
"""Operations that load the storage data/0 of two floats, within a tuple that is open."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name: str, *arguments: bytes) -> bytes:
    """Operations that import a function by name and call it."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(arguments) + b"tR"


def under(key: str, value: bytes) -> bytes:
    """A dictionary with one entry."""
    return b"}" + text(key) + value + b"s"


def tensor(sizes: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    """A tensor of this shape over a storage of two floats."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + STORAGE + offset + sizes + strides + b"\x89}tR"


def built(state: bytes, name: str = "own.Thing") -> bytes:
    """An object of a class that is unknown, whose state is set."""
    return call(name) + state + b"b"


def bomb(levels: int) -> bytes:
    """Dictionaries that hold each other twice: each level doubles what a walk would meet."""
    content = b"}q\x00"
    for level in range(levels):
        content += b"}" + b"".join(text(key) + b"h" + bytes([level]) + b"s" for key in "ab") + b"q" + bytes([level + 1])
    return content


GIBI = b"J\x00\x00\x00\x40"
"""Operation that gives the number 2**30."""
HUGE = struct.pack("<Q", 1 << 42)
RUNS_CODE = "not read, since reading it would run code of the file: it holds objects of "
NOTHING = "no backbone in it: it holds no tensors with names"
"""Error of a file whose objects have stand-ins: nothing is called, and nothing is left."""
ENDLESS = "its dictionaries are nested more than 100 deep or have more than 1,000,000 parts"
STACKED = call("torch._tensor._rebuild_from_type_v2", b"cposix\nsystem\n", b"cown\nThing\n", b"(t}")
OVERSHADOWED = call(
    "torch._tensor._rebuild_from_type_v2",
    b"ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n",
    b"(" + STORAGE[1:] + b"K\x00K\x02\x85K\x01\x85\x89}t",
    under("isfinite", b"K\x01"),
)
EMPTIED = (
    b"ccollections\nOrderedDict\n)R" + b"}" + b"".join(text(n) + b"K\x01s" for n in ("get", "keys", "items")) + b"b"
)
PICKLES = {
    "os.system": (call("posix.system", TOUCH), RUNS_CODE + "posix.system"),
    "os.system by another name": (call("os.system", TOUCH), RUNS_CODE + "os.system"),
    "a path through a module": (call("torch.serialization.os.system", TOUCH), NOTHING),
    "eval": (call("builtins.eval", text("open('intruded', 'w')")), NOTHING),
    "a file of Python 2": (call("__builtin__.execfile", TOUCH), NOTHING),
    "a process": (call("subprocess.Popen", TOUCH), NOTHING),
    "a hub": (call("torch.hub.load", text("own/repository"), text("model")), NOTHING),
    "another checkpoint": (call("torch.serialization.load", text("other.pt")), NOTHING),
    "nested calls": (call("builtins.getattr", call("builtins.__import__", text("os")), text("system")), NOTHING),
    "a rebuilt type": (STACKED, RUNS_CODE + "posix.system"),
    "a name from pieces": (text("os") + text("system") + b"\x93(" + TOUCH + b"tR", "Unsupported operand 147"),
    "an instance": (b"(" + TOUCH + b"iposix\nsystem\n", "Unsupported operand 105"),
    "an object": (b"(cposix\nsystem\n" + TOUCH + b"o", RUNS_CODE + "posix.system"),
    "an extension": (b"\x82\x01", "Unsupported operand 130"),
    "attributes named as methods": (built(under("tensors", b"cbuiltins\neval\n")), NOTHING),
    "buffers that are a number": (built(under("_buffers", b"K\x05")), NOTHING),
    "a dictionary without methods": (b"ccollections\nOrderedDict\n)R" + under("items", b"K\x01") + b"b", NOTHING),
    "attributes without methods": (built(EMPTIED), NOTHING),
    "parts without methods": (built(under("_parameters", EMPTIED)), NOTHING),
    "a name that holds itself": (b"}" + b")" + b"\x85" * 2000 + b"}s", NOTHING),
    "a storage by number": (b"K\x05Q", "saved_id must be a tuple, got int"),
    "a storage by text": (text("storage") + b"Q", "persistent_load id must be tuple or int"),
    "a storage of no kind": (b"(" + text("storage") + b"K\x01K\x01K\x01K\x01tQ", "not a readable checkpoint"),
    "an object by number": (b"(" + text("module") + b"K\x01tQ", "Only persistent_load of storage is allowed"),
    "a storage that is larger": (under("a", tensor(GIBI + b"\x85", b"K\x01\x85")), "Trying to resize storage"),
    "a view that is larger": (under("a", tensor(GIBI + b"\x85", b"K\x00\x85")), "claim 4,294,967,296 bytes up to a"),
    "a place outside": (under("a", tensor(b"K\x02\x85", b"K\x01\x85", GIBI)), "Trying to resize storage"),
    "memory of no file": (under("a", call("torch.FloatTensor", GIBI)), "claim 4,294,967,296 bytes up to a"),
    "doubled dictionaries": (bomb(60), ENDLESS),
    "deep dictionaries": ((b"}" + text("a")) * 5000 + b"N" + b"s" * 5000, ENDLESS),
    "a dictionary in itself": (b"}q\x00" + text("a") + b"h\x00s", ENDLESS),
    "a long number": (b"\x8b\xff\xff\xff\x7f", "Unsupported operand 139"),
    "a frame of terabytes": (b"\x95" + HUGE, "Unsupported operand 149"),
    "text of terabytes": (b"\x8d" + HUGE, "Unsupported operand 141"),
    "text of gigabytes": (b"X\xff\xff\xff\xff", "not a readable checkpoint"),
    "no start of a tuple": (b"tR", "not a readable checkpoint"),
    "an empty stack": (b"00s", "Unsupported operand 48"),
    "a memo that is not there": (b"h\x09", "not a readable checkpoint"),
}


def write(content: bytes, path: Path = Path("weights.pt"), **options) -> Path:
    """Write a checkpoint whose data.pkl is given, with one storage of two floats."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", struct.pack("<ff", 1, 2))
        archive.writestr("archive/version", "3\n")
    return path


def refused(path: Path) -> str:
    """Message of the one error that a file gives. Warnings are errors, and memory above 4 GB is an error."""
    backbone = backbones.make(Model(name="convnet", width=4), 1, 8)
    with pytest.raises(UserError) as error, warnings.catch_warnings(action="error"):
        weights.load_backbone(backbone, path)
    assert not Path("intruded").exists() and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def little_memory():
    """Address space for 4 GB more than this process has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_would_do_harm(name, little_memory, monkeypatch):
    """torch's advice to read the file in another way is not shown; of ours, what it does comes first."""
    called = []
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *_: called.append(1))
    monkeypatch.setattr(unpickling, "PARTS", 10**5)  # the error is the same, ten times earlier
    content, words = PICKLES[name]
    said = refused(write(START + content + b"."))
    assert re.search(words.replace("1,000,000", "100,000"), said) and not called
    assert ("weights_only" in said) == said.startswith(f"weights.pt: {RUNS_CODE}")
    assert "Re-running" not in said and "safe_globals" not in said


def test_a_tensor_whose_methods_a_pickle_replaces():
    """Tensors that are read have no attributes that the file gave them."""
    assert weights.read(write(START + under("a", OVERSHADOWED) + b"."))["a"].isfinite().tolist() == [True, True]


# Archives


def test_what_looks_like_an_attack_and_is_none(monkeypatch):
    """Masks that are expanded from one value, and many parts in a file with as many bytes."""
    monkeypatch.setattr(unpickling, "PARTS", 1000)
    content = {"mask": torch.zeros(1, 1).expand(400, 500), "losses": dict.fromkeys(range(2000), 0.5)}
    torch.save(content, "weights.pt")
    assert Path("weights.pt").stat().st_size < content["mask"].numel() * 4
    found = weights.read(Path("weights.pt"))
    assert found["mask"].shape == (400, 500) and found["losses"] == content["losses"]


@pytest.mark.parametrize("place", range(3))
def test_views_that_are_small_each(place):
    """Expanded masks of 100 MB each: two may be in a small file, and a third may not, in any place."""
    content = {str(number): torch.zeros(1).expand(25_000_000) for number in range(3)}
    content[str(place)] = torch.zeros(1)
    torch.save(content, "weights.pt")
    assert len(weights.read(Path("weights.pt"))) == 3
    content[str(place)] = torch.zeros(1).expand(25_000_000)
    torch.save(content, "weights.pt")
    with pytest.raises(UserError, match=r"its tensors claim 300,0.* bytes up to 2, the file has"):
        weights.read(Path("weights.pt"))


def test_a_compressed_member(little_memory):
    """A few compressed bytes may unpack to very many."""
    with zipfile.ZipFile("weights.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", START + under("a", tensor(b"K\x02\x85", b"K\x01\x85")) + b".")
        with archive.open("archive/data/0", "w") as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
    assert Path("weights.pt").stat().st_size < 100_000
    assert "its member data.pkl is compressed" in refused(Path("weights.pt"))


@pytest.mark.parametrize("place", [20, 24])
def test_a_member_that_claims_more_than_the_file(place, little_memory):
    """Sizes in the directory of the archive are changed; a change of either alone would count as compression."""
    path = write(START + b"}.")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 20 : entry + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    path.write_bytes(content)
    assert "its members claim 3,221,225," in refused(path)
    content[entry + place : entry + place + 4] = struct.pack("<I", 8)
    path.write_bytes(content)
    assert "its member data/0 is compressed" in refused(path)


def test_two_members_of_one_name():
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile("weights.pt", "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", START + b"}.")
    assert "it has several members data.pkl" in refused(Path("weights.pt"))


def test_names_that_torch_would_compare_for_minutes():
    """torch compares each name in a pickle with all others: 200,000 names, in 3 MB, would take hours."""
    names = b"".join(b"cown\nThing%d\n" % number for number in range(201))
    assert refused(write(START + b"(" + names + b"t.")).startswith("weights.pt: not a checkpoint: it names 201 f")


def test_names_in_a_file_neither_command_the_terminal_nor_fill_it(capsys):
    """Three kinds of names reach a message: a refused class, a missing storage, and tensors that are left out."""
    for state in (b"\x8c\x01a\x93", under("a", tensor(b"K\x02\x85", b"K\x01\x85").replace(b"\x000", b"\x00\x1b"))):
        said = refused(write(START + call("own.\x1b]0;" + "x" * 9999) + state + b"."))
        assert said.isprintable() and len(said) < 1500
    backbone = backbones.make(Model(name="convnet", width=4), 1, 8)
    torch.save({"state_dict": backbone.state_dict() | {"\x1b]0;x": torch.ones(1)}}, "more.pt")
    weights.load_backbone(backbone, Path("more.pt"))
    out = capsys.readouterr().out
    assert "left out" in out and out.removesuffix("\n").isprintable()


# Safetensors


def safetensors(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


UNREADABLE = "not a readable safetensors file"
TWIN = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    "content, words",
    [
        (safetensors({"a": entry(0, 1 << 40)}), UNREADABLE),
        (safetensors({"a": entry(0, 1 << 40, (1 << 38,))}), UNREADABLE),
        (safetensors({"a": entry(0, 8, (1 << 62, 1 << 62))}), UNREADABLE),
        (safetensors({"a": entry(4, 8, (1,)), "b": entry(0, 8)}), UNREADABLE),
        (safetensors({"a": entry(), "b": entry()}), UNREADABLE),
        (safetensors({"a": entry(8, 0)}), UNREADABLE),
        (safetensors({"a": entry(-8, 0)}), UNREADABLE),
        (safetensors({"a": entry(shape=[-2])}), UNREADABLE),
        (safetensors({"a": entry(shape="2")}), UNREADABLE),
        (safetensors({"a": entry(dtype="F33")}), UNREADABLE),
        (safetensors({"a": entry(dtype=None)}), UNREADABLE),
        (safetensors({"a": [1]}), UNREADABLE),
        (safetensors({"a": entry()}, bytes(80)), UNREADABLE),
        (safetensors({"__metadata__": [1], "a": entry()}), "damaged in its header"),
        (safetensors({"__metadata__": {"format": 3}, "a": entry()}), UNREADABLE),
        (safetensors(TWIN), "damaged in its header .a name occurs twice"),
        (safetensors(b"{" + b"[" * 10000), "damaged in its header"),
        (safetensors(b'{"a":' * 10000 + b"1" + b"}" * 10000), "damaged in its header"),
        (safetensors(b'{"a\xff": 1}'), "damaged in its header"),
        (safetensors({"a": entry()}, length=10**8 - 1), "not whole: it ends within its header"),
        (safetensors({"a": entry()}, length=2**63), "neither a checkpoint of PyTorch nor safetensors"),
        (safetensors({"__metadata__": {exports.ORIGIN: "no JSON"}}, b""), "its bam_kernels.model is not JSON"),
        (safetensors({"__metadata__": {exports.ORIGIN: "[" * 9999}}, b""), "its bam_kernels.model is not JSON"),
        (safetensors({"__metadata__": {exports.ORIGIN: "[1]"}}, b""), "its bam_kernels.model must be a JSON object"),
        (
            safetensors({"__metadata__": {exports.DIGEST: "0" * 64}, "a": entry()}),
            "damaged: its bytes do not have the checksum",
        ),
        (
            safetensors({"__metadata__": {exports.DIGEST: "0"}, "a": entry()}),
            "damaged: its bytes do not have the checksum",
        ),
    ],
    ids=itertools.count(),
)
def test_safetensors_that_claim_what_they_have_not(content, words, little_memory):
    pytest.importorskip("safetensors")
    path = Path("weights.safetensors")
    path.write_bytes(content)
    assert re.match(rf"weights.safetensors: {words}", refused(path))


# Lists of files, and what is no file


@pytest.mark.parametrize(
    "name", ["../secret.pt", "a/../../secret.pt", "/etc/passwd", "x.index.json", "../x.index.json"]
)
def test_an_index_that_leads_elsewhere(name):
    folder = Path("hub")
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, "secret.pt")
    (folder / "x.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert re.search(r"x.index.json: names .*own folder", refused(folder / "x.index.json"))


@pytest.mark.parametrize(
    "name, words", [(".", "hub: not a file"), ("sub", "hub/sub: not a file"), ("\0", "cannot be read")]
)
def test_an_index_of_what_is_no_file(name, words):
    """An index in a folder could name the first index again, without end."""
    Path("hub/sub").mkdir(parents=True)
    for folder in (Path("hub"), Path("hub/sub")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert words in refused(Path("hub"))


@pytest.mark.parametrize(
    "content", ["[" * 10000, '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 1}}', "{"]
)
def test_an_index_that_is_none(content):
    Path("x.index.json").write_text(content)
    assert "x.index.json: not an index of files of weights (" in refused(Path("x.index.json"))


def test_a_pipe():
    """Opening a pipe would wait without end."""
    os.mkfifo("weights.pt")
    assert refused(Path("weights.pt")) == "weights.pt: not a file"


def test_the_printed_command_holds_any_name():
    """The command is typed into a shell, and the path in it is within text of Python."""
    path = Path("a'b\"$(touch intruded)\\.pt")
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    command = refused(path).partition("weights.pth: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=False, capture_output=True)
    assert weights.read(Path("weights.pth")).keys() == {"weight", "bias"} and not Path("intruded").exists()
