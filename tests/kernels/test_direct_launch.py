"""Recorded launches call a compiled kernel as Triton itself does; Triton compiles, and nothing is launched."""

import gc
import inspect
import weakref

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import compiled_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bam_kernels.backends.triton import sinkhorn, stats  # noqa: E402
from bam_kernels.backends.triton.direct import direct  # noqa: E402
from bam_kernels.backends.triton.launch import launch  # noqa: E402

STREAM = 12345


def call_of_triton_36(self, gridX, gridY, gridZ, stream, function, *args):
    """Signature of CudaLauncher.__call__ in Triton 3.6."""


SIGNATURES = [call_of_triton_36, CudaLauncher.__call__]


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple]:
    """Arguments of every call of a compiled kernel's launcher."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made, driver = [], compiled_only.install(monkeypatch, GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "launcher_cls", lambda source, metadata: lambda *args: made.append(args))
    kernels = [x for module in (sinkhorn, stats) for x in vars(module).values() if isinstance(x, JITFunction)]
    for kernel in kernels:
        kernel.device_caches.clear()
    yield made
    for kernel in kernels:
        kernel.device_caches.clear()


def launch_of_sums(count: int = 3, offset: int = 0) -> tuple:
    """A launch with None, floats, integers of 1, of 16 and of 64 bits, and a pointer that may not be aligned."""
    images, norm = torch.zeros(3 * count + 4, dtype=torch.float64)[offset : offset + 3 * count], None
    args = (images, torch.zeros(16), norm, torch.zeros(()), torch.zeros(6), 7.5, 1e-9, count, 16, 0, 1, 2, 2**40)
    return stats.loss_and_stats_kernel, (1,), args, {"BLOCK": 32, "num_warps": 1}


def test_a_direct_launch_is_the_launch_that_triton_makes(calls):
    kernel, grid, args, options = launch_of_sums()
    launch(kernel, grid, *args, **options)
    recorded = direct(kernel, grid, args, options)
    assert len(calls) == 1  # recording launches nothing
    pointers = [16, 32, 48, 64]
    recorded.run(pointers, STREAM)
    by_triton, direct_call = calls
    assert direct_call[:3] == by_triton[:3] == (1, 1, 1)
    assert direct_call[3] == STREAM
    assert direct_call[4:6] == by_triton[4:6]  # function and metadata
    assert direct_call[6:9] == (None, None, None)
    new = iter(pointers)
    assert direct_call[9:] == tuple(next(new) if isinstance(x, torch.Tensor) else x for x in by_triton[9:])
    assert len(direct_call[9:]) == len(kernel.params)


@pytest.mark.parametrize("signature", SIGNATURES, ids=["3.6", "installed"])
def test_the_launchers_of_triton_take_such_a_call(signature, calls):
    kernel, grid, args, options = launch_of_sums()
    direct(kernel, grid, args, options).run([16, 32, 48, 64], STREAM)
    bound = inspect.signature(signature).bind(None, *calls[0]).arguments
    compiled = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    assert [bound[name] for name in ("gridX", "gridY", "gridZ", "stream")] == [1, 1, 1, STREAM]
    assert bound["function"] == compiled.function
    rest = bound["args"]
    if "kernel_metadata" not in bound:  # as in 3.6: metadata, launch metadata and hooks are the first of the rest
        assert rest[:4] == (compiled.packed_metadata, None, None, None)
        rest = rest[4:]
    else:
        assert bound["kernel_metadata"] == compiled.packed_metadata
        assert bound["launch_enter_hook"] is bound["launch_exit_hook"] is bound["launch_metadata"] is None
    assert rest == (16, 32, None, 48, 64, *args[5:], 32)


def test_the_compiled_kernel_is_that_of_the_recorded_alignment(calls):
    """An aligned pointer must stay aligned; one that is not may become so."""
    for offset in (0, 1):
        kernel, grid, args, options = launch_of_sums(offset=offset)
        launch(kernel, grid, *args, **options)
        recorded = direct(kernel, grid, args, options)
        recorded.run([16, 32, 48, 64], STREAM)
        assert calls[-1][4:6] == calls[-2][4:6]
        assert calls[-1][5] is calls[-2][5]  # the metadata of one compiled kernel
    assert calls[0][5] is not calls[2][5]


def test_a_number_of_pointers_that_does_not_fit_is_an_error(calls):
    recorded = direct(*launch_of_sums())
    for pointers in ([16, 32, 48], [16, 32, 48, 64, 80]):
        with pytest.raises(ValueError, match="4 tensors, got"):
            recorded.run(pointers, STREAM)
    assert not calls


def test_grids_of_fewer_dimensions_and_no_tensor_kept(calls):
    col, c = torch.zeros(2, 100), torch.zeros(100)
    args = (*col, c, 100)
    recorded = direct(sinkhorn.divide_potential_kernel, (7, 3), args, {"BLOCK": 256, "num_warps": 4})
    recorded.run([16, 32, 48], 0)
    assert calls[0][:3] == (7, 3, 1) and calls[0][9:] == (16, 32, 48, 100, 256)
    gone = weakref.ref(c)
    del args, c
    gc.collect()
    assert gone() is None


def test_no_compiled_kernel_no_direct_launch(calls, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: True)
    assert direct(*launch_of_sums()) is None
