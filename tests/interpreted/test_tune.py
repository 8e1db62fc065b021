"""The tuning run at toy size: what it times, drops and keeps, and that the kernels then take it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import tune, tuned
from bam_kernels.backends import cuda, triton
from bam_kernels.backends.triton import tiles
from bam_kernels.engine.cost import H200, fastest_rows, rates
from bam_kernels.tuned import Tuning
from bam_kernels.ways import WAYS


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of this test alone, not there yet."""
    monkeypatch.setenv("BAM_KERNELS_TUNED", str(tmp_path / "cache" / "gpu.json"))
    tuned.tuning.cache_clear()
    yield tmp_path / "cache" / "gpu.json"
    tuned.tuning.cache_clear()


def later_is_faster():
    """A clock by which every run is faster than the one before."""
    calls = iter(range(1, 1000))

    def timer(run) -> float:
        run()
        return 1 / next(calls)

    return timer


def test_every_tile_gives_the_default_tile_s_result_and_is_kept(file):
    chosen = {}
    with tuned.use_tiles({}):
        for job in tune.jobs(32, 64, 16, DEVICE):
            few = tune.Job(job.key, job.default, job.candidates[:2], job.run)
            tile, ms, default_ms = tune.best(few, later_is_faster())
            assert tile == tuple(few.candidates[-1]) and ms < default_ms
            chosen[job.key] = tile
    assert {key[0] for key in chosen} == {"row", "column", "image", "flash"} and len(chosen) == 6
    tuned.save(Tuning({name: 2.0 for name in tuned.RATES}, chosen), file)
    assert tiles.row_tile(32, 64) == chosen["row", 32, 64] and tiles.column_tile(32, 64) == chosen["column", 32, 64]
    assert tiles.image_tile(2, 64) == chosen["image", 2, 64]
    assert tiles.flash_tile(16, 64, 16, wide=True, sixteen_bit=True) == chosen["flash", 16, 64, 16, 1, 1]
    assert tiles.row_tile(32, 128) == tiles.Tile(*tiles.row_tile(32, 128)) not in chosen.values()
    assert rates().flash_flops == 2.0 and rates().link_bytes == H200.link_bytes


def test_what_is_slower_wrong_or_does_not_run_is_not_kept(file, capsys):
    tuned.save(Tuning({name: 1.0 for name in tuned.RATES}), file)
    job = next(job for job in tune.jobs(32, 64, 1024, DEVICE) if job.key[0] == "column")
    wrong = job.default._replace(rows=8, chunks=1)  # not all rows
    broken = job.default._replace(block_n=48)  # no power of two
    tile, ms, default_ms = tune.best(tune.Job(job.key, job.default, [wrong, broken], job.run), later_is_faster())
    assert tile == job.default and ms == default_ms
    assert "another result, dropped" in capsys.readouterr().err
    slow = tune.best(tune.Job(job.key, job.default, job.candidates[:1], job.run), lambda run: 1.0)
    assert slow == (tuple(job.default), 1.0, 1.0)
    assert tiles.column_tile(32, 64) == job.default


def test_a_whole_run(file, monkeypatch, capsys):
    """The rates follow from the times, the table names every kernel, and an earlier file plays no part."""
    monkeypatch.setattr(tune, "_column_candidates", lambda *_: [])
    monkeypatch.setattr(tune, "_row_candidates", lambda *_: [])
    monkeypatch.setattr(tune, "_flash_candidates", lambda *_: [])
    whole = tune.tune([(8, 16, 600)], DEVICE, lambda run: (run(), 1e-3)[1], size=64)
    assert not whole.tiles and not file.exists()
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in ("row 8 16", "column 8 16", "image 2 16", *tuned.RATES))
    found = whole.rates
    assert found["product_flops"] == pytest.approx(2 * 64**3 * 1e6)
    assert found["memory_bytes"] == pytest.approx(2 * 4 * 64**2 * 1e6)
    assert found.keys() == set(tuned.RATES) | (set() if cuda.unavailable(DEVICE) else set(tuned.CUDA_RATES))


def test_rates_are_measured_with_the_tiles_that_are_kept(file, monkeypatch):
    """The tiles with which "auto" will run Triton's kernels, since it compares their rate with that of CUDA kernels."""
    monkeypatch.setattr(tune, "best", lambda job, timer: ((7, *job.default[1:]), 1.0, 2.0))
    monkeypatch.setattr(tune, "measured_rates", lambda *_: {"exponentials": tuned.tile_of("column", 8, 16)[0]})
    assert tune.tune([(8, 16, 600)], DEVICE, lambda run: 1.0).rates == {"exponentials": 7}


def test_rates_of_the_cuda_kernels_are_measured_where_they_can_run(file, monkeypatch):
    """Each backend's row kernels by themselves; the file that keeps the rates gives them back."""
    kernels, calls = triton.kernels(), Counter()

    class CudaKernels:
        """Triton's kernels, which have the same interface, in place of the CUDA kernels."""

        def column_lse(self, *args):
            calls["columns"] += 1
            kernels.column_lse(*args)

        def sinkhorn_pass(self, *args):
            calls["passes"] += 1
            kernels.sinkhorn_pass(*args)

    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "kernels", CudaKernels)
    times = iter((1.0, 2.0, 3.0, 4.0, 8.0))
    with tuned.use_tiles({}):
        found = tune.measured_rates(DEVICE, lambda run: (run(), next(times))[1], size=64)
    assert calls == {"columns": 1, "passes": 2}
    assert found["exponentials"] == pytest.approx(3 * 16 * 64 / 4e-3)
    assert found["cuda_exponentials"] == pytest.approx(3 * 16 * 64 / 8e-3)
    tuned.save(Tuning(found), file)
    assert rates() == replace(H200, **found)
    assert fastest_rows(("cuda", "triton")) == WAYS["triton"]


@pytest.mark.parametrize("text", ["", "{}", '{"rates": {}, "tiles": {}}', '{"rates": 3}'])
def test_a_file_that_is_no_such_file_is_named(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json: not a file that `python -m bam_kernels\.tune` wrote"):
        tuned.tuning()
    file.unlink()
    with pytest.raises(ValueError, match="No such file"):
        tuned.tuning()


def test_shapes(capsys):
    assert tune._shape("512x1024x64") == (512, 1024, 64)
    for text in ("512x1024", "3x6x4", "8x12x4"):
        with pytest.raises(SystemExit):
            tune.main(["--shapes", text])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tune.main(["--shapes", "512x512x64"])
        assert "nothing can be timed here" in capsys.readouterr().err
