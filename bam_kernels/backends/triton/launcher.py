"""Base of the Triton launchers."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Self

from .direct import direct
from .launch import Launch, launch


class Launcher:
    """How the kernels of a class are launched, and launched again.

    run     run(kernel, grid, *args, num_warps, **constants) launches one kernel
    repeat  repeat(kernel, grid, args, options) makes of a launch one that runs again on other memory
    """

    def __init__(self, run: Launch = launch, repeat: Callable[..., Any] = direct) -> None:
        self.run, self._repeat = run, repeat

    def recorded(self, recorder: Any) -> Self:
        """These kernels, whose launches a Recorder also notes."""
        kernels = copy(self)
        kernels.run = partial(recorder.launch, self.run, self._repeat)
        return kernels
