"""The machine: what it is, the best it does in this run, and how time and memory are measured on it."""

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bam_kernels
from bam_kernels.backends import cpu

REPOSITORY = Path(__file__).parents[1]
# One base-2 exponential in float32 without a unit for it: a polynomial of degree 5 and its range reduction.
EXP_FLOP = 14
# ex2 results per clock and multiprocessor on sm_80 to sm_100.
EXP_PER_CLOCK = 16


@dataclass
class Machine:
    """Device, versions and measured ceilings; what every result row carries.

    The environment's BAM_KERNELS_COMMIT names the commit of a checkout that was copied without its history.
    """

    device: torch.device
    name: str
    isa: str
    threads: int
    commit: str
    gemm_gflops: float = 0.0
    half_gemm_gflops: float = 0.0
    copy_gbs: float = 0.0
    _copy_at: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def found(device: str, threads: int | None) -> "Machine":
        """The device asked for ("auto": CUDA where there is one), its ceilings measured."""
        if threads is not None:
            torch.set_num_threads(threads)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        cuda = place.type == "cuda"
        machine = Machine(
            device=place,
            name=torch.cuda.get_device_name(place) if cuda else cpu_name(),
            isa=f"sm_{''.join(map(str, torch.cuda.get_device_capability(place)))}" if cuda else cpu_isa(),
            threads=torch.get_num_threads(),
            commit=os.environ.get("BAM_KERNELS_COMMIT") or commit_of(REPOSITORY, "bam_kernels", "csrc"),
        )
        machine.measure()
        return machine

    def measure(self) -> None:
        """Raise the ceilings to the best seen so far: measured before each table, as noise can only lower them."""
        cuda = self.device.type == "cuda"
        size = 8192 if cuda else 2048
        self.gemm_gflops = max(self.gemm_gflops, self._gemm_gflops(size, torch.float32))
        self.half_gemm_gflops = max(self.half_gemm_gflops, self._gemm_gflops(size, self.half))
        self.copy_gbs = max(self.copy_gbs, self.copy_gbs_at(8 << 30 if cuda else 256 << 20))

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type that products are fast in, and that autocast takes."""
        return torch.float16 if self.device.type == "cuda" else torch.bfloat16

    def _gemm_gflops(self, n: int, dtype: torch.dtype) -> float:
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        out = torch.empty_like(a)
        return 2 * n**3 / self._fastest_ms(lambda: torch.mm(a, b, out=out)) / 1e6

    def copy_gbs_at(self, footprint: int) -> float:
        """Bytes read and written a second, in GB/s, by a copy that touches `footprint` bytes."""
        source = torch.ones(max(footprint // 8, 1), device=self.device)
        target = torch.empty_like(source)
        ms = self._fastest_ms(lambda: target.copy_(source))
        self._copy_at[footprint] = max(self._copy_at.get(footprint, 0.0), 2 * source.nbytes / ms / 1e6)
        return self._copy_at[footprint]

    @property
    def exp_per_s(self) -> float:
        """Exponentials a second: an upper bound from the arithmetic rate or the special-function unit."""
        if self.device.type == "cpu":
            return self.gemm_gflops * 1e9 / EXP_FLOP
        properties = torch.cuda.get_device_properties(self.device)
        clock_khz = getattr(properties, "clock_rate", None) or 1e3 * torch.cuda.clock_rate(self.device)
        return EXP_PER_CLOCK * properties.multi_processor_count * clock_khz * 1e3

    def _fastest_ms(self, run: Callable[[], Any], seconds: float = 0.15) -> float:
        end, best = time.perf_counter() + seconds, float("inf")
        self.time_ms(run)
        while time.perf_counter() < end:
            best = min(best, self.time_ms(run))
        return best if best < float("inf") else self.time_ms(run)

    def time_ms(self, run: Callable[..., Any], *args: Any) -> float:
        """Milliseconds of one run: CUDA events on a GPU, the wall clock elsewhere."""
        if self.device.type != "cuda":
            begin = time.perf_counter_ns()
            run(*args)
            return (time.perf_counter_ns() - begin) / 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(*args)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_bytes(self, run: Callable[..., Any], *args: Any) -> int | None:
        """Most memory held during one run beyond what was held before; None where the system does not tell."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run(*args)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the run takes
            before = resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from here
            run(*args)
            return max(resident_bytes("VmHWM") - before, 0)
        except (AttributeError, OSError):
            return None

    @property
    def l2_bytes(self) -> int:
        """The cache that a GPU run must find cold; 0 on a CPU, where a run finds its input as the producer left it."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0

    def fields(self) -> dict[str, Any]:
        return {
            "device": self.name,
            "device_type": self.device.type,
            "isa": self.isa,
            "threads": self.threads,
            "copy_gbs": round(self.copy_gbs, 1),
            "gemm_gflops": round(self.gemm_gflops, 1),
            "half_gemm_gflops": round(self.half_gemm_gflops, 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if self.device.type == "cuda" else None,
            "bam_kernels": bam_kernels.__version__,
            "commit": self.commit,
        }

    def line(self) -> str:
        return (
            f"{self.name} ({self.isa}), {self.threads} threads, torch {torch.__version__}, "
            f"bam_kernels {bam_kernels.__version__} at {self.commit}, measured here: copy {self.copy_gbs:.1f} GB/s "
            f"(read + write), float32 product {self.gemm_gflops:.0f} GFLOP/s"
        )


def resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    return cpu.kernels().isa if cpu.unavailable() is None else platform.machine()


def commit_of(path: Path, *parts: str) -> str:
    """Short hash of the checkout at `path`, with "+" where tracked files under `parts` differ from it."""

    def git(*command: str) -> str:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", "-C", path, *command], capture_output=True, text=True, check=True, env=environment
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *parts)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
