"""BAM_KERNELS_EXTENSION: another build of the extension than the one in the package; and builds of older sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.extension import _C

PROGRAM = """
import bam_kernels
from bam_kernels.backends import cpu
from bam_kernels.backends.extension import _C
from bam_kernels import _C as found
assert found is _C
print(_C.__file__, cpu.unavailable())
"""


def load(path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"BAM_KERNELS_EXTENSION": str(path)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(_C is None, reason="needs the extension")
def test_the_file_named_is_the_one_that_is_loaded(tmp_path):
    copy = tmp_path / Path(_C.__file__).name
    shutil.copy(_C.__file__, copy)
    result = load(copy)
    assert result.stdout == f"{copy} None\n", result.stderr


@pytest.mark.parametrize("text", [None, "this is no library\n"], ids=["missing", "no extension"])
def test_the_package_is_not_imported_with_another_file_than_the_one_named(text, tmp_path):
    path = tmp_path / "_C.so"
    if text:
        path.write_text(text)
    result = load(path)
    assert result.returncode == 1 and not result.stdout
    (said,) = [line for line in result.stderr.splitlines() if f"BAM_KERNELS_EXTENSION={path} cannot be loaded" in line]
    assert said.startswith(f"ImportError: BAM_KERNELS_EXTENSION={path} cannot be loaded: {path}: ")


# An extension as its sources were before some constants; the message is printed.
OLDER = """
import sys
from types import SimpleNamespace
import torch
names = ("owned", "threads", "stages", "few_stages", "group_bytes", "groups", "potential_bytes", "scratch_bytes")
sys.modules["bam_kernels._C"] = SimpleNamespace(with_cuda=True, cuda_constants=dict.fromkeys(names, 1))
from bam_kernels.backends import cuda
print(cuda.unavailable(torch.device("cuda")))
"""


def test_an_extension_of_older_sources_is_refused():
    environment = {name: value for name, value in os.environ.items() if name != "BAM_KERNELS_EXTENSION"}
    result = subprocess.run([sys.executable, "-c", OLDER], env=environment, capture_output=True, text=True)
    lacks = "older than these sources, it lacks register_threads, on_chip_threads; rebuild it"
    assert lacks in result.stdout, result.stderr
    assert shapes.MISSING == []  # of the extension that this process has
