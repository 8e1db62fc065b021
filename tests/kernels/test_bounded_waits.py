"""A build with bounded waits, as PTX: whatever spins on a barrier looks at a clock, and reports and traps. No GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
HOMES = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
# In the order in which setup.py looks for it.
FOUND = [*(shutil.which(f"{home}/bin/nvcc") for home in HOMES if home), shutil.which("nvcc")]
NVCC = next(filter(None, [*FOUND, shutil.which("/usr/local/cuda/bin/nvcc")]), None)
if NVCC is None:
    pytest.skip("needs nvcc", allow_module_level=True)
VERSION = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
pytestmark = pytest.mark.xfail(
    "release 13.0" not in VERSION,
    raises=(AssertionError, ValueError),
    reason="the PTX of another nvcc than 13.0 may read differently",
)


def ptx(folder: Path, file: str, *flags: str) -> str:
    out = folder / f"{file}.ptx"
    command = [NVCC, "-std=c++17", "-arch=compute_90a", *flags, "-ptx", "-o", str(out), str(SOURCES / file)]
    subprocess.run(command, check=True)
    return out.read_text()


# Kernels that wait for bulk copies and for other blocks of a cluster.
@pytest.mark.parametrize("file", ("sinkhorn_pass.cu", "match.cu", "sinkhorn_on_chip.cu"))
def test_every_spin_of_a_bounded_build_can_give_up(tmp_path, file):
    code = ptx(tmp_path, file, "-DBAM_BOUNDED_WAITS")
    entries = re.split(r"\n\.(?:visible )?(?:entry|func) ", code)
    (give_up,) = (e for e in entries if "give_up" in e.partition("(")[0] and "trap;" in e)
    assert "vprintf" in give_up
    name = ", ".join(str(byte) for byte in f"/{file}".encode())  # of the file, in the report
    assert name in code
    kernels = [e for e in entries if "_kernel" in e.partition("(")[0]]
    assert kernels
    for kernel in kernels:
        spins = kernel.count("mbarrier.try_wait")
        assert spins and len(re.findall(r"^\s*\S*give_up\S*,", kernel, re.MULTILINE)) == spins


def test_no_clock_is_in_other_builds(tmp_path):
    code = ptx(tmp_path, "sinkhorn_on_chip.cu")
    assert "mbarrier.try_wait" in code and "globaltimer" not in code and "give_up" not in code
