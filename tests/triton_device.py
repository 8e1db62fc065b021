"""Where this process runs the Triton kernels: on the CPU under the interpreter, on a GPU, or nowhere."""

import pytest
import torch

triton = pytest.importorskip("triton")


def _let_old_interpreter_count() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element, which newer numpy refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if triton.knobs.runtime.interpret:
    DEVICE = torch.device("cpu")
    if triton.__version__.startswith("3.6"):
        _let_old_interpreter_count()
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip("no GPU here; test_triton_kernels.py runs it interpreted", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
