"""Patch of Triton's interpreter (TRITON_INTERPRET=1) for new versions of numpy."""

import triton


def patch_interpreter_index() -> None:
    """Let loop bounds be arguments in Triton 3.6's interpreter with numpy 2.4 and later.

    The interpreter converts an array of one element to an int, which numpy 2.4 refuses. Triton 3.7 needs no patch.
    """
    if not triton.knobs.runtime.interpret or not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
