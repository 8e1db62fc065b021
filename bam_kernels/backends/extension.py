"""The compiled extension, or why there is none. It is independent of torch, but shares torch's OpenMP runtime.

BAM_KERNELS_EXTENSION=FILE loads that build of it instead of the one that lies in the package.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (loaded first, so that the extension finds torch's OpenMP runtime)

_NAME = "bam_kernels._C"
_FILE = "BAM_KERNELS_EXTENSION"


def _load() -> ModuleType:
    path = os.environ.get(_FILE)
    if not path:
        return importlib.import_module(_NAME)
    try:
        return _load_file(os.path.abspath(path))
    except ImportError as error:
        raise ImportError(f"{_FILE}={path} cannot be loaded: {error}") from error


def _load_file(path: str) -> ModuleType:
    loader = ExtensionFileLoader(_NAME, path)
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


_C: Any = None
import_error: ImportError | None = None
try:
    _C = _load()
except ImportError as error:
    import_error = error
