"""Where this process runs the Triton kernels: on the CPU under the interpreter, on a GPU, or nowhere."""

import pytest
import torch

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip("no GPU here; test_triton_kernels.py runs it interpreted", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
