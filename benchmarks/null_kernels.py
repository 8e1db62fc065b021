"""Kernels that return at once, so that a step on CPU tensors takes what the host of a GPU would take, and no more.

Inside `null_kernels()` the backends cuda and triton take CPU tensors. Every launch is counted by the name of its kernel
and does nothing, so losses and gradients are whatever the allocated memory held. What does nothing:

- CUDA kernels: the table of csrc/cuda/cuda.h, compiled with functions that count their calls.
- Triton kernels: the function that launches them, and the launcher of a compiled kernel, which a repeated step calls.
- Matrix products: one operator of torch, so that a call of torch's dispatcher remains in the place of each product.
- Operators of torch that read or write all embeddings (IDLE_OPERATORS): an empty implementation for CPU tensors.
- The check of the embeddings for values that are not finite, which is made on CPUs only.

A stand-in takes time of its own, about 5 us for a product, 2 to 3 us for an idle operator and less than 1 us for a
launch. All but the CUDA table are Python functions. On a GPU the work of the driver for the launch takes their place.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bam_kernels.backends import cuda, triton
from bam_kernels.backends.cuda.device import Device
from bam_kernels.backends.extension import _C

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "cuda.h"
COMPILER = os.environ.get("CXX", "g++")
SOURCE = """
#include "cuda.h"

template <int kKernel, class Params>
void launch(const Params&, const bam::cuda::Where&);

static const bam::cuda::Kernels kernels = {ENTRIES};
#pragma GCC visibility push(default)
extern "C" {
int64_t launches[sizeof(kernels) / sizeof(void (*)())];
const void* table() { return &kernels; }
}
#pragma GCC visibility pop

template <int kKernel, class Params>
void launch(const Params&, const bam::cuda::Where&) {
  ++launches[kKernel];
}
"""
# An H100 as csrc/cuda/device.cu describes it. The launches of a step depend on what a device can hold.
H100 = Device(0, "null kernels", (9, 0), 132, 80 << 30, 50 << 20, 227 << 10, 1 << 10, (66, 33, 16, 8), True)
PACKAGES = {"cuda": cuda, "triton": triton}
PRODUCT = "product"
IDLE_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "addr_": lambda out, *_, **__: out,
    "mul.out": lambda a, b, *, out: out,
}
_library = torch.library.Library("bam_null", "DEF")
_library.define("product(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()")


class NullCompiled:
    """Stand-in for a kernel that Triton has compiled: what `CompiledLaunch` reads; `run` counts a launch."""

    function, packed_metadata = 0, ()

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def run(self, *arguments: Any) -> None:
        self._count()


class NullKernels:
    """Row kernels of both backends that count launches by the name of the kernel and do nothing else."""

    def __init__(self) -> None:
        self._counted: Counter[str] = Counter()
        self._cuda_names: tuple[str, ...] = ()

    def row_kernels(self, backend: str) -> Any:
        """Row kernels that take CPU tensors; those of CUDA take the device to be an H100."""
        if backend == "triton":
            from bam_kernels.backends.triton.row_kernels import TritonKernels

            return TritonKernels(self._launch_triton, self._repeat_triton)
        from bam_kernels.backends.cuda.row_kernels import CudaKernels

        self._cuda_names = kernel_names()
        return CudaKernels(_C.cuda_kernels_at(compiled(self._cuda_names).table()), lambda index: H100, "cpu")

    def _launch_triton(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self._counted[kernel.__name__] += 1

    def _repeat_triton(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> Any:
        """The launch that a recorded step repeats, as of a compiled kernel."""
        from bam_kernels.backends.triton.direct import CompiledLaunch, all_arguments

        compiled = NullCompiled(partial(self._launch_triton, kernel, grid))
        return CompiledLaunch(compiled, grid, all_arguments(kernel, args, options))

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Stand-in for `bam_kernels.precision.multiply`: one operator, which counts a product."""
        torch.ops.bam_null.product.default(a, b, out, add)
        return out

    def count_product(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        self._counted[PRODUCT] += 1

    def launches(self) -> Counter[str]:
        """Launches so far by the name of the kernel, PRODUCT for matrix products."""
        names = self._cuda_names
        return self._counted + Counter(dict(zip(names, cuda_counters(names), strict=True)) if names else {})


@contextmanager
def null_kernels(backends: Sequence[str] = ("cuda", "triton")) -> Iterator[NullKernels]:
    """Within the block the backends, matrix products and IDLE_OPERATORS do nothing, on CPU tensors.

    Raises: RuntimeError with the compiler's message if the table of CUDA kernels does not compile.
    """
    null = NullKernels()
    with ExitStack() as stack:
        for name in backends:
            made = null.row_kernels(name)
            stack.enter_context(mock.patch.object(PACKAGES[name], "kernels", lambda made=made: made))
            stack.enter_context(mock.patch.object(PACKAGES[name], "unavailable", lambda device: None))
        stack.enter_context(mock.patch("bam_kernels.backends.unit_rows.multiply", null.multiply))
        for module in ("engine.rows", "reference"):
            stack.enter_context(mock.patch(f"bam_kernels.{module}.check_finite", lambda *_: None))
        product = stack.enter_context(torch.library._scoped_library("bam_null", "IMPL"))
        product.impl(PRODUCT, null.count_product, "CompositeExplicitAutograd")
        operators = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name, does_nothing in IDLE_OPERATORS.items():
            operators.impl(name, does_nothing, "CPU")
        yield null


def unavailable(backend: str) -> str | None:
    """Reason why this backend cannot run with null kernels here, or None."""
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if _C is None:
        return "the extension is not built"
    return None if shutil.which(COMPILER) else f"there is no compiler {COMPILER}; set CXX to one"


def kernel_names() -> tuple[str, ...]:
    """Names of the CUDA kernels, in the order of their table."""
    (members,) = re.findall(r"^struct Kernels \{(.*?)^\};", HEADER.read_text(), re.M | re.S)
    return tuple(re.findall(r"\(\*(\w+)\)", members))


@cache
def compiled(names: tuple[str, ...]) -> ctypes.CDLL:
    """A library with a table of CUDA kernels of these names that count their calls.

    Raises: RuntimeError if the compiler reports an error, for example because the table has more kernels.
    """
    entries = ", ".join(f"launch<{i}>" for i in range(len(names)))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "null_kernels.cpp"), Path(folder, "null_kernels.so")
        source.write_text(SOURCE.replace("ENTRIES", entries))
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
        command = [COMPILER, *flags, f"-I{HEADER.parent}", str(source), "-o", str(library)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"null kernels do not compile: {finished.stderr.strip()}")
        loaded = ctypes.CDLL(str(library))
    loaded.table.restype = ctypes.c_void_p
    return loaded


def cuda_counters(names: tuple[str, ...]) -> ctypes.Array:
    """How often each CUDA kernel was launched in this process."""
    return (ctypes.c_int64 * len(names)).in_dll(compiled(names), "launches")
