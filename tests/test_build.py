"""setup.py in a copy of the sources: what it says when it fails, and the library without an extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("setuptools", "ninja", "pybind11"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sources(tmp_path) -> Path:
    copy = tmp_path / "sources"
    for folder in ("bam_kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_a_failed_compile_names_the_command_and_the_way_without(sources):
    (sources / "csrc" / "cpu" / "rows.cpp").write_text("this is no C++\n")
    result = build(sources, BAM_KERNELS_BUILD="cpu", MAX_JOBS="2")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "FAILED" in output and "rows.cpp -o rows." in output
    assert "BAM_KERNELS_BUILD=none pip install -e ." in output


def test_an_unknown_mode_is_an_error(sources):
    result = build(sources, BAM_KERNELS_BUILD="gpu")
    assert result.returncode != 0 and "auto, cpu, cuda or none, got 'gpu'" in result.stderr


def test_without_the_extension_the_reference_works_and_says_so(sources):
    assert build(sources, BAM_KERNELS_BUILD="none").returncode == 0
    # An editable install of the library would lend its own extension to this copy.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, warnings
from bam_kernels import bam_loss
z = torch.randn(2, 6, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert torch.equal(bam_loss(z), bam_loss(z, backend="reference"))
assert len(caught) == 1 and "not built" in str(caught[0].message), caught
try:
    bam_loss(z, backend="cpu")
except ValueError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env=os.environ | {"PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'backend="cpu" cannot run here: the extension is not built' in result.stdout
    assert "pip install -e ." in result.stdout
