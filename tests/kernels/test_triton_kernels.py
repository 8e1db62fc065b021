"""The Triton kernels where there is no GPU: interpreted/ in processes of its own, whose Triton is the interpreter."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bam_kernels.backends import triton as backend

MODULES = sorted((Path(__file__).resolve().parents[1] / "interpreted").glob("test_*.py"))


@pytest.fixture(scope="module")
def running(request) -> Iterator[dict[Path, subprocess.Popen]]:
    """All modules at once: each is one thread of numpy."""
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if default := request.config.getoption("torch_default"):
        command.append(f"--torch-default={default}")
    processes = {
        module: subprocess.Popen(
            [*command, module], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for module in MODULES
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_interpreted(running, module):
    output, _ = running[module].communicate()
    assert running[module].returncode == 0, output[-8000:]
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output[-2000:]


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
