"""Triton's interpreter (TRITON_INTERPRET=1) with every numpy that this package accepts."""

import triton


def patch_interpreter_index() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element where a loop's bound is an argument; numpy 2.4
    and later refuse. Triton 3.7 and later need nothing."""
    if not triton.knobs.runtime.interpret or not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
