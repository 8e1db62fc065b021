"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against emulator/, whole kernels over fibers; for tests."""

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from bam_kernels.backends.cuda.device import Device
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.backends.extension import _C

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
EMULATOR = Path(__file__).parent / "emulator"
FAMILIES = [path.stem for path in sorted(SOURCES.glob("*.cu")) if path.stem != "device"]
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
# Four multiprocessors with what one of a Hopper holds.
HOPPER = Device(0, "emulator", (9, 0), 4, 1 << 30, 1 << 20, 227 << 10, 1 << 10, (2, 1, 1, 1), True, True)


@cache
def library() -> ctypes.CDLL:
    """Loaded from the file that BAM_EMULATED names, or compiled: once in a process, and for those that it starts."""
    if "BAM_EMULATED" not in os.environ:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["BAM_EMULATED"] = _build(Path(folder))
    loaded = ctypes.CDLL(os.environ["BAM_EMULATED"])
    loaded.cuda_table.restype = ctypes.c_void_p
    return loaded


def _build(folder: Path) -> str:
    shim = folder / "shim.cpp"
    shim.write_text(
        f'#include "{SOURCES / "cuda.h"}"\n'
        'extern "C" __attribute__((visibility("default"))) const void* cuda_table() { return &bam::cuda::kernels; }\n'
    )
    sources = [SOURCES / f"{name}.cu" for name in FAMILIES]
    sources += [EMULATOR / "emulator.cpp", EMULATOR / "device_functions.cpp", shim]

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        command = ["g++", *FLAGS.split(), "-x", "c++", f"-I{EMULATOR}", "-c", str(source), "-o", out]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    shared = str(folder / "emulated.so")
    subprocess.run(["g++", "-shared", "-o", shared, *objects], check=True)
    return shared


def kernels(device: Device = HOPPER) -> CudaKernels:
    return CudaKernels(_C.cuda_kernels_at(library().cuda_table()), lambda index: device)


def run_threads_backwards(backwards: bool) -> None:
    library().emulator_set(backwards)
