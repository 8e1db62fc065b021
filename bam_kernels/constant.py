"""Functions whose result torch.compile may keep as a constant of the graph."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Have torch.compile call `function` while it traces, and keep the result.

    For functions that cannot be traced, such as functions of the extension. Equal to
    torch.compiler.assume_constant_result, which is not used because it imports the whole compiler: importing torch
    then takes twice as long.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
