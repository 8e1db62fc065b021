"""Patches of Triton's interpreter (TRITON_INTERPRET=1): new versions of numpy, and less time in calls of functions."""

from typing import Any

import triton

TESTED = ("3.6.", "3.7.", "3.8.")  # versions of Triton whose interpreter works with `replace_language_once`


def patch_interpreter() -> None:
    if not triton.knobs.runtime.interpret:
        return
    if triton.__version__.startswith("3.6."):
        convert_indices()
    if triton.__version__.startswith(TESTED):
        replace_language_once()


def convert_indices() -> None:
    """Let loop bounds be arguments in Triton 3.6's interpreter with numpy 2.4 and later.

    The interpreter converts an array of one element to an int, which numpy 2.4 refuses. Triton 3.7 needs no patch.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def replace_language_once() -> None:
    """Leave out what the interpreter repeats in each call of a function by a kernel.

    At each launch it replaces Triton's language by functions of its own, and again at each call in each program, which
    takes longer than what most functions compute.
    """
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def is_replaced() -> bool:
        members = (language.load, language.math.exp2, core.load, core.tensor.__add__, core.tensor_descriptor_base.load)
        return not any(core.is_builtin(member) for member in members)

    def patched(function: Any) -> Any:
        return interpreter._LangPatchScope() if is_replaced() else replace(function)

    interpreter._patch_lang = patched
