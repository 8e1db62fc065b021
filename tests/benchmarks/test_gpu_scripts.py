"""The scripts for a GPU that one has for minutes, at toy size: limits, what a kill leaves, what a fault looks like."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bam_kernels.backends.extension import _C
from bam_kernels.ways import GPU_WAYS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import contact  # noqa: E402
import rows  # noqa: E402
from steps import PYTHON, Outcome, Run, Step, extension_environment  # noqa: E402

needs_extension = pytest.mark.skipif(_C is None, reason="needs the extension")
needs_compiler = pytest.mark.skipif(_C is None or not shutil.which("g++"), reason="needs the extension and g++")


def program(text: str) -> list[str]:
    return [PYTHON, "-c", text]


def archived(file: Path) -> dict[str, str]:
    with tarfile.open(file) as tar:
        return {name: tar.extractfile(name).read().decode() for name in tar.getnames()}


def test_each_step_ends_by_itself_or_by_its_limit(tmp_path):
    """One that waits for ever takes what it has started along, and no other step."""
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {WAITS!r}]); time.sleep(60)"
    steps = [
        Step("hangs", program(child), 1.0),
        Step("fails", program("print('why'); raise SystemExit(3)"), 20),
        Step("passes", program("print('result')"), 20),
        Step("not-here", program(""), 20, needs="no GPU"),
    ]
    begin, handler = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with Run(tmp_path / "out", tmp_path / "a.tar.gz") as run:
        ended = {step.name: step for step in run.steps(steps, at_once=3)}
    assert time.monotonic() - begin < 15 and signal.getsignal(signal.SIGTERM) is handler
    assert ended["hangs"].status == "failed: longer than 1 s" and ended["hangs"].failed
    assert ended["fails"].status == "failed with 3" and ended["fails"].last_line == "why"
    assert ended["passes"].status == "passed" and not ended["passes"].failed
    assert ended["not-here"].status == "not run: no GPU"
    files = archived(tmp_path / "a.tar.gz")
    assert files["passes.log"] == "result\n" and set(json.loads(files["steps.json"])) == set(ended)
    time.sleep(0.2)
    assert not (tmp_path / "out" / "grandchild").exists()


WAITS = "import time; time.sleep(2.5); open('grandchild', 'w')"


def test_no_step_begins_after_the_end_and_none_outlasts_it(tmp_path):
    with Run(tmp_path, None, seconds=1.6) as run:
        ended = run.steps([Step("long", program("import time; time.sleep(60)"), 50), Step("late", program(""), 5)])
    assert [step.status for step in ended] == ["failed: longer than 2 s", "failed: no time was left for it"]


def test_only_what_is_asked_for(tmp_path):
    steps = [Step("probe-a", program(""), 9), Step("probe-b", program(""), 9), Step("times", program(""), 9)]
    with Run(tmp_path, None, only=["probe-*"]) as run:
        assert [step.name for step in run.steps(steps)] == ["probe-a", "probe-b"]
        run.check_only()
    with Run(tmp_path, None, only=["prob"]) as run:
        assert run.steps(steps) == []
        with pytest.raises(ValueError, match="--only prob: no such step; there are probe-a, probe-b, times"):
            run.check_only()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_its_archive(tmp_path, signal_number):
    text = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import steps
steps.ARCHIVE_EVERY_S = 0.1
from pathlib import Path
with steps.Run(Path("out"), Path("a.tar.gz")) as run:
    run.steps([steps.Step("slow", [sys.executable, "-uc", "print('so far'); import time; time.sleep(9)"], 60)])
"""
    process = subprocess.Popen(program(text), cwd=tmp_path)
    log, end = tmp_path / "out" / "slow.log", time.monotonic() + 20
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal_number)
    process.wait(10)
    assert archived(tmp_path / "a.tar.gz")["slow.log"] == "so far\n"


def test_the_extension_of_a_variant(tmp_path):
    assert extension_environment(None, "sm_80") == {} == extension_environment(tmp_path, "sm_80")
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_80" / "_C.cpython-312-x86_64-linux-gnu.so").touch()
    assert extension_environment(tmp_path, "sm_80")["BAM_KERNELS_EXTENSION"].endswith(
        "sm_80/_C.cpython-312-x86_64-linux-gnu.so"
    )


def test_a_build_that_is_not_there_runs_under_no_name(tmp_path):
    """Where a step needs code for sm_80 or bounded waits, the installed extension does not stand in for them."""
    none = contact.Contact(tmp_path, None, toy=False)
    for step in (*none.probes_for_older(), none.pytest("tests-sm80", [], 1, 0, variant="sm_80")):
        assert step.needs == "build.py has not made sm_80 in None"
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_80" / "_C.so").touch()
    made = contact.Contact(tmp_path, tmp_path, toy=False)
    assert {step.needs for step in made.probes_for_older()} == {None}
    assert not [step.name for step in made.probes_for_older() if "cluster" in step.name.replace("beyond-clusters", "")]
    command = [PYTHON, SCRIPTS / "contact.py", "--out", tmp_path / "out", "--extensions", tmp_path]
    refused = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert refused.returncode == 1 and "there is no sm_90a in it" in refused.stderr


class Recorded:
    """Stands for a run: what it is given, in order; facts has failed, all else has passed."""

    def __init__(self, facts: str, out: Path) -> None:
        self.facts, self.out, self.steps_given = facts, out, []

    def chosen(self, name):
        return True

    def steps(self, steps, at_once=1):
        self.steps_given += steps
        return [Outcome(step.name, self.facts if step.name == "facts" else "passed") for step in steps]


@pytest.mark.parametrize("facts", ["passed", "failed with 1", "failed with 2"])
def test_an_extension_that_does_not_load_is_built_there(tmp_path, facts):
    run, made = Recorded(facts, tmp_path), contact.Contact(tmp_path / "out", tmp_path / "carried", toy=False)
    made.run(run)
    names = [step.name for step in run.steps_given]
    assert ("build" in names) == (facts == "failed with 1") and len(names) == len(set(names))
    if "build" in names:
        assert names.index("build") < names.index("probe-triton-pass") < names.index("probe-cuda-pass-block")
        assert made.extensions == tmp_path / "out-extensions"


def test_a_hung_probe_is_repeated_with_waits_that_end(tmp_path):
    (tmp_path / "bounded").mkdir()
    (tmp_path / "bounded" / "_C.so").touch()
    hung = "failed: longer than 25 s"
    names = ("probe-cuda-pass-block", "probe-cuda-pass-block-sm80", "probe-triton-pass")
    probed = [Outcome(name, hung) for name in names] + [Outcome("probe-cuda-stats", "failed with 1")]
    again = contact.Contact(tmp_path, tmp_path, toy=False).bounded_probes(probed)
    assert [step.name for step in again] == ["probe-cuda-pass-block-bounded"] and again[0].needs is None
    assert again[0].environment["BAM_KERNELS_EXTENSION"].endswith("bounded/_C.so")


def test_the_kernels_are_tried_as_auto_does_without_a_trace_on_the_machine(tmp_path):
    """Each way by itself, early; verdicts are kept below OUT alone, and results of an earlier run go first."""
    for way in GPU_WAYS:
        (tmp_path / f"verify-{way}.json").write_text("of an earlier run")
    run = Recorded("passed", tmp_path)
    contact.Contact(tmp_path, None, toy=False).run(run)
    steps = [step for step in run.steps_given if step.name.startswith("verify-")]
    assert len(steps) == len({step.environment["XDG_CACHE_HOME"] for step in steps}) == len(GPU_WAYS)
    for way, step in zip(GPU_WAYS, steps, strict=True):
        file = tmp_path / f"verify-{way}.json"
        assert step.command[1:] == ["-m", "bam_kernels.verify", "--ways", way, "--json", str(file)]
        assert Path(step.environment["XDG_CACHE_HOME"]).is_relative_to(tmp_path) and step.needs is None
        assert not file.exists()
    names = [step.name for step in run.steps_given]
    assert names.index("probe-cuda-stats") < names.index("verify-cuda") < names.index("tests-triton")
    assert {step.needs for step in contact.Contact(tmp_path, None, toy=True).verify()} == {"a toy run has no GPU"}


def test_steps_say_of_which_run_they_are(tmp_path):
    for only in (["a", "b"], ["b"]):
        with Run(tmp_path, None, only=only) as run:
            run.steps([Step("a", program(""), 9), Step("b", program(""), 9)])
    ended = json.loads((tmp_path / "steps.json").read_text())
    assert ended["b"]["run"] == run.id != ended["a"]["run"]


@needs_compiler
@pytest.mark.parametrize("wrong", ["form", "nothing was checked"])
def test_a_probe_that_does_not_run_what_it_is_named_for_is_wrong(wrong, capsys, monkeypatch, tmp_path):
    import probe
    import probe_checks

    case = dataclasses.replace(probe.CASES["cuda-stats"], form="")
    if wrong == "form":
        case = dataclasses.replace(probe.CASES["cuda-pass-block"], form="long")
    else:
        monkeypatch.setitem(probe_checks.CHECKS, "stats", lambda *_: None)
    assert probe.probe("named", case, True, tmp_path) == 1
    assert f"named: WRONG: {wrong}" in capsys.readouterr().out


def test_what_fails_is_counted(capsys):
    import times

    written = rows.Rows(None)
    times.attempt(written, "kernel", "match", "cuda", "2x2", "graph", lambda: 1.0)
    assert written.failed == 0
    times.attempt(written, "kernel", "match", "cuda", "2x2", "graph", lambda: [][0])
    assert written.failed == 1 and "FAILED kernel match cuda 2x2 graph: IndexError" in capsys.readouterr().out


def test_rows_are_read_back_up_to_where_they_were_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl"
    written = rows.Rows(file)
    for value in (1.5, 2.5):
        written.add(rows.Row("kernel", "match", "cuda", "2048x8192", "graph, cold", value))
    with file.open("a") as cut:
        cut.write('{"kind": "ker')
    assert [row.value for row in rows.read(file)] == [1.5, 2.5]


LOST = """
import pytest, torch
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = lambda: None
def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_right():
    pass
def test_that_loses_the_context():
    torch.cuda.synchronize = lost
    lost()
@pytest.mark.parametrize("i", range(4))
def test_after_it(i):
    torch.cuda.synchronize()
"""


def test_outcomes_of_what_cannot_be_imported_and_what_is_skipped(tmp_path):
    (tmp_path / "test_broken.py").write_text("import not_there")
    (tmp_path / "test_other.py").write_text("import pytest\ndef test_it():\n    pytest.skip('no clusters here')")
    command = [PYTHON, "-m", "pytest", "-q", "-p", "pytest_gpu", "--outcomes", "found.jsonl", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    (tmp_path / "found.jsonl").write_text('{"test": "of an earlier run"}\n')
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(SCRIPTS)}, capture_output=True)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(row["test"], row["outcome"]) for row in found] == [
        ("test_broken.py", "failed"),
        ("test_other.py::test_it", "skipped"),
    ]
    assert "not_there" in found[0]["error"] and "no clusters here" in found[1]["error"]


@pytest.mark.parametrize("workers", [0, 1])
def test_outcomes_come_one_by_one_and_a_lost_context_ends_its_worker(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_lost.py").write_text(LOST)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "pytest_gpu", "--outcomes", "found.jsonl", "-p", "no:cacheprovider"]
    command += ["-n", str(workers)] if workers else []
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(SCRIPTS)}, capture_output=True)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    failed = {row["test"]: row["error"] for row in found if row["outcome"] == "failed"}
    assert "illegal memory access" in failed["test_lost.py::test_that_loses_the_context"]
    after = {row["test"]: row["outcome"] for row in found if "after" in row["test"]}
    # In one process all that follow fail; a new worker runs them.
    assert len(after) == 4 and set(after.values()) == ({"passed"} if workers else {"failed"})


# What the emulator's kernel does with each fault, and what contact's summary says of the step that runs it.
CONSEQUENCES = {
    "wrong phase": ("probe-cuda-pass-block", "failed with 1"),
    "write past the end": ("probe-cuda-columns", "failed with 1"),
    "no end": ("probe-cuda-on-chip", "failed: longer than"),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fault", CONSEQUENCES)
def test_contact_names_a_planted_fault_and_goes_on(tmp_path, fault):
    """A kernel with a wrong phase, one that writes out of bounds, one that never ends: the others still run."""
    import planted_faults

    planted = planted_faults.FAULTS[fault]
    step, status = CONSEQUENCES[fault]
    environment = os.environ | {"BAM_EMULATED": planted_faults.build(planted)}
    command = [PYTHON, SCRIPTS / "contact.py", "--toy", "--out", tmp_path, "--only", step, "probe-cuda-stats"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    ended = json.loads((tmp_path / "steps.json").read_text())
    assert ended[step]["status"].startswith(status) and ended["probe-cuda-stats"]["status"] == "passed"
    failures = (tmp_path / "summary.txt").read_text().split("== Steps that did not pass")[1]
    assert step in failures and "probe-cuda-stats" not in failures
    log = (tmp_path / f"{step}.log").read_text()
    expected = {
        "wrong phase": f"{planted.kernel} ...Traceback",
        "write past the end": "written outside an output",
        "no end": f"{planted.kernel} ...",
    }
    assert expected[fault] in log and (fault != "no end" or log.rstrip().endswith(expected[fault]))


@needs_extension
def test_contact_at_toy_size(tmp_path):
    only = ["probe-cuda-pass-cluster", "tests-cuda", "times"]
    command = [PYTHON, SCRIPTS / "contact.py", "--toy", "--out", tmp_path / "out", "--archive", tmp_path / "a.tar.gz"]
    done = subprocess.run([*map(str, command), "--only", *only], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = archived(tmp_path / "a.tar.gz")
    assert {name: step["status"] for name, step in json.loads(files["steps.json"]).items()} == dict.fromkeys(
        only, "passed"
    )
    tests, failures = files["summary.txt"].split("== Steps that did not pass")
    assert "probe-cuda" not in failures and "tests-cuda       6       0        0" in tests
    measured = rows.read(tmp_path / "out" / "rows.jsonl")
    assert {(row.kind, row.name) for row in measured} >= {("kernel", "match"), ("step", "loss and gradient")}
    assert all(row.value > 0 for row in measured)
