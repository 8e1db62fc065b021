"""The CUDA kernels. What needs a device is marked gpu; the rest holds wherever nvcc compiled them."""

import pytest
import torch

from bam_kernels.backends import cuda
from bam_kernels.backends.extension import _C

built = pytest.mark.skipif(_C is None or not _C.with_cuda, reason="built without CUDA")


@built
def test_the_default_architectures_are_compiled():
    assert cuda.architectures()
    assert all(part[0].isdigit() for part in cuda.architectures().split())


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device")
def test_without_a_device_the_module_loads_and_says_so():
    assert cuda.devices() == []
    with pytest.raises(ValueError, match="no CUDA device"):
        cuda.unit_rows(torch.ones(2, 3))


# d = 1; a tail; the registers' whole capacity of 4096; beyond it, where a row is read twice.
@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
@pytest.mark.parametrize("d", [1, 33, 256, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_unit_rows(d, dtype, centred):
    x = torch.randn(37, d + 3, device="cuda").to(dtype)[:, :d]
    x[5] = 0
    centre = torch.randn(d, device="cuda") / d**0.5 if centred else None
    unit, inverse_norm = cuda.unit_rows(x, centre)
    norm = x.double().norm(dim=1)
    expected = x.double() / norm.clamp_min(1e-12)[:, None] - (centre.double() if centre is not None else 0)
    error = (unit.double() / cuda.UNIT_SCALE - expected).abs()
    assert (error <= 2**-11 * expected.abs() + 1e-6).all()
    assert inverse_norm[5] == 0
    others = norm > 0
    assert ((inverse_norm[others] * norm[others] - 1).abs() <= 1e-6).all()


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_unit_rows_of_any_magnitude(magnitude):
    x = torch.randn(4, 64, device="cuda") * magnitude
    unit, _ = cuda.unit_rows(x)
    expected = x.double() / x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    assert ((unit.double() / cuda.UNIT_SCALE - expected).abs() <= 2**-11 * expected.abs() + 1e-6).all()
