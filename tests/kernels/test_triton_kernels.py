"""The Triton kernels where there is no GPU: interpreted/ in processes of its own, whose Triton is the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bam_kernels.backends import triton as backend

MODULES = sorted((Path(__file__).resolve().parents[1] / "interpreted").glob("test_*.py"))


SLOW = [f"test_triton_{part}" for part in ("defaults", "flash", "forms", "sinkhorn", "sixteen_bit")]
MARKED = [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem) for path in MODULES]


@pytest.mark.parametrize("module", MARKED)
def test_interpreted(request, module):
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", module]
    if default := request.config.getoption("torch_default"):
        command.append(f"--torch-default={default}")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]


def test_the_library_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, bam_kernels
from bam_kernels.backends import triton
assert "Triton is not installed" in triton.unavailable(torch.device("cuda"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_need_the_interpreter():
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET" in backend.unavailable(torch.device("cpu"))
    assert backend.unavailable(torch.device("cuda")) is None
    assert "got mps" in backend.unavailable(torch.device("mps"))
