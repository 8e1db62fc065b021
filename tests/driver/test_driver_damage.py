"""Damaged checkpoints and exports: every changed bit and every lost end is refused, with the way back."""

import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from driver_runs import pretrain

from driver import checkpoint, cli, export, linear, report, train, weights
from driver.config import UserError
from driver.evaluation.frozen import Backbone
from driver.verify_resume import same
from driver.weights import checksums, exports, unpickling

NAME = Path("weights.pt")
TENSORS = {f"t{i}": torch.arange(5.0 + i) for i in range(50)}


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Change one bit in a file, under all of its names, as a disk does."""
    with path.open("r+b") as file:
        file.seek(place)
        found = file.read(1)[0]
        file.seek(place)
        file.write(bytes([found ^ 1 << bit]))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        weights.read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def members(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and the byte after the last, of the content of each member of a checkpoint."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            first = member.header_offset + 30 + name + extra
            places[member.filename.partition("/")[2]] = first, first + member.file_size
    return places


# Checkpoints


def test_a_whole_checkpoint_is_read():
    """A checkpoint with a checksum is read by torch alone and by a reader of zip archives, too."""
    weights.save(TENSORS | {"epoch": 3}, NAME)
    for content in (weights.read(NAME), *(torch.load(NAME, mmap=mmap, weights_only=True) for mmap in (True, False))):
        assert same(content, TENSORS | {"epoch": 3})
    with zipfile.ZipFile(NAME) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"bam_kernels.blake2b:")


@pytest.mark.parametrize("own", [True, False], ids=["own", "of torch alone"])
def test_one_bit_in_each_member(own):
    """A bit is changed at the start, in the middle and at the end of 50 tensors and of all other members."""
    weights.save(TENSORS, NAME) if own else torch.save(TENSORS, NAME)
    whole, places = NAME.read_bytes(), members(NAME)
    assert len(places) >= 55 and sum(name.startswith("data/") for name in places) == 50
    for name, (first, end) in places.items():
        for place in {first, (first + end) // 2, end - 1}:
            NAME.write_bytes(whole)
            flip(NAME, place, place % 8)
            assert f"weights.pt: damaged in its member {name} (Bad CRC-32" in refused(NAME)


def test_one_bit_anywhere():
    """Headers, padding, directory, end records and comment of a small checkpoint: every byte."""
    weights.save({"a": torch.ones(2), "epoch": 3}, NAME)
    whole, inside = NAME.read_bytes(), members(NAME).values()
    outside = [place for place in range(len(whole)) if not any(first <= place < end for first, end in inside)]
    assert len(outside) > len(whole) // 2
    for place in outside:
        NAME.write_bytes(whole)
        flip(NAME, place, place % 8)
        assert refused(NAME).startswith("weights.pt: ")


def test_padding_is_named():
    """No member's checksum covers the padding between members."""
    weights.save({"a": torch.ones(2)}, NAME)
    flip(NAME, members(NAME)["data/0"][0] - 1)
    assert "weights.pt: damaged outside of its members, in headers, padding or directory" in refused(NAME)


def test_a_checkpoint_that_is_cut_short():
    weights.save({"a": torch.ones(2), "epoch": 3}, NAME)
    whole = NAME.read_bytes()
    last = len(whole) - 107  # the end record and the comment, of which every byte is tried
    for size in (*range(0, last, 5), *range(last, len(whole))):
        NAME.write_bytes(whole[:size])
        assert "not whole" in (said := refused(NAME)) or size < 4 or size >= last, said
    NAME.write_bytes(whole + b"\0")
    assert "damaged at its end" in refused(NAME)


def test_the_members_are_looked_at_only_where_the_checksum_is_wrong(monkeypatch):
    weights.save(TENSORS, NAME)
    monkeypatch.setattr(checksums, "_fault_of_members", lambda *_: pytest.fail("read twice"))
    assert same(weights.read(NAME), TENSORS)


def test_checkpoints_without_checksums():
    """torch's option writes zeros; the format before PyTorch 1.6 has none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, NAME)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(weights.read(NAME), TENSORS)
    torch.save(TENSORS, NAME, _use_new_zipfile_serialization=False)
    assert same(weights.read(NAME), TENSORS)


# The way back


@pytest.fixture
def run() -> Path:
    """Run of three epochs: checkpoint.pt is also step 6 and epoch 3; step 4 is also epoch 2."""
    options = ["--optim.epochs=3", "--run.eval-every=0", "--run.save-every=1", "--run.keep-last=2"]
    return pretrain(*options, "--run.keep-every=1")


def resume(path: Path) -> Path:
    return train.pretrain(cli.parse([f"--run.resume={path}", "--optim.epochs=4"]))


def damage(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def test_the_way_back_from_a_checkpoint_with_other_names(run):
    """Neither step-000000006.pt nor epoch-0003.pt are other files."""
    assert (run / checkpoint.FILE).samefile(run / "step-000000006.pt")
    damage(run / checkpoint.FILE)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=r"checkpoint.pt: damaged .*: --run.resume (\S*) goes back to it$") as error:
        resume(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    back = Path(str(error.value).split("--run.resume ")[1].split()[0])
    assert back.samefile(run / "step-000000004.pt")
    assert torch.load(resume(back) / checkpoint.FILE, weights_only=True)["epoch"] == 4


def test_the_way_back_leads_past_damaged_ones(run):
    """The newest whole checkpoint is named; one that was cut short is not whole either."""
    for path in (run / checkpoint.FILE, run / "epoch-0002.pt"):
        damage(path)
    os.utime(run / "epoch-0001.pt", (1, 1))
    shutil.copy(run / "epoch-0001.pt", run / "epoch-0009.pt")
    (run / "epoch-0009.pt").write_bytes((run / "epoch-0009.pt").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"is whole is runs/digits-001/epoch-0001.pt: --run.resume runs/digits-001/epo"):
        resume(run)
    damage(run / "epoch-0001.pt")
    with pytest.raises(
        UserError,
        match=r"epoch-0001.pt: damaged .*no other checkpoint of this run is whole; download or copy it again$",
    ):
        resume(run / "epoch-0001.pt")


@pytest.mark.parametrize(
    "read",
    [
        lambda run: export.export(export.Export(run)),
        lambda run: Backbone(run=run).load(),
        lambda run: report.main(report.Report(run), train.World()),
        lambda run: pretrain(f"--model.weights={run}"),
        lambda run: pretrain(f"--model.weights={run / 'checkpoint.pt'}"),
    ],
    ids=["export", "evaluation", "report", "weights of a run", "weights of a file"],
)
@pytest.mark.parametrize("spoil", [damage, lambda path: path.write_bytes(b"")], ids=["bit", "empty"])
def test_all_readers_refuse_a_damaged_checkpoint(read, spoil, run):
    spoil(run / checkpoint.FILE)
    files = sorted(run.iterdir())
    with pytest.raises(UserError, match=r"checkpoint.pt: .*that is whole is runs/digits-001/\w*-0*\d.pt: --run.resume"):
        read(run)
    assert sorted(run.iterdir()) == files


def test_layers_of_linear_evaluation():
    heads = linear.Heads(2, 2, 1, False, train.World())
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    options = linear.Options(out=Path())
    linear.write(Path(), {"epoch": 1}, {"heads": heads, "optimizer": optimizer}, {})
    assert linear.load(options, heads, optimizer, {}) == 1
    damage(Path(linear.LAYERS))
    with pytest.raises(UserError, match=r"^linear.pt: damaged .*copy it again$"):
        linear.load(options, heads, optimizer, {})


# Exports


def test_one_bit_anywhere_in_an_export():
    pytest.importorskip("safetensors")
    path = Path("backbone.safetensors")
    exports.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, {"name": "x"}, path, "--out")
    assert weights.read(path).keys() == {"a", "b", "config"}
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place, place % 8)
        assert refused(path).startswith("backbone.safetensors: ")
        path.write_bytes(whole[:place])
        assert refused(path).startswith("backbone.safetensors: ")


def test_exports_of_an_older_version():
    """Older exports have no checksum. One with an unknown name in its metadata had a checksum that was damaged."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = Path("backbone.safetensors")
    save_file({"a": torch.ones(3)}, path, {exports.ORIGIN: '{"name": "x"}'})
    assert weights.read(path)["config"] == {"model": {"name": "x"}}
    save_file({"a": torch.ones(3)}, path, {exports.ORIGIN: '{"name": "x"}', "bam_kernels.blake2c": "0" * 64})
    assert "damaged in its header, where 'bam_kernels.blake2c' is unknown" in refused(path)
    save_file({"a": torch.ones(3)}, path, {"format": "pt"})
    assert weights.read(path).keys() == {"a"}


def test_an_export_is_read_by_timm():
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    source = timm.create_model("test_vit", num_classes=0)
    exports.save(source.state_dict(), {"name": "test_vit"}, Path("a.safetensors"), "--out")
    found = timm.create_model("test_vit", num_classes=0, checkpoint_path="a.safetensors").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in source.state_dict().items())


def test_the_checksum_is_of_the_file_as_torch_wrote_it():
    """The format is public: this states it once more, by hand."""
    from hashlib import blake2b

    weights.save(TENSORS, NAME)
    whole = NAME.read_bytes()
    comment = b"bam_kernels.blake2b:" + blake2b(whole[:-86] + b"\0\0", digest_size=32).hexdigest().encode()
    assert whole[-86:] == struct.pack("<H", 84) + comment
    assert unpickling.read(NAME).keys() == TENSORS.keys()
