"""Load the compiled extension `_C`, or keep the reason why it cannot be loaded.

The extension is independent of torch but shares torch's OpenMP runtime.
BAM_KERNELS_EXTENSION=FILE loads the build in FILE instead of the build in the package; if FILE is missing or does not
load, `import bam_kernels` raises ImportError.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (first, so that the extension finds torch's OpenMP runtime)

_NAME = "bam_kernels._C"
_FILE = "BAM_KERNELS_EXTENSION"


def _load_requested(path: str) -> ModuleType:
    """Load the build that the environment asks for. Raises: ImportError naming the variable and the file."""
    try:
        return _load_file(os.path.abspath(path))
    except ImportError as error:
        raise ImportError(f"{_FILE}={path} cannot be loaded: {error}") from error


def _load_file(path: str) -> ModuleType:
    loader = ExtensionFileLoader(_NAME, path)
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None  # None only without a loader
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


_C: Any = None
import_error: ImportError | None = None
_requested = os.environ.get(_FILE)
if _requested:
    _C = _load_requested(_requested)
else:
    try:
        _C = importlib.import_module(_NAME)
    except ImportError as error:
        import_error = error


class _Never(Exception):
    """Stand-in that no code raises."""


NotFinite: type[Exception] = getattr(_C, "NotFinite", _Never)
"""Error of the CPU kernels for rows that are not finite."""
