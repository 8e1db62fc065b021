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

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parents[1] / "emulator"
FAMILIES = [path.stem for path in sorted(SOURCES.glob("*.cu")) if path.stem != "device"]
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
# Four multiprocessors with what one of a Hopper holds.
HOPPER = Device(0, "emulator", (9, 0), 4, 1 << 30, 1 << 20, 227 << 10, 1 << 10, (2, 1, 1, 1), True, True)


@cache
def library() -> ctypes.CDLL:
    """Loaded from the file that BAM_EMULATED names, or compiled: once in a process, and for those that it starts."""
    if "BAM_EMULATED" not in os.environ:
        os.environ["BAM_EMULATED"] = link(objects(), "emulated.so")
    loaded = ctypes.CDLL(os.environ["BAM_EMULATED"])
    loaded.cuda_table.restype = ctypes.c_void_p
    return loaded


@cache
def build_folder() -> Path:
    """Where this process compiles; it is removed when the process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def objects() -> dict[str, Path]:
    """The object file of every source, by the source's name without suffix; compiled once in a process."""
    shim = build_folder() / "shim.cpp"
    shim.write_text(
        f'#include "{SOURCES / "cuda.h"}"\n'
        'extern "C" __attribute__((visibility("default"))) const void* cuda_table() { return &bam::cuda::kernels; }\n'
    )
    sources = [SOURCES / f"{name}.cu" for name in FAMILIES]
    sources += [EMULATOR / "emulator.cpp", EMULATOR / "device_functions.cpp", shim]
    outs = [build_folder() / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sources, outs))
    return {out.stem: out for out in outs}


def compile_source(source: Path, out: Path) -> None:
    """Compile a source of csrc/cuda or of the emulator, or a changed copy of one that lies elsewhere."""
    command = ["g++", *FLAGS.split(), "-x", "c++", f"-I{EMULATOR}", f"-I{SOURCES}", "-c", str(source), "-o", str(out)]
    subprocess.run(command, check=True)


def link(objects_by_name: dict[str, Path], name: str) -> str:
    """The file of a library that BAM_EMULATED may name."""
    shared = str(build_folder() / name)
    subprocess.run(["g++", "-shared", "-o", shared, *map(str, objects_by_name.values())], check=True)
    return shared


def kernels(device: Device = HOPPER) -> CudaKernels:
    return CudaKernels(_C.cuda_kernels_at(library().cuda_table()), lambda index: device, "cpu")


def run_threads_backwards(backwards: bool) -> None:
    library().emulator_set(backwards)
