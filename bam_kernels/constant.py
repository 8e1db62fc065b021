"""Constants of the process, for torch.compile."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Have torch.compile call `function` while it traces, and keep the result.

    For what it cannot trace, such as functions of the extension. Does what torch.compiler.assume_constant_result does,
    which imports the whole compiler: twice the time of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
