"""The tuning file and switches of the environment, which anybody may have written: one error that names the fault."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bam_kernels import __main__ as doctor
from bam_kernels import distributed, tune, tuned
from bam_kernels.environment import is_on
from bam_kernels.tuned import MOST_BYTES, Tuning

tiles = pytest.importorskip("bam_kernels.backends.triton.tiles")
RATES = dict.fromkeys(tuned.RATES, 1e12)
GOOD = {
    ("row", 500, 1000): (4, 1024, 8, 63, 4),
    ("column", 500, 1000): (8, 256, 16, 32, 4),
    ("image", 2, 1000): (2, 1024, 1, 1, 8),
    ("flash", 500, 1000, 64, 1, 0): (64, 32, 64, 64, 4, 2),
}


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of this test alone, not there yet."""
    monkeypatch.setenv("BAM_KERNELS_TUNED", str(tmp_path / "gpu.json"))
    tuned.tuning.cache_clear()
    yield tmp_path / "gpu.json"
    tuned.tuning.cache_clear()


def fault_of(file) -> str:
    """Message of the one error, without the words that begin each."""
    with pytest.raises(ValueError) as raised:
        tuned.tuning()
    begin = f"{file}: not a file that `python -m bam_kernels.tune` wrote: "
    assert str(raised.value).startswith(begin) and "\n" not in str(raised.value) and len(str(raised.value)) < 600
    return str(raised.value).removeprefix(begin)


def test_a_good_file_is_read_as_it_was_written(file):
    rates = RATES | {"cuda_exponentials": 7.0}
    tuned.save(Tuning(rates, GOOD), file)
    assert tuned.tuning().rates == rates and tuned.tuning().tiles == GOOD


def test_the_self_check_names_a_bad_file(file, capsys):
    """And tries no kernel with it."""
    file.write_text("{}")
    assert doctor.main() == 1
    said = f"tuning file {file}: not a file that `python -m bam_kernels.tune` wrote: the file has no rates"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_every_tile_that_a_tuning_run_tries_may_be_in_a_file():
    """Few rows and many, sizes that are no powers of two, the longest row on chip, wide features, and all defaults."""
    tried = 0
    for m, n, D in [(4, 4, 1), (6, 10, 3), (500, 1000, 64), (4096, 4096, 256), (2048, 8192, 512), (2, 100_000, 16)]:
        with tuned.use_tiles({}):
            tiles_of = candidates(m, n, D)
        for key, of_key in tiles_of.items():
            for tile in of_key:
                assert tuned._tile(" ".join(map(str, key)), list(tile)) == (key, tuple(tile))
                tried += 1
    assert tried > 400


def candidates(m: int, n: int, D: int) -> dict[tuned.Key, list[tuple[int, ...]]]:
    row, column, image = tiles.row_tile(m, n), tiles.column_tile(m, n), tiles.image_tile(2, n)
    found = {("row", m, n): [row, *tune._row_candidates(m, row)]} if n <= tiles.LONGEST_ROW else {}
    found["column", m, n] = [column, *tune._column_candidates(m, n, column)]
    found["image", 2, n] = [image, *tune._with_warps(image, (2, 4, 8, 16))] if image else []
    for wide in (False, True):
        flash = tiles.flash_tile(m, n, D, wide=wide)
        found["flash", m, n, D, int(wide), 1] = [flash, *tune._flash_candidates(m, n, wide, flash)]
    return found


@pytest.mark.parametrize(
    "rate", [math.inf, -math.inf, math.nan, 0, -1e12, 1e308, 1e-320, 10**400, True, "1e12", None, [1e12], {}]
)
def test_a_rate_that_is_no_measurement(file, rate):
    file.write_text(json.dumps({"rates": RATES | {"flash_flops": rate}, "tiles": {}}))
    assert fault_of(file).startswith("flash_flops must be a number from 1 to 1e+24, got ")


@pytest.mark.parametrize(
    "key, tile, words",
    [
        ("row 500 1000", [3, 1024, 9, 56, 4], "blocks that are powers of two"),
        ("row 500 1000", [0, 1024, 8, 63, 4], "blocks that are powers of two"),
        ("row 500 1000", [-4, 1024, 8, 63, 4], "blocks that are powers of two"),
        ("row 500 1000", [4, 2**40, 8, 63, 4], "blocks that are powers of two"),
        ("row 500 1000", [2**12, 2**12, 2**12, 1, 4], "at most 1048576 elements"),
        ("row 500 1000", [4, 512, 8, 63, 4], "at least 1000 columns"),
        ("row 500 1000", [4, 1024, 8, 62, 4], "chunks of whole blocks that cover 500 rows"),
        ("row 500 1000", [4, 1024, 8, 64, 4], "chunks of whole blocks that cover 500 rows"),
        ("row 500 1000", [4, 1024, 10, 50, 4], "chunks of whole blocks that cover 500 rows"),
        ("row 500 1000", [4, 1024, 0, 63, 4], "chunks of whole blocks that cover 500 rows"),
        ("row 500 1000", [4, 1024, -8, -63, 4], "chunks of whole blocks that cover 500 rows"),
        ("row 500 1000", [4, 1024, 8, 63, 0], "1, 2, 4, 8, 16 or 32 warps"),
        ("row 500 1000", [4, 1024, 8, 63, 3], "1, 2, 4, 8, 16 or 32 warps"),
        ("row 500 1000", [4, 1024, 8, 63, 64], "1, 2, 4, 8, 16 or 32 warps"),
        ("row 500 1000", [4, 1024, 8, 63], "5 integers"),
        ("row 500 1000", [4, 1024, 8, 63, 4, 2], "5 integers"),
        ("row 500 1000", [4, 1024, 8, 63, 4.0], "5 integers"),
        ("row 500 1000", [True, 1024, 8, 500, 4], "5 integers"),
        ("row 500 1000", ["4", 1024, 8, 63, 4], "5 integers"),
        ("row 500 1000", "41484", "5 integers"),
        ("row 500 1000", None, "5 integers"),
        ("column 500 1000", [4, 256, 4, 125, 4], "1 to 64 chunks of whole blocks that cover 500 rows"),
        ("column 500 1000", [8, 256, 16, 31, 4], "1 to 64 chunks of whole blocks that cover 500 rows"),
        ("image 3 1000", [2, 1024, 1, 1, 8], "room for the whole image"),
        ("image 2 1000", [2, 512, 1, 1, 8], "room for the whole image"),
        ("image 2 1000", [2, 1024, 1, 10**30, 8], "room for the whole image"),
        ("flash 500 1000 64 1 1", [8, 32, 64, 64, 4, 2], "blocks that are powers of two, of at least 16"),
        ("flash 500 1000 64 1 1", [64, 32, 0, 64, 4, 2], "blocks that are powers of two, of at least 16"),
        ("flash 500 1000 64 1 1", [64, 32, 64, 48, 4, 2], "blocks that are powers of two, of at least 16"),
        ("flash 500 1000 64 1 1", [64, 32, 64, 64, 4, 0], "1 to 8 stages"),
        ("flash 500 1000 64 1 1", [64, 32, 64, 64, 4, 10**9], "1 to 8 stages"),
        ("flash 500 1000 64 1 1", [64, 32, 64, 64, 4], "6 integers"),
    ],
)
def test_a_tile_with_which_no_kernel_is_right(file, key, tile, words):
    file.write_text(json.dumps({"rates": RATES, "tiles": {key: tile}}))
    found = fault_of(file)
    assert found.startswith(f"the tile of {key} must have ") and words in found and f"got {str(tile)[:60]}" in found


@pytest.mark.parametrize(
    "key",
    [
        *("", "row", "rows 500 1000", "row 500", "row 500 1000 1", "row -5 1000", "row 5e2 1000", "row 0500 1000"),
        *("row 500 99999999999", "row 500 1000\n", "row 500 \u0661", "flash 500 1000 64", "x" * 9000),
    ],
)
def test_a_key_that_names_no_launch(file, key):
    file.write_text(json.dumps({"rates": RATES, "tiles": {key: list(GOOD["row", 500, 1000])}}))
    assert fault_of(file) == f"{key[:60]!r} names no kernel with the sizes of a launch"


def test_a_key_in_two_spellings_is_no_key(file):
    tile = list(GOOD["row", 500, 1000])
    for key in ("row  500 1000", " row 500 1000", "row 500 1000 ", "row\t500 1000", "row 500 +1000"):
        file.write_text(json.dumps({"rates": RATES, "tiles": {"row 500 1000": tile, key: tile}}))
        assert "names no kernel with the sizes of a launch" in fault_of(file)


WHOLE = json.dumps({"rates": RATES, "tiles": {}})


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "Expecting value"),
        (WHOLE[:-9].encode(), "line 1 column"),
        (b"[" * 200_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b"9" * 10_000, "4300 digits"),
        (b"5", "the file must be an object, got 5"),
        (b"null", "the file must be an object, got None"),
        (b'{"tiles": {}}', "the file has no rates"),
        (json.dumps({"rates": RATES}).encode(), "the file has no tiles"),
        (b'{"rates": 3, "tiles": {}}', "rates must be an object, got 3"),
        (b'{"rates": {}, "tiles": {}}', "rates has no product_flops"),
        (json.dumps({"rates": RATES, "tiles": [1]}).encode(), "tiles must be an object, got [1]"),
        (json.dumps({"rates": RATES, "tiles": {}, "more\n": 1}).encode(), "the file has 'more\\n', which is unknown"),
        (json.dumps({"rates": RATES | {"link_bytes": 1.0}, "tiles": {}}).encode(), "rates has 'link_bytes', which"),
        (WHOLE.replace("{", '{"tiles": {}, ', 1).encode(), "'tiles' stands twice"),
        (WHOLE.replace('"flash_flops"', '"memory_bytes"').encode(), "'memory_bytes' stands twice"),
        (WHOLE.encode("utf-16"), "'utf-8' codec can't decode"),
        (b'{"rates": "\xff"}', "'utf-8' codec can't decode"),
        (WHOLE.encode() + b" " * MOST_BYTES, f"is not a plain file of at most {MOST_BYTES} bytes"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_no_tuning_file(file, text, words):
    file.write_bytes(text)
    assert words in fault_of(file)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself", "missing"])
def test_what_is_no_file(file, kind):
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.symlink_to("/dev/zero" if kind == "device" else file)
    words = {"link to itself": "Too many levels", "missing": "No such file"}
    assert words.get(kind, "is not a plain file of at most") in fault_of(file)


@pytest.mark.parametrize("value, on", [(None, False), ("", False), ("0", False), ("1", True)])
def test_a_switch_of_the_environment(monkeypatch, value, on):
    monkeypatch.delenv("BAM_KERNELS_SWITCH", raising=False)
    if value is not None:
        monkeypatch.setenv("BAM_KERNELS_SWITCH", value)
    assert is_on("BAM_KERNELS_SWITCH") is on


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "01"])
def test_a_switch_with_another_value_is_named(monkeypatch, value):
    monkeypatch.setenv("BAM_KERNELS_SWITCH", value)
    with pytest.raises(ValueError, match=re.escape(f"BAM_KERNELS_SWITCH must be 0 or 1, got {value!r}")):
        is_on("BAM_KERNELS_SWITCH")


def test_the_switch_of_ranges_is_read_so():
    environment = os.environ | {"BAM_KERNELS_NVTX": "yes"}
    run = subprocess.run([sys.executable, "-c", "import bam_kernels"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "ValueError: BAM_KERNELS_NVTX must be 0 or 1, got 'yes'" in run.stderr


def test_the_switch_of_ranks_is_read_so(monkeypatch):
    """BAM_KERNELS_CHECK_RANKS is read on CPUs too, where ranks compare at every call anyway."""
    monkeypatch.setenv("BAM_KERNELS_CHECK_RANKS", "true")
    header = SimpleNamespace(encoded=bytes, kind=bytes)
    with pytest.raises(ValueError, match="BAM_KERNELS_CHECK_RANKS must be 0 or 1, got 'true'"):
        distributed.GroupRanks.agree(SimpleNamespace(_agreed_kinds=set()), header, torch.device("cpu"))
