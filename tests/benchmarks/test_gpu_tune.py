"""The tuning run for a GPU that one has for minutes: at toy size, and what it keeps of what it has measured."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bam_kernels import tuned
from bam_kernels.backends import cpu
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.cuda.device import Device

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import tune  # noqa: E402
import tune_tiles  # noqa: E402
import tune_variant  # noqa: E402
from rows import Row, Rows, read  # noqa: E402
from steps import Run  # noqa: E402
from times import Clock  # noqa: E402
from variants import TRIED  # noqa: E402

CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the extension")


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def kernel(build: str, name: str, us: float, how: str = "graph, cold") -> Row:
    return Row("kernel", name, "cuda", "2048x8192", how, us, note=build)


@pytest.mark.slow
@needs_extension
def test_a_toy_run_leaves_its_tiles_its_times_and_an_archive(tmp_path):
    """Tiles and two builds: the usual one, and one that a toy run takes the CPU's kernels for too."""
    pytest.importorskip("triton")
    out, archive = tmp_path / "out", tmp_path / "tune.tar.gz"
    only = ("--only", "compile-*", "tiles", "variant-sm_90a", "variant-deeper")
    finished = script("tune", "--out", out, "--archive", archive, "--toy", "--processes", "2", *only)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert set(json.loads((out / "tuned.json").read_text())) == {"rates", "tiles"}
    rows = read(out / "rows.jsonl")
    assert {(row.name, row.how, row.note) for row in rows} == {
        (name, how, build)
        for name in ("sinkhorn_pass", "match")
        for how in ("graph, cold", "graph, warm")
        for build in ("sm_90a", "deeper")
    }
    assert all(row.value > 0 and row.error < 1e-5 for row in rows)
    compiled = (out / "compile-0.log").read_text() + (out / "compile-1.log").read_text()
    assert "0 of this share did not run" in compiled
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert {"tiles.log", "rows.jsonl", "tuned.json", "summary.txt"} <= set(names)
    assert "flash 16 32 16 0 1" in finished.stdout and TRIED["deeper"] in finished.stdout


@needs_extension
def test_whole_steps_of_a_build(tmp_path):
    finished = script("tune_variant", "--name", "some", "--rows", tmp_path / "rows", "--step", "--toy")
    assert finished.returncode == 0, finished.stderr
    (row,) = read(tmp_path / "rows")
    assert (row.kind, row.note, row.how) == ("step", "some", "graph") and row.value > 0


@needs_extension
def test_a_wrong_kernel_is_neither_timed_nor_a_winner(tmp_path, monkeypatch, capsys):
    right = tune_variant.Operands.match

    def wrong(made: tune_variant.Operands) -> object:
        matched = right(made)
        made.gradient.mul_(1.01)
        return matched

    monkeypatch.setattr(tune_variant.Operands, "match", wrong)
    file = tmp_path / "rows"
    assert tune_variant.kernel_rows(Clock(CPU, 0.001), Rows(file), "deeper", toy=True) == 1
    assert "WRONG match" in capsys.readouterr().out
    assert {row.name for row in read(file)} == {"sinkhorn_pass"}
    usual = [kernel("sm_90a", "sinkhorn_pass", 1e9), kernel("sm_90a", "match", 1e9)]
    assert tune.winners([*read(file), *usual]) == []


def test_a_build_wins_by_one_of_its_kernels():
    usual = [kernel("sm_90a", "sinkhorn_pass", 20.0), kernel("sm_90a", "match", 50.0)]
    rows = [
        *usual,
        *(kernel("octets4", "sinkhorn_pass", 18.0), kernel("octets4", "match", 70.0)),
        *(kernel("deeper", "sinkhorn_pass", 19.9), kernel("deeper", "match", 49.9)),  # noise
        *(kernel("threads256", "sinkhorn_pass", 21.0), kernel("threads256", "match", 48.0)),
        *(kernel("shallow", "sinkhorn_pass", 10.0), kernel("shallow", "match", 10.0, "graph, warm")),
    ]
    assert tune.winners(rows) == ["octets4", "threads256"]
    steps = [Row("step", "loss and gradient", "cuda", "8x8x8", "graph", us, note="octets4") for us in (5.0, 9.0)]
    table = tune.variants_table([*rows, *steps]).splitlines()
    assert [line.split()[0] for line in table] == ["build,", "sm_90a", *TRIED]
    assert table[2].split()[:4] == ["octets4", "18.0", "70.0", "7.0"] and table[1].split()[1:4] == ["20.0", "50.0", "-"]


@pytest.mark.parametrize(
    "only, kept",
    [
        ((), set()),
        (("variant-deeper",), {("sm_90a", "kernel"), ("deeper", "step")}),
        (("steps-1-*", "tiles"), {("sm_90a", "kernel"), ("deeper", "kernel")}),
    ],
)
def test_rows_of_an_earlier_run_stay_where_nothing_measures_them_again(tmp_path, only, kept):
    file = tmp_path / "rows.jsonl"
    step = Row("step", "loss and gradient", "cuda", "8x8x8", "graph", 5.0, note="deeper")
    for row in (kernel("sm_90a", "match", 50.0), kernel("deeper", "match", 49.0), step):
        Rows(file).add(row)
    tune.Tuning(tmp_path, None, True, 1).drop_old_rows(Run(tmp_path, None, only))
    assert {(row.note, row.kind) for row in read(file)} == kept


@pytest.mark.parametrize("without, with_them, kept", [(10.0, 9.0, True), (10.0, 11.0, False), (10.0, 10.0, True)])
def test_tiles_stay_where_whole_steps_are_not_slower(monkeypatch, capsys, without, with_them, kept):
    """Without any, no step is taken."""
    key = ("row", 16, 32)
    chosen = {key: (1, 2, 3, 4, 5)}
    monkeypatch.setattr(tune_tiles, "steps_of", lambda *_, **__: [lambda: None])

    class Fixed:
        def graph_us(self, runs: list) -> float:
            return with_them if tuned.tile_of(*key) == (1, 2, 3, 4, 5) else without

    steps = tune_tiles.row_tiles(32, ("16x32x16", 2))
    with tuned.use_tiles({}):
        assert tune_tiles.tiles_kept_by_steps(chosen, steps, Fixed(), CPU) == (chosen if kept else {})
        assert f"{without} {with_them} {without} {with_them}" in capsys.readouterr().out
        assert tune_tiles.tiles_kept_by_steps({}, steps, None, CPU) == {}


def test_each_launch_belongs_to_one_group():
    """The tiles of rows come before those of flash, which take longest to compile."""
    pytest.importorskip("triton")
    keys = [[job.key for job in tune_tiles.jobs_of(steps, CPU, True)] for steps in tune_tiles.TOY_STEPS]
    assert {key[0] for key in keys[0]} == {"row", "column", "image"} and {key[0] for key in keys[1]} == {"flash"}
    assert all(len(set(found)) == len(found) for found in keys)


def test_a_run_that_is_ended_keeps_the_tiles_of_the_groups_before(tmp_path, monkeypatch):
    rates, kept = dict.fromkeys(tuned.RATES, 1.0), {("row", 16, 32): (1, 2, 3, 4, 5)}

    def chosen(steps, *_):
        if steps.name.startswith("flash"):
            raise KeyboardInterrupt
        return kept

    monkeypatch.setattr(tune_tiles.tune, "measured_rates", lambda *_: rates)
    monkeypatch.setattr(tune_tiles, "chosen_tiles", chosen)
    monkeypatch.setattr(tune_tiles, "tiles_kept_by_steps", lambda found, *_: found)
    monkeypatch.setattr(tuned, "path", lambda: None)
    monkeypatch.setattr(sys, "argv", ["tune_tiles.py", "--toy", "--tuned", str(tmp_path / "tuned.json")])
    with pytest.raises(KeyboardInterrupt):
        tune_tiles.main()
    saved = json.loads((tmp_path / "tuned.json").read_text())
    assert saved["rates"] == rates and list(saved["tiles"].values()) == [[1, 2, 3, 4, 5]]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_constants_that_cannot_be_are_errors(tmp_path):
    """All that are tried are accepted."""
    source = tmp_path / "constants.cpp"
    source.write_text(f'#include "{REPOSITORY / "csrc" / "cuda" / "cuda.h"}"\n')

    def errors(constants: str) -> str:
        flags = [f"-D{one}" for one in constants.split()]
        made = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *flags, source], capture_output=True, text=True)
        return made.stderr

    for constants in ("", *TRIED.values()):
        assert errors(constants) == ""
    for constants, words in (
        ("BAM_THREADS=40", "whole warps"),
        ("BAM_THREADS=2048 BAM_REGISTER_THREADS=2048", "whole warps"),
        ("BAM_THREADS=384", "whole blocks"),
        ("BAM_GROUPS=1", "the next group"),
        ("BAM_GROUPS=7", "an arrival for each stage"),
        ("BAM_STAGES=33", "a block may be one warp"),
        ("BAM_REGISTER_THREADS=0", "a block at least"),
        ("BAM_REGISTER_THREADS=4096", "what runs at once"),
        ("BAM_OCTETS=0", "a thread owns columns"),
    ):
        assert words in errors(constants), constants


@needs_extension
def test_two_blocks_on_a_multiprocessor_are_two_clusters_at_once(monkeypatch):
    """The device counts clusters of blocks with a multiprocessor each; two of half the threads may share one."""
    h100 = Device(0, "H100", (9, 0), 132, 80 << 30, 50 << 20, 227 << 10, 1 << 10, (60, 32, 15, 7), True)
    whole = shapes.pass_shape(8192, 2, h100)
    assert whole is not None and (whole.team, whole.at_once) == ((512, 1), 132)
    wide = shapes.pass_shape(16384, 2, h100)
    assert wide is not None and (wide.team, wide.at_once) == ((512, 2), 60)
    monkeypatch.setattr(shapes, "MOST_THREADS", 256)
    halves = shapes.pass_shape(8192, 2, h100)
    assert halves is not None and (halves.team, halves.at_once) == ((256, 2), 120)
