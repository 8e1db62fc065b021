"""The compiled extension, or why there is none. It is independent of torch, but shares torch's OpenMP runtime."""

import importlib
from typing import Any

import torch  # noqa: F401  (loaded first, so that the extension finds torch's OpenMP runtime)

_C: Any = None
import_error: ImportError | None = None
try:
    _C = importlib.import_module("bam_kernels._C")
except ImportError as error:
    import_error = error
