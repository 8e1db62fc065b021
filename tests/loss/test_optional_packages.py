"""The library, its GPU tests and its benchmarks on a machine that has torch, but not all that the driver needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ("nvtx", "tyro", "docstring_parser", "kornia", "kornia_rs", "tqdm")
IMPORT = """
import importlib
import pytest
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    try:
        importlib.import_module(name)
    except pytest.skip.Exception as skipped:
        print(f"{name}: {skipped}")
"""
PROFILE = """
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import report
competitor = SimpleNamespace(name="the competitor", fresh=lambda: (), run=lambda: None)
report.profile([SimpleNamespace(competitor=competitor)], Path(sys.argv[2]))
"""


def modules(folder: str, *patterns: str) -> list[str]:
    return sorted(path.stem for pattern in patterns for path in (ROOT / folder).glob(pattern))


def library() -> list[str]:
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "bam_kernels").rglob("*.py")]
    return sorted(".".join(name for name in part if name != "__init__") for part in parts)


# Where Python looks first, and what it imports there.
IMPORTED = {
    "library": (".", library()),
    "tests": ("tests/kernels", modules("tests/kernels", "test_gpu.py", "test_cuda*.py")),
    "interpreted tests": ("tests", [f"interpreted.{name}" for name in modules("tests/interpreted", "test_*.py")]),
    "benchmarks": (
        "benchmarks",
        ["report", "problem", "competitor", "competitors", "our_kernels", "hardware", "authors", "loss", "sinkhorn"],
    ),
    "benchmarks of a GPU": ("benchmarks/gpu", modules("benchmarks/gpu", "*.py")),
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program before whose first line the packages have been hidden."""
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({HIDDEN}))  # their import raises ImportError\n"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    command = [sys.executable, "-c", hidden + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("folder, names", IMPORTED.values(), ids=IMPORTED)
def test_imported_without_them(folder, names):
    pytest.importorskip("triton")
    assert len(names) > 5
    done = run(IMPORT, str(ROOT / folder), *names)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_command_line_says_what_it_lacks():
    start = "import runpy; sys.path.insert(0, sys.argv[1]); runpy.run_module('loss', run_name='__main__')"
    done = run(start, str(ROOT / "benchmarks"))
    assert done.returncode == 1 and "pip install tyro" in done.stderr, done.stderr


def test_a_benchmark_is_profiled_without_ranges(tmp_path):
    done = run(PROFILE, str(ROOT / "benchmarks"), str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr
    assert "the competitor" in (tmp_path / "trace.json").read_text()
