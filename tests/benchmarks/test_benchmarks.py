"""The benchmarks at toy size: they run, their rows are complete, and what is wrong is neither timed nor hidden."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_kernels import plan
from bam_kernels.backends import cpu
from bam_kernels.layout import Layout
from bam_kernels.options import Options

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import plot  # noqa: E402
import predictions  # noqa: E402
from competitor import WHOLE, Competitor, Rotation  # noqa: E402
from hardware import Machine  # noqa: E402
from problem import Images, Problem, Truth, Work, layout_of, parse_shape, truth_of_sinkhorn  # noqa: E402
from report import BenchmarkOptions, Report, compare_with_truth, threshold_of  # noqa: E402
from rows import Row  # noqa: E402

OURS = {"cpu", "cpu-int16"} if cpu.unavailable() is None else set()
REQUIRED = {
    *("benchmark", "part", "kind", "competitor", "precision", "note", "status", "reason"),
    *("M", "N", "D", "B", "V", "L", "T", "R", "W", "epsilon", "temperature", "iterations", "top_k"),
    *("median_ms", "p20_ms", "p80_ms", "repetitions", "peak_bytes", "bytes", "exps", "flops"),
    *("floor_ms", "share_of_floor", "error_P", "error_gradient", "threshold"),
    *("device", "isa", "threads", "torch", "bam_kernels", "commit", "copy_gbs", "gemm_gflops", "half_gemm_gflops"),
    *("x_eager", "x_compile", "x_gemms", "x_authors"),
}
# Small sizes: one rank's share of two, with rows that are no multiple of a vector.
TOY = ("--shapes", "36x72x16", "--repetitions", "3", "--warmup-s", "0", "--threads", "1")


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / script, *arguments]
    env = os.environ | environment
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=env)


def rows_of(finished: subprocess.CompletedProcess[str], file: Path) -> list[dict]:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(file.read_text())


def check_times(row: dict) -> None:
    assert row["status"] == "ok", row["reason"]
    assert REQUIRED <= set(row)
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["repetitions"] == 3 and row["threads"] == 1
    assert row["floor_ms"] > 0 and row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])


def test_sinkhorn_rows_are_complete(tmp_path: Path) -> None:
    file = tmp_path / "sinkhorn.json"
    finished = run("sinkhorn.py", *TOY, "--rows", "cpu", "cpu-int16", "eager", "--json", file)
    rows = rows_of(finished, file)
    expected = {("sinkhorn", kind) for kind in ("eager", *OURS)} | {
        ("potentials", kind) for kind in ("eager", *OURS & {"cpu"})
    }
    assert {(row["part"], row["kind"]) for row in rows} == expected
    for row in rows:
        check_times(row)
        assert row["W"] == 2 and row["error_P"] < row["threshold"] and row["error_gradient"] is None


@pytest.mark.slow
def test_loss_rows_are_complete_and_drawn(tmp_path: Path) -> None:
    file, table, trace = tmp_path / "loss.json", tmp_path / "loss.csv", tmp_path / "trace"
    options = ("--rows", "cpu", "cpu-int16", "eager", "gemms", "compile-autocast", "--top-k", "5", "--teacher")
    finished = run("loss.py", *TOY, *options, "--json", file, "--csv", table, "--profile", trace)
    rows = rows_of(finished, file)
    ours = {("from-scores", kind) for kind in OURS} | {("whole", kind) for kind in OURS & {"cpu"}}
    assert {(row["part"], row["kind"]) for row in rows} == ours | {("whole", "compile-autocast")} | {
        (part, kind) for part in ("from-scores", "whole") for kind in ("eager", "gemms")
    }
    for row in rows:
        if row["kind"] == "compile-autocast":
            assert row["error_gradient"] > 1e-4  # bfloat16 products
            continue
        check_times(row)
        assert row["N"] == 72 and row["W"] == 2
        assert (row["error_gradient"] is None) == (row["kind"] == "gemms")
        assert row["x_eager"] > 0 and row["x_compile"] is None
    with table.open() as lines:
        assert [row["competitor"] for row in csv.DictReader(lines)] == [row["competitor"] for row in rows]
    assert len(list(trace.glob("*.json"))) == 2
    drawn = run("plot.py", file)
    assert drawn.returncode == 0, drawn.stderr
    assert file.with_suffix(".png").stat().st_size > 0


def test_accuracy_covers_the_grid_and_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.json"
    grid = ("--images", "17", "--D", "16", "--cosines", "0", "0.9", "--epsilons", "0.05", "0.005")
    rows = rows_of(run("accuracy.py", *grid, "--rows", "cpu", "eager", "--json", file), file)
    kinds = {"eager", *OURS & {"cpu"}}
    assert {(row["cosine"], row["epsilon"], row["kind"]) for row in rows} == {
        (cosine, epsilon, kind) for cosine in (0, 0.9) for epsilon in (0.05, 0.005) for kind in kinds
    }
    assert all(row["status"] == "ok" for row in rows)
    plot.draw_files([file], tmp_path / "drawn")
    assert (tmp_path / "drawn" / "accuracy.png").exists()


@pytest.mark.slow
def test_accuracy_of_interpreted_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "accuracy.json"
    grid = ("--images", "6", "--D", "64", "--cosines", "0.9", "--epsilons", "0.05")
    interpreted = [row for row in WHOLE if row.startswith("triton")]
    finished = run("accuracy.py", *grid, "--rows", *interpreted, "--json", file, TRITON_INTERPRET="1")
    rows = {row["kind"]: row for row in rows_of(finished, file)}
    assert rows.keys() == set(interpreted) and all(row["status"] == "ok" for row in rows.values())
    for kind, row in rows.items():
        assert (row["error_gradient"] > 1e-5) == kind.endswith("int16")


def measured_row(name: str, backend: str, shape: str, how: str, value: float, **more) -> Row:
    return Row("kernel" if name != "loss and gradient" else "step", name, backend, shape, how, value, **more)


def outcome_of(rows: list[Row], what: str, gpu: str = "H100") -> dict[str, Any]:
    (found,) = [one for one in predictions.outcomes(rows, gpu) if one["prediction"] == what]
    return found


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    """The last row of the same kernel, backend, shape and temperature of the cache; None where nothing was measured."""
    rows = [
        measured_row("sinkhorn_pass", "cuda", "2048x8192", "graph, cold", 40.0),
        measured_row("sinkhorn_pass", "cuda", "2048x8192", "graph, cold", 19.0),
        measured_row("sinkhorn_pass", "triton", "2048x8192", "graph, cold", 99.0),
        measured_row("match", "cuda", "2048x8192", "graph, warm", 80.0),
        measured_row("loss and gradient", "cuda", "2048x8192x4096", "graph", 930.0, teacher=True),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    finished = run("predictions.py", "--results", file)
    assert finished.returncode == 0, finished.stderr
    held = {line.split("  ")[0]: line for line in finished.stdout.splitlines()}
    assert " 19 " in held["sinkhorn_pass cuda 2048x8192 graph, cold"]
    assert "2 of 4 held" in finished.stdout
    seen = {one["prediction"]: one["held"] for one in predictions.outcomes(rows) if one["measured"] is not None}
    assert seen == {
        "sinkhorn_pass cuda 2048x8192 graph, cold": True,
        "sinkhorn_pass triton 2048x8192 graph, cold": False,
        "match cuda 2048x8192 graph": False,
        "loss and gradient cuda 2048x8192x4096 teacher graph": True,
    }


def test_predictions_stand_beside_an_earlier_commit(tmp_path: Path) -> None:
    given = "match", "cuda", "2048x8192", "graph, cold"
    for tree, us in (("before", 46.5), ("after", 28.5)):
        (tmp_path / tree).write_text(json.dumps(asdict(measured_row(*given, us))) + "\n")
    finished = run("predictions.py", "--results", tmp_path / "after", "--before", tmp_path / "before")
    assert finished.returncode == 0, finished.stderr
    head, *lines = finished.stdout.splitlines()
    assert head.split()[:5] == ["prediction", "before", "low", "high", "measured"]
    (match,) = [line.split() for line in lines if line.startswith("match cuda 2048x8192 graph")]
    assert (match[4], match[7]) == ("46.5", "28.5")
    (other,) = [line.split() for line in lines if line.startswith("match triton 2048x8192 graph")]
    assert (other[4], other[7]) == ("-", "-")


@pytest.mark.parametrize("cold, warm, measured, held", [(30, 34, 34, True), (45, 34, 45, False), (33, 20, 20, False)])
def test_a_prediction_of_two_rows_holds_where_both_are_within(cold, warm, measured, held) -> None:
    """Between 28 and 35: the one furthest from 31.5 is shown. An earlier row of the same temperature does not count."""
    given = "match", "cuda", "2048x8192"
    values = (("graph, cold", 1.0), ("graph, cold", cold), ("graph, warm", warm))
    found = outcome_of([measured_row(*given, how, value) for how, value in values], "match cuda 2048x8192 graph")
    assert (found["measured"], found["held"]) == (measured, held)


def test_a_peak_is_that_of_the_plan() -> None:
    what = "peak of loss and gradient cuda 2048x8192x4096 teacher wall"
    mb = plan(views=8, images=256, features=4096, ranks=16, teacher_views=8, sixteen_bit=True).total_bytes / 1e6
    for peak, held in ((mb, True), (2 * mb, False), (None, None)):
        row = measured_row("loss and gradient", "cuda", "2048x8192x4096", "wall", 1.0, teacher=True, peak_mb=peak)
        found = outcome_of([row], what)
        assert found["held"] is held and found["measured"] == peak


def test_floors_of_a_kernel_and_a_faster_memory() -> None:
    """2^24 scores, each of 10.9 instructions (4 warps a clock), 2 bytes and an exponential (16 a clock)."""
    what = "sinkhorn_pass cuda 2048x8192 graph, cold"
    slow, fast = outcome_of([], what), outcome_of([], what, "H200")
    clocks = 132 * 1.7e3
    expected = 2**24 * torch.tensor([10.9 / 128 / clocks, 2 / 3e6, 1 / 16 / clocks])
    assert torch.allclose(torch.tensor(slow["floors_us"]), expected)
    assert fast["floors_us"][1] == pytest.approx(slow["floors_us"][1] * 3000 / 4300)
    assert fast["low"] == pytest.approx(slow["low"] * (0.7 + 0.3 * 3000 / 4300)) and fast["high"] < slow["high"]


def test_every_prediction_is_of_another_row_and_above_its_floors() -> None:
    found = predictions.outcomes([])
    assert len({one["prediction"] for one in found}) == len(found)
    for one in found:
        assert 0 < one["low"] < one["high"] and one["measured"] is one["held"] is None
        assert one["floors_us"] is None or one["unit"] == "us"
        if one["floors_us"] is not None and "warm" not in one["prediction"]:  # a cache holds some of what is read
            assert one["low"] > max(one["floors_us"]), one["prediction"]


def test_unknown_option_is_an_error() -> None:
    finished = run("sinkhorn.py", "--iteration-count", "3")
    assert finished.returncode == 2
    assert "iteration-count" in finished.stdout + finished.stderr


@pytest.fixture
def problem() -> Problem:
    layout = layout_of(12, 12, 8, V=2, L=2, T=2)
    return Problem.generate(layout, Options(), torch.device("cpu"))


def competitor(outputs, runs: list[int], kind: str = "eager") -> Competitor:
    return Competitor(kind, "broken", lambda: (), lambda: runs.append(1), outputs, Work(1, 1, 1))


def raising() -> Truth:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("kind, status", [("eager", 0), ("cpu", 1)])  # only our own failures are the script's
@pytest.mark.parametrize("way, words", [("wrong", "error above 1e-05"), ("nan", "not finite"), ("raises", "no such")])
def test_broken_competitor_fails_and_is_not_timed(problem, capsys, tmp_path, way, words, kind, status) -> None:
    truth = truth_of_sinkhorn(problem.scores()[0], problem.layout, problem.options)
    wrong = {"wrong": lambda: Truth(truth.P * 1.0001, None), "nan": lambda: Truth(truth.P * float("nan"), None)}
    machine = Machine(torch.device("cpu"), "a test", "none", 1, "none", gemm_gflops=1.0, copy_gbs=1.0)
    report = Report("sinkhorn", machine, BenchmarkOptions(repetitions=1, warmup_s=0.0, json=tmp_path / "rows.json"))
    runs: list[int] = []
    good: list[int] = []
    kept = competitor(lambda: truth, good, "gemms")
    report.table("sinkhorn", problem, [kept, competitor(wrong.get(way, raising), runs, kind)], truth)
    assert not runs and good
    assert [row["status"] for row in report.rows] == ["ok", "failing"]
    assert report.rows[1]["median_ms"] is None and words in report.rows[1]["reason"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILING" in line]
    assert line.startswith("broken") and words in line
    assert report.finish() == status
    written = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)  # no NaN in the file
    assert [row["status"] for row in written] == ["ok", "failing"]


def test_a_gradient_off_by_more_than_the_threshold_fails(problem) -> None:
    truth = Truth(torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64))
    for scale, status in ((1 + 2e-5, "failing"), (1 + 5e-6, "ok")):
        row = compare_with_truth(
            competitor(lambda scale=scale: Truth(truth.P, truth.gradient * scale), []), truth, Options()
        )
        assert row.status == status


def test_thresholds() -> None:
    assert threshold_of("float32", 0.05, 0) == 1e-5 == threshold_of("float32", 0.05, 3)
    assert threshold_of("float32", 0.005, 0) == 1e-4
    assert threshold_of("int16", 0.05, 0) == 1e-3 and threshold_of("int16", 0.005, 0) == 1e-2
    assert threshold_of("int16", 0.05, 3) == 5e-2 and threshold_of("fp16", 0.05, 0) == 2e-3


@pytest.mark.parametrize("cold_bytes, buffers", [(0, 1), (1000, 4)])  # 400 bytes a copy: three others between two uses
def test_fresh_copies_survive_destruction_and_rotate(cold_bytes: int, buffers: int) -> None:
    given = torch.arange(100.0)
    fresh = Rotation((given, None), cold_bytes)
    seen = []
    for _ in range(2 * buffers):
        copy, absent = fresh()
        assert absent is None and torch.equal(copy, torch.arange(100.0))
        seen.append(copy.data_ptr())
        copy.zero_()
    assert len(set(seen)) == buffers and seen[:buffers] == seen[buffers:]


@pytest.mark.parametrize("cosine", [0.0, 0.9, 0.99])
def test_embeddings_have_the_mean_cosine(cosine: float) -> None:
    x = torch.nn.functional.normalize(Images(200, 32, torch.device("cpu"), cosine=cosine).views(2).double(), dim=-1)[0]
    between = (x @ x.T).sum() - len(x)
    assert between / (len(x) * (len(x) - 1)) == pytest.approx(cosine, abs=0.02)


def test_shapes() -> None:
    assert parse_shape("512x1024x256") == (512, 1024, 256)
    shared = layout_of(512, 1024, 256, V=2, L=2, T=2)
    assert shared == Layout(B=256, V=2, L=2, T=2, D=256, W=2)
    assert (shared.M, shared.N) == (512, 1024)


@pytest.mark.parametrize(
    "text, V, words", [("512x1024", 2, "MxNxD"), ("0x4x4", 2, "positive"), ("7x14x4", 2, "M=7"), ("8x12x4", 2, "N=12")]
)
def test_bad_shapes(text: str, V: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layout_of(*parse_shape(text), V=V, L=V, T=V)
