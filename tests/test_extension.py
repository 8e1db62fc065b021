"""BAM_KERNELS_EXTENSION: another build of the extension than the one in the package, or why it cannot be loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bam_kernels.backends.extension import _C

PROGRAM = """
import sys
from bam_kernels.backends.extension import _C, import_error
if import_error:
    sys.exit(str(import_error))
from bam_kernels.backends import cpu
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


def test_a_file_that_is_not_there_or_no_extension_says_so(tmp_path):
    text = tmp_path / "_C.so"
    text.write_text("this is no library\n")
    for path, why in ((tmp_path / "missing.so", "No such file"), (text, "")):
        result = load(path)
        assert result.returncode == 1
        assert f"BAM_KERNELS_EXTENSION={path} cannot be loaded: " in result.stderr
        assert why in result.stderr
