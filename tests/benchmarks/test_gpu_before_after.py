"""An earlier commit and this one, timed in turn: by one script of each, each with its own library."""

import subprocess
import sys
from pathlib import Path

import pytest

from bam_kernels.backends import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import measure_tables  # noqa: E402
import rows  # noqa: E402
from before_after import Against, BeforeAfter  # noqa: E402
from measure import Measure  # noqa: E402

needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the extension")


@pytest.mark.slow
@needs_kernels
def test_two_commits_are_timed_in_turn(tmp_path) -> None:
    """Here both are this one; the earlier one runs its own script from its folder."""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / "measure.py"), "--toy", "--out", str(out), "--against", str(REPOSITORY)]
    finished = subprocess.run([*command, "--only", "times-*"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    ran = [line.split()[3] for line in finished.stdout.splitlines() if "passed in" in line]
    assert ran == ["times-0-before", "times-0-after", "times-1-before", "times-1-after"]
    before, after = (rows.read(out / f"{tree}.jsonl") for tree in ("before", "after"))
    assert [row.name for row in before] == [row.name for row in after] and len(before) > 10
    table = finished.stdout.split("== Before and after\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 1 + len(before)


def test_medians_before_and_after(tmp_path) -> None:
    """Runs of 20 and 24 us before, of 11 after. One row is of one commit alone. First calls are left out."""

    def row(name: str, us: float, how: str = "graph") -> rows.Row:
        return rows.Row("kernel", name, "cuda", "8x8", how, us)

    values = {"times-0-before": 20.0, "times-0-after": 11.0, "times-1-before": 24.0, "times-1-after": 11.0}
    for name, us in values.items():
        lines = rows.Rows(tmp_path / f"{name}.jsonl")
        lines.add(row("match", us))
        lines.add(row("match", 1e6, "first"))
    rows.Rows(tmp_path / "times-1-after.jsonl").add(row("new", 5.0))
    built = BeforeAfter(tmp_path, Against(tmp_path, None), {}, toy=False)
    built.write()
    assert [row.value for row in rows.read(tmp_path / "before.jsonl")] == [22.0]
    assert [row.value for row in rows.read(tmp_path / "after.jsonl")] == [11.0, 5.0]
    _, match, new = measure_tables.summary(tmp_path).split("== Before and after\n")[1].splitlines()[:3]
    assert match.split() == ["match", "cuda", "8x8", "graph", "22.0", "11.0", "2.00", "20%"]
    assert new.split() == ["new", "cuda", "8x8", "graph", "-", "5.0", "-", "0%"]


def test_each_commit_loads_its_own_library_and_extension(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "site")
    script = tmp_path / "benchmarks" / "gpu" / "times.py"
    against = Against(tmp_path, tmp_path / "_C.so")
    assert against.fault() == f"{script}: there is no such file"
    script.parent.mkdir(parents=True)
    script.touch()
    assert against.fault() == f"{tmp_path / '_C.so'}: there is no such file"
    (tmp_path / "_C.so").touch()
    assert against.fault() is None
    measure = Measure(tmp_path / "out", None, False, None, against)
    before, after, *again = measure.before_after.steps()
    assert [step.name for step in again] == ["times-1-before", "times-1-after"]
    assert before.environment == {
        "PYTHONPATH": f"{tmp_path}:site",
        "BAM_KERNELS_EXTENSION": str(tmp_path / "_C.so"),
    }
    assert after.environment["PYTHONPATH"] == f"{REPOSITORY}:site"
    assert before.command[1] == str(script) and after.command[1] == str(SCRIPTS / "times.py")
    compiled = [step.name for step in measure.compile_steps()]
    assert compiled[-2:] == ["compile-before", "compile-after"]
    assert all("--rows" not in step.command for step in measure.before_after.compile_steps())
