"""The script that measures on a GPU, at toy size: its rows, what it makes of crashes, and its readers."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bam_kernels.backends import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import compare  # noqa: E402
import comparisons  # noqa: E402
import counters  # noqa: E402
import earlier_run  # noqa: E402
import measure  # noqa: E402
import measure_tables  # noqa: E402
import measurement  # noqa: E402
import rows  # noqa: E402
import step_trace  # noqa: E402
from contact import CHECKED_TESTS  # noqa: E402
from earlier_run import EarlierRun  # noqa: E402
from hardware import Machine  # noqa: E402
from measure import Measure  # noqa: E402
from problem import Truth  # noqa: E402
from report import Row  # noqa: E402
from steps import Outcome, Run  # noqa: E402

FAILED = "tests/loss/test_layout.py::test_nothing_of_this_name"
PASSES = "tests/loss/test_layout.py"
HIDDEN = ("nvtx", "tyro", "docstring_parser", "kornia")
NAMES = ("32x64x16-teacher", "16x16x16", "sinkhorn-16x32x16", "potentials-16x32x16")


def an_existing_test() -> str:
    """The id of a quick test."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(REPOSITORY / PASSES)]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    return listed.splitlines()[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """A whole run after a contact in which two tests had failed, one of which is no longer there.

    An earlier run has left a row and counters in its folder.
    """
    folder = tmp_path_factory.mktemp("measure")
    contact, out = folder / "contact", folder / "out"
    contact.mkdir()
    out.mkdir()
    (out / "rows.json").write_text(json.dumps([{"problem": "16x16x16", "kind": "cpu", "status": "old"}]))
    (out / "ncu-cuda.csv").write_text("old")
    test = an_existing_test()
    failed = [{"test": name, "outcome": "failed", "error": ""} for name in (test, FAILED)]
    passed = {"test": "tests/loss/test_loss.py::test_one", "outcome": "passed"}
    (contact / "tests-cuda.tests.jsonl").write_text("\n".join(map(json.dumps, [*failed, passed])))
    (contact / "steps.json").write_text(json.dumps({"tests-cuda": {"status": "failed with 1"}}))
    with tarfile.open(folder / "contact.tar.gz", "w:gz") as tar:
        for file in contact.iterdir():
            tar.add(file, file.name)
    for name in HIDDEN:  # as on a GPU machine without them
        (folder / "hidden" / name).mkdir(parents=True)
        (folder / "hidden" / name / "__init__.py").write_text("raise ImportError('hidden')")
    command = [sys.executable, str(SCRIPTS / "measure.py"), "--toy", "--out", str(folder / "out")]
    command += ["--archive", str(folder / "measure.tar.gz"), "--before", str(folder / "contact.tar.gz")]
    environment = (
        os.environ | {"PYTHONPATH": str(folder / "hidden"), "OMP_NUM_THREADS": "1"} | {"BAM_KERNELS_COMMIT": "abc1234"}
    )
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return SimpleNamespace(folder=folder, out=folder / "out", test=test, finished=finished)


needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the extension")


@pytest.mark.slow
@needs_kernels
def test_every_row_is_right_and_timed(run) -> None:
    assert run.finished.returncode == 0, run.finished.stdout + run.finished.stderr
    found = json.loads((run.out / "rows.json").read_text())
    kinds = {name: [row["kind"] for row in found if row["problem"] == name] for name in NAMES}
    assert kinds == {
        "32x64x16-teacher": ["cpu", "gemms-half", "compile-autocast"],
        "16x16x16": ["cpu", "gemms-half"],
        "sinkhorn-16x32x16": ["cpu", "eager"],
        "potentials-16x32x16": ["cpu", "eager"],
    }
    for row in found:
        assert row["status"] == "ok" and 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["wall_ms"] > 0 and row["share_of_floor"] > 0 and row["device"] and row["commit"] == "abc1234"
        if row["kind"] == "compile-autocast":
            assert 1e-4 < row["error_gradient"] < row["threshold"]  # bf16 products
        elif row["kind"] == "cpu" and row["benchmark"] == "loss":
            assert row["error_gradient"] < row["threshold"] and row["x_gemms-half"] > 0
    lines = rows.read(run.out / "rows.jsonl")
    assert [row.name for row in lines[:3]] == ["copy", "product bf16", "product fp32"]
    ours = [row for row in lines if row.backend == "cpu" and row.shape == "32x64x16"]
    assert [(row.how, row.teacher) for row in ours] == [("events", True), ("wall", True), ("host", True)]


@pytest.mark.slow
@needs_kernels
def test_what_failed_before_runs_again_and_all_is_archived(run) -> None:
    (again,) = [json.loads(line) for line in (run.out / "again-tests-cuda.tests.jsonl").read_text().splitlines()]
    assert again["test"] == run.test and again["outcome"] == "passed"
    assert f"no longer there: {FAILED}" in (run.out / "again-tests-cuda.log").read_text()
    ended = json.loads((run.out / "steps.json").read_text())
    assert {name for name, step in ended.items() if step["status"] == "passed"} == {
        *("again-tests-cuda", "compile-32x64x16-teacher", "rows", "trace-toy")
    }
    assert all(ended[name]["status"] == "not run: a toy run has no GPU" for name in ("racecheck", "ncu-cuda"))
    with tarfile.open(run.folder / "measure.tar.gz") as tar:
        assert {"rows.json", "rows.jsonl", "summary.txt", "trace-cpu-32x64x16.json.gz"} <= set(tar.getnames())
    shown = run.finished.stdout
    assert "== 32x64x16-teacher" in shown and "== Predictions" in shown and "== ncu" not in shown
    assert "racecheck" in shown.split("== Steps that did not pass")[1].split("\n\n")[0]
    why = "no checkout of the authors' code was given"
    assert f"not measured: authors-autocast of 32x64x16-teacher, 16x16x16: {why}\n" in shown


def machine() -> Machine:
    import torch

    return Machine(torch.device("cpu"), "a test", "none", 1, "none", gemm_gflops=1.0, half_gemm_gflops=1.0)


def test_a_row_that_is_wrong_is_written_and_not_timed(tmp_path, capsys) -> None:
    """A gradient off by one part in a thousand, and a competitor that cannot be made."""
    comparison = comparisons.comparisons(True)[1]
    options = SimpleNamespace(toy=True, authors=None)
    made = measurement.ProblemCompetitors(comparison, machine(), options)
    truth = made.truth()
    record = compare.Record(tmp_path)
    wrong = Truth(None, truth.gradient * 1.001)

    def broken(kind: str) -> Truth:
        if kind == "triton":
            raise RuntimeError("no such kernel")
        c = measurement.placeholder(kind)
        c.outputs, c.run = (lambda: wrong), (lambda: pytest.fail("timed"))
        return c

    made.competitor = broken
    for kind in ("cpu", "triton"):
        measurement.measure_row(made, kind, truth, 1.0, record)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["status"] for row in found] == ["failing", "failing"]
    assert found[0]["reason"] == "error above 1e-05" and found[1]["reason"] == "RuntimeError: no such kernel"
    assert all(row["median_ms"] is None for row in found) and rows.read(tmp_path / "rows.jsonl") == []
    assert "16x16x16 triton: FAILING: RuntimeError: no such kernel" in capsys.readouterr().out
    assert "FAILING" in measure_tables.ratios(found)


@pytest.fixture
def one_problem(tmp_path, monkeypatch) -> SimpleNamespace:
    """A process that has one problem to measure."""
    comparison = comparisons.comparisons(True)[1]
    monkeypatch.setattr(measurement, "comparisons", lambda toy: [comparison])
    monkeypatch.setattr(measurement.Machine, "detect", lambda *_: machine())
    options = SimpleNamespace(toy=True, authors=None, seconds=60.0)
    return SimpleNamespace(comparison=comparison, options=options, record=compare.Record(tmp_path))


@needs_kernels
def test_a_problem_without_truth_fails_in_all_its_rows(tmp_path, monkeypatch, one_problem) -> None:
    def broken(rows: measurement.ProblemCompetitors) -> Truth:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measurement.ProblemCompetitors, "truth", broken)
    assert measurement.measure_all(one_problem.options, one_problem.record) == compare.WRONG
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {row["kind"] for row in found} >= {"cpu", "gemms-half"}
    assert {(row["status"], row["reason"]) for row in found} == {("failing", "no truth: RuntimeError: out of memory")}


def test_what_has_no_row_is_listed_with_its_reason(tmp_path, one_problem) -> None:
    """A problem for which there was no time; then rows that a process did not come to, and one that it did."""
    comparison, record = one_problem.comparison, one_problem.record
    one_problem.options.seconds = 0.0
    measurement.measure_all(one_problem.options, record)
    kinds = ", ".join(comparison.kinds)
    assert f"not measured: {kinds} of {comparison.name}: no time was left for the problem" in measure_tables.summary(
        tmp_path
    )
    (tmp_path / "not_measured.json").unlink()
    record.expect([comparison, comparisons.comparisons(True)[2]])
    record.leave_out(comparison.name, ["cpu"], "why")
    again = compare.Record(tmp_path)
    again.expect([comparison, comparisons.comparisons(True)[2]])
    measurement.write(
        measurement.Row(measurement.placeholder("gemms-half"), "failing", ""), comparison, machine(), again
    )
    others = ", ".join(kind for kind in comparison.kinds if kind not in ("cpu", "gemms-half"))
    assert measure_tables.summary(tmp_path).split("== Not measured\n")[1].splitlines() == [
        f"not measured: cpu of {comparison.name}: why",
        f"not measured: {others} of {comparison.name}: not reached",
        "not measured: cpu, eager of sinkhorn-16x32x16: not reached",
    ]


def test_rows_of_tuned_tiles_say_so(tmp_path, monkeypatch) -> None:
    file = tmp_path / "tuned.json"
    monkeypatch.setenv("BAM_KERNELS_TUNED", str(file))
    record = compare.Record(tmp_path)
    for kind in ("triton-int16", "cuda-int16", "triton-flash-int16"):
        c = measurement.placeholder(kind)
        c.note = "note"
        made = Row(c, times_ms=(1.0,), floor_ms=0.5)
        measurement.write(made, comparisons.comparisons(True)[0], machine(), record, {"wall_ms": 1.0, "host_ms": 1.0})
        file.touch()
    assert [row["note"] for row in record.rows] == ["note", "note", "note, tuned tiles"]
    lines = {row.note for row in rows.read(tmp_path / "rows.jsonl")}
    assert lines == {"triton-int16", "cuda-int16", "triton-flash-int16, tuned tiles"}


@pytest.mark.parametrize("kind, kinds", [("cpu", ["cpu"]), ("truth", list(comparisons.comparisons(True)[1].kinds))])
def test_a_row_that_ended_its_process_fails_in_the_next(tmp_path, kind, kinds) -> None:
    """The row alone, or all rows of a problem whose truth could not be made."""
    comparison = comparisons.comparisons(True)[1]
    compare.Record(tmp_path).begin(comparison, kind)
    record = compare.Record(tmp_path)
    assert record.unfinished() == (comparison.name, kind)
    measurement.note_unfinished(comparisons.comparisons(True), machine(), record)
    assert record.kinds(comparison.name) == kinds
    assert {row["reason"] for row in record.rows} == {f"its process crashed or hung in {kind}"}
    assert compare.Record(tmp_path).kinds(comparison.name) == kinds
    if kind == "cpu":
        assert compare.Record(tmp_path).unfinished() is None


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "STUCK_S", 0.5)
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert compare.wait_or_kill(process, tmp_path / "now.json") != 0
    assert time.monotonic() - begin < 20
    quick = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert compare.wait_or_kill(quick, tmp_path / "now.json") == compare.WRONG


@pytest.mark.parametrize("codes, status", [([-9, 1, 0], 0), ([-9, 3], 1), ([1] * compare.MOST_PROCESSES, 1)])
def test_another_process_goes_on_after_one_that_crashed(tmp_path, monkeypatch, codes, status) -> None:
    """Until one comes to its end, 3: with rows that are wrong; not for ever."""
    left, started = list(codes), []
    monkeypatch.setattr(subprocess, "Popen", lambda command: started.append(command))
    monkeypatch.setattr(compare, "wait_or_kill", lambda process, now: left.pop(0))
    assert compare.measure_in_processes(SimpleNamespace(seconds=60.0, out=tmp_path)) == status
    assert not left and len(started) == len(codes) and all("--in-this-process" in command for command in started)


def test_failed_steps_run_again_in_their_own_form(tmp_path) -> None:
    ended = {"probe-cuda-embed": "failed: longer than 25 s", "probe-cuda-pass-long-sm80": "failed with 1"}
    ended |= {"probe-cuda-plan": "passed", "ranks-gloo-cuda": "failed with 1", "memcheck": "failed with 9"}
    (tmp_path / "steps.json").write_text(json.dumps({name: {"status": status} for name, status in ended.items()}))
    test = {"test": "tests/kernels/test_cuda_match.py::test_one[a b]", "outcome": "failed"}
    (tmp_path / "tests-sm80.tests.jsonl").write_text(json.dumps(test))
    for variant in ("sm_80", "sm_90a"):
        (tmp_path / variant).mkdir()
        (tmp_path / variant / "_C.so").touch()
    found = {step.name: step for step in Measure(tmp_path, tmp_path, False, None).repeated_steps(EarlierRun(tmp_path))}
    assert set(found) == {"again-tests-sm80", *(f"again-{name}" for name in ended if ended[name] != "passed")}
    older = [name for name, step in found.items() if "sm_80" in step.environment["BAM_KERNELS_EXTENSION"]]
    assert set(older) == {"again-tests-sm80", "again-probe-cuda-pass-long-sm80"}
    assert (tmp_path / "again-tests-sm80.txt").read_text() == test["test"] + "\n"
    (tmp_path / "sm_80" / "_C.so").unlink()
    for name in older:
        again = Measure(tmp_path, tmp_path, False, None).repeated_steps(EarlierRun(tmp_path))
        (step,) = [step for step in again if step.name == name]
        assert step.needs == f"build.py has not made sm_80 in {tmp_path}"  # nothing else runs under that name
    assert found["again-memcheck"].command[0] == "compute-sanitizer"


@pytest.mark.parametrize("code, alone", [(9, False), (1, True)])
def test_checked_tests_run_again_under_the_checker(tmp_path, code, alone) -> None:
    """All of them where the checker has found something, for then each may have passed; else those that failed."""
    contact, out = tmp_path / "contact", tmp_path / "out"
    for folder in (contact, out):
        folder.mkdir()
    (contact / "steps.json").write_text(json.dumps({"memcheck-rows": {"status": f"failed with {code}"}}))
    test = {"test": "tests/kernels/test_cuda_match.py::test_cluster", "outcome": "failed"}
    (contact / "memcheck-rows.tests.jsonl").write_text(json.dumps(test))
    (step,) = Measure(out, None, False, None).repeated_steps(EarlierRun(contact))
    assert step.name == "again-memcheck-rows" and step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert step.command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert str(out / "again-memcheck-rows.tests.jsonl") in step.command
    assert ("--only-tests" in step.command) == alone and (CHECKED_TESTS in step.command) != alone
    if alone:
        assert (out / "again-memcheck-rows.txt").read_text() == test["test"] + "\n"


def test_files_of_steps_that_do_not_run_stay(tmp_path) -> None:
    files = {"rows": ("rows.json", "rows.jsonl"), "ncu-cuda": ("ncu-cuda.csv",)}
    for name in ("rows.json", "ncu-cuda.csv"):
        (tmp_path / name).touch()
    earlier_run.remove(Run(tmp_path, None, only=["ncu-*"]), files)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
    earlier_run.remove(Run(tmp_path, None), files)
    assert not list(tmp_path.iterdir())


def test_the_archive_is_written_before_the_summary(tmp_path, monkeypatch) -> None:
    """The summary takes a while, and what ends the run may not wait for it."""
    archive = tmp_path / "measure.tar.gz"

    def ended(self: Measure, run: Run, before: EarlierRun) -> None:
        run.outcomes.append(Outcome("rows", "failed with 1"))
        run.write("rows.log", "so far")
        raise SystemExit(1)

    def summary(self: Measure, run: Run) -> str:
        with tarfile.open(archive) as tar:
            return f"{tar.getnames()}\n{run.shortfalls()}"

    monkeypatch.setattr(Measure, "run", ended)
    monkeypatch.setattr(Measure, "summary", summary)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--toy", "--out", str(tmp_path / "out"), "--archive", str(archive)])
    with pytest.raises(SystemExit):
        measure.main()
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("['rows.log']")


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "gpu__time_duration.sum": ("ns", "15,000"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.5"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "40"),
    "smsp__inst_executed.sum": ("inst", "8,700,000"),
    STALLED.format("barrier"): ("inst", "3.5"),
    STALLED.format("long_scoreboard"): ("inst", "9.25"),
    STALLED.format("selected"): ("inst", "11"),
    STALLED.format("wait"): ("inst", "1.5"),
    STALLED.format("math_pipe_throttle"): ("inst", "0.5"),
}


def test_counters_are_read(tmp_path) -> None:
    """A table of Nsight Compute's raw page among its messages: three launches of two kernels."""

    def line(*cells: str) -> str:
        return ",".join(f'"{cell}"' for cell in cells)

    values = [value for _, value in METRICS.values()]
    passes = "void bam::cuda::sinkhorn_pass_kernel<short, false>(Pass)"
    text = ["==PROF== Connected to process 7", line("ID", "Kernel Name", *METRICS)]
    text += [line("", "", *(unit for unit, _ in METRICS.values()))]
    text += [line("0", passes, *values), line("1", passes, "17,000", *values[1:]), line("2", "match_kernel", *values)]
    (tmp_path / "ncu.csv").write_text("\n".join(text))
    first, second = counters.read_counters(tmp_path / "ncu.csv")
    assert (first.kernel, first.launches, first.us) == ("sinkhorn_pass", 2, 16.0)
    assert (first.dram_percent, first.sm_percent, first.instructions) == (81.5, 40.0, 8.7e6)
    assert first.stalls == (("long_scoreboard", 9.25), ("barrier", 3.5), ("wait", 1.5))
    assert (second.kernel, second.us) == ("match", 15.0)
    assert "long_scoreboard 9.2, barrier 3.5, wait 1.5" in counters.counter_table([first])


def test_launches_of_a_trace() -> None:
    def event(category: str, name: str, ts: float, dur: float, correlation: int) -> dict:
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    events = [
        event("cuda_runtime", "cudaLaunchKernelExC", 100, 4, 1),
        event("cuda_driver", "cuLaunchKernelEx", 110, 5, 2),
        event("cuda_runtime", "cudaDeviceSynchronize", 116, 30, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 150, 2, 4),
        event("kernel", "sinkhorn_pass_kernel", 120, 15, 1),
        event("kernel", "match_kernel", 140, 30, 2),
        event("kernel", "match_kernel", 180, 40, 9),
    ]
    text = step_trace.launches(events)
    assert (
        "3 launches over 52 us of the host, 11 us inside them; between two of them 20.5 us (median), 35 us at most"
        in text
    )
    assert text.splitlines()[2].split() == ["35.0", "match_kernel", "cudaMemcpyAsync"]
    assert step_trace.kernels(events).splitlines()[1].split() == ["70.0", "2", "35.0", "match_kernel"]
    assert step_trace.launches([]) == "no launches"


def test_ratios_are_to_the_fastest_of_a_kind() -> None:
    def row(kind: str, ms: float) -> dict:
        c = measurement.placeholder(kind)
        made = Row(c, times_ms=(ms,), floor_ms=0.5 * ms).fields()
        return made | {"wall_ms": ms, "host_ms": ms}

    found = [row("cuda-int16", 0.5), row("compile-autocast", 2.0), row("compile-autocast-graph", 1.0)]
    ours, slower, _ = measure_tables.ratios(found).splitlines()[1:]
    assert ours.split()[-1] == "2.00" and "500.0" in ours and "50%" in ours
    assert slower.split()[-1] == "50%"
