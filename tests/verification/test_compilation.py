"""What a trial reports of compilation by Triton, and what errors that end a trial mean."""

import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import compiled_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bam_kernels.backends.interface import Potential  # noqa: E402
from bam_kernels.backends.triton import sinkhorn  # noqa: E402
from bam_kernels.backends.triton.row_kernels import TritonKernels  # noqa: E402
from bam_kernels.verification import problems  # noqa: E402

SM_80, SM_90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def compiles_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in vars(sinkhorn).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    yield
    for kernel in vars(sinkhorn).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


def divide(n: int) -> None:
    one = torch.ones(n)
    TritonKernels().divide_potential_(Potential(one, one), one)


@pytest.mark.parametrize("target", [SM_80, SM_90], ids=["sm_80", "sm_90"])
def test_reports_frame_every_compilation(target, monkeypatch):
    driver, reports = compiled_only.install(monkeypatch, target), []
    monkeypatch.setattr(JITFunction, "run", JITFunction.run)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    monkeypatch.setattr(problems, "report", lambda **fields: reports.append((fields, len(driver.launched))))
    monkeypatch.setattr(problems, "at", "teacher")
    problems.report_compilation()
    compiling = {"stage": "compiling", "at": "teacher (divide_potential_kernel)"}
    running = {"stage": "running", "at": "teacher"}
    divide(100)
    assert reports == [(compiling, 0), (running, 1)]
    divide(101)
    assert len(reports) == 2
    divide(160)  # a multiple of 16 is compiled by itself
    assert reports[2:] == [(compiling, 2), (running, 3)]


def test_a_kernel_that_does_not_fit_is_a_failure_with_its_reason(monkeypatch):
    compiled_only.install(monkeypatch, SM_80, shared_bytes=64)
    monkeypatch.setattr(problems, "at", "teacher")
    s, one = torch.ones(8, 512), Potential(torch.zeros(512), torch.ones(512))
    with pytest.raises(OutOfResources) as raised:
        TritonKernels().sinkhorn_pass(s, 1.0, one.rows(0, 8), one, torch.ones(512), False)
    found = problems.meaning(raised.value)
    assert found["status"] == "failed"
    assert found["reason"].startswith("teacher: OutOfResources: out of resource: shared memory, Required: ")
    assert "Hardware limit: 64" in found["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "failed"),
        (AssertionError(), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "unknown"),
        (RuntimeError("CUDA error: out of memory"), "unknown"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "unknown"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "unknown"),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), "unknown"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), "unknown"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "unknown"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "unknown"),
        (MemoryError(), "unknown"),
        (ImportError("cuda_utils.so: failed to map segment from shared object"), "unknown"),
        (AssertionError("libcuda.so cannot found!"), "unknown"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "unknown"),
        (subprocess.CalledProcessError(1, ["gcc"]), "unknown"),
        (PermissionError(13, "Permission denied", "/cache"), "unknown"),
    ],
    ids=str,
)
def test_what_an_error_means(error, status, monkeypatch):
    monkeypatch.setattr(problems, "at", "")
    assert problems.meaning(error)["status"] == "unknown"
    monkeypatch.setattr(problems, "at", "teacher")
    found = problems.meaning(error)
    assert found["status"] == status
    assert found["reason"].startswith(f"teacher: {type(error).__name__}: ")
    assert "\n" not in found["reason"]
