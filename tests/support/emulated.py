"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against emulator/, whole kernels over fibers; for tests."""

import atexit
import ctypes
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from bam_kernels.backends.cuda.device import Device
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.backends.extension import _C

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parents[1] / "emulator"
FAMILIES = [path.stem for path in sorted(SOURCES.glob("*.cu")) if path.stem != "device"]
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
SHIM = f"""#include "{SOURCES / "cuda.h"}"
extern "C" __attribute__((visibility("default"))) const void* cuda_table() {{ return &bam::cuda::kernels; }}
"""
# Four multiprocessors with what one of a Hopper holds.
HOPPER = Device(0, "emulator", (9, 0), 4, 1 << 30, 1 << 20, 227 << 10, 1 << 10, (2, 1, 1, 1), True)


@cache
def library() -> ctypes.CDLL:
    """Loaded from the file that BAM_EMULATED names, or compiled: once in a process, and for those that it starts."""
    if "BAM_EMULATED" not in os.environ:
        os.environ["BAM_EMULATED"] = built("emulated.so", partial(link, objects()))
    loaded = ctypes.CDLL(os.environ["BAM_EMULATED"])
    loaded.cuda_table.restype = ctypes.c_void_p
    return loaded


@cache
def build_folder() -> Path:
    """Folder of compiled files: BAM_EMULATED_FOLDER, else one that is removed when this process ends."""
    if shared := os.environ.get("BAM_EMULATED_FOLDER"):
        return Path(shared)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def built(name: str, build: Callable[[Path], object]) -> str:
    """Path of a file in the build folder, which the first of all processes that ask for it builds."""
    path = build_folder() / name
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            build(path)
    return str(path)


@cache
def objects() -> dict[str, Path]:
    """Object files by the name of their source without suffix; compiled once."""
    shim = Path(built("shim.cpp", lambda path: path.write_text(SHIM)))
    sources = [SOURCES / f"{name}.cu" for name in FAMILIES]
    sources += [EMULATOR / "emulator.cpp", EMULATOR / "device_functions.cpp", shim]

    def compiled(source: Path) -> Path:
        return Path(built(f"{source.stem}.o", partial(compile_source, source)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {out.stem: out for out in pool.map(compiled, sources)}


def compile_source(source: Path, out: Path) -> None:
    """Compile a source of csrc/cuda or of the emulator, or a changed copy of one that lies elsewhere."""
    command = ["g++", *FLAGS.split(), "-x", "c++", f"-I{EMULATOR}", f"-I{SOURCES}", "-c", str(source), "-o", str(out)]
    subprocess.run(command, check=True)


def link(objects_by_name: dict[str, Path], out: Path) -> None:
    """Link a library that BAM_EMULATED may name."""
    subprocess.run(["g++", "-shared", "-o", str(out), *map(str, objects_by_name.values())], check=True)


def kernels(device: Device = HOPPER) -> CudaKernels:
    return CudaKernels(_C.cuda_kernels_at(library().cuda_table()), lambda index: device, "cpu")


def run_threads_backwards(backwards: bool) -> None:
    library().emulator_set(backwards)
