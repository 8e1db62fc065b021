"""The machine that runs a benchmark: its names and versions, its measured ceilings, its clock and its memory."""

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
# Flops of one float32 exp2 on a CPU: a polynomial of degree 5 and its range reduction.
EXP_FLOP = 14
# Results of the ex2 instruction per clock and multiprocessor, on sm_80 to sm_100.
EXP_PER_CLOCK = 16


@dataclass
class Machine:
    """Device, versions and measured ceilings, which every result row carries.

    For a checkout copied without its history, the environment variable BAM_KERNELS_COMMIT names the commit.
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
    def detect(device: str, threads: int | None) -> "Machine":
        """The named device ("auto": CUDA if there is one, else the CPU) with its ceilings measured."""
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
        """Measure the ceilings again and keep the best seen so far: noise can only lower a measurement."""
        cuda = self.device.type == "cuda"
        size = 8192 if cuda else 2048
        self.gemm_gflops = max(self.gemm_gflops, self._gemm_gflops(size, torch.float32))
        self.half_gemm_gflops = max(self.half_gemm_gflops, self._gemm_gflops(size, self.half))
        self.copy_gbs = max(self.copy_gbs, self.copy_gbs_at(8 << 30 if cuda else 256 << 20))

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type of fast products on this device, which autocast uses too."""
        return torch.float16 if self.device.type == "cuda" else torch.bfloat16

    def _gemm_gflops(self, n: int, dtype: torch.dtype) -> float:
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        out = torch.empty_like(a)
        return 2 * n**3 / self._fastest_ms(lambda: torch.mm(a, b, out=out)) / 1e6

    def copy_gbs_at(self, footprint: int) -> float:
        """Rate in GB/s, reads plus writes, of a copy that touches `footprint` bytes."""
        source = torch.ones(max(footprint // 8, 1), device=self.device)
        target = torch.empty_like(source)
        ms = self._fastest_ms(lambda: target.copy_(source))
        self._copy_at[footprint] = max(self._copy_at.get(footprint, 0.0), 2 * source.nbytes / ms / 1e6)
        return self._copy_at[footprint]

    @property
    def exp_per_s(self) -> float:
        """Upper bound of exponentials per second, from the product rate (CPU) or the special-function units (GPU)."""
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
        """Milliseconds of one run, by CUDA events on a GPU and by the wall clock elsewhere."""
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
        """Peak memory of one run in bytes beyond what was allocated before; None if the system does not report it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run(*args)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory the allocator keeps after a free would hide what the run takes
            before = resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from here
            run(*args)
            return max(resident_bytes("VmHWM") - before, 0)
        except (AttributeError, OSError):
            return None

    @property
    def l2_bytes(self) -> int:
        """Size of a GPU's L2 cache, cold at each run; 0 on a CPU, where input stays as its producer left it."""
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
