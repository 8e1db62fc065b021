"""pytest's option --torch-default: the library's entries run while another default of torch is set.

The tests' own tensors stay float32 on the CPU: the default holds from entering an entry to leaving it.
"""

import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

NAMES = ("float64", "bfloat16", "float16", "meta")  # the last is a device
SPECIAL = ("__call__", "__init__")  # methods that are entries too


class Default:
    """A default dtype, or the default device meta, for the length of a block; blocks nest, in several threads too.

    The default dtype is the process's: the first block to be entered sets it, the last one to be left puts it back.
    The default device is a thread's own.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device("meta") if name == "meta" else None
        self.dtype = getattr(torch, name) if self.device is None else torch.get_default_dtype()
        self.before = torch.float32
        self.blocks = 0
        self.lock = threading.Lock()
        self.in_thread = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._count(1)
        inside = getattr(self.in_thread, "blocks", 0)
        self.in_thread.blocks = inside + 1
        try:
            with self.device if self.device is not None and not inside else nullcontext():
                yield
        finally:
            self.in_thread.blocks = inside
            self._count(-1)

    def _count(self, change: int) -> None:
        with self.lock:
            if not self.blocks:
                self.before = torch.get_default_dtype()
            self.blocks += change
            torch.set_default_dtype(self.dtype if self.blocks else self.before)

    def during(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the default set; as it is where torch.compile traces it."""

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **options)
            with self():
                return function(*args, **options)

        return call


def install(name: str) -> None:
    """Replace the library's entries wherever they are bound, before a test module has imported them."""
    default = Default(name)
    for owner in _classes():
        for method, found in list(vars(owner).items()):
            if method[0] == "_" and method not in SPECIAL:
                continue
            if isinstance(found, staticmethod):
                setattr(owner, method, staticmethod(default.during(found.__func__)))
            elif inspect.isfunction(found):
                setattr(owner, method, default.during(found))
    functions = {function: default.during(function) for function in _functions()}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "bam_kernels"]:
        for bound, x in list(vars(module).items()):
            if inspect.isfunction(x) and x in functions:
                setattr(module, bound, functions[x])
    torch.Tensor.backward = default.during(torch.Tensor.backward)
    torch.autograd.grad = default.during(torch.autograd.grad)


def _classes() -> set[type]:
    """Classes whose methods the tests call: BAMLoss, GradientCache, row kernels, Layout and Potential."""
    from bam_kernels import BAMLoss, GradientCache
    from bam_kernels.backends.cpu import CpuKernels
    from bam_kernels.backends.cuda.row_kernels import CudaKernels
    from bam_kernels.backends.interface import Potential
    from bam_kernels.layout import Layout

    kernels = {CpuKernels, *CudaKernels.__mro__}
    if importlib.util.find_spec("triton") is not None:
        from bam_kernels.backends.triton.flash_kernels import FlashKernels
        from bam_kernels.backends.triton.row_kernels import TritonKernels

        kernels |= {*FlashKernels.__mro__, *TritonKernels.__mro__}
    return (kernels - {object}) | {BAMLoss, GradientCache, Layout, Potential}


def _functions() -> set[Callable[..., Any]]:
    """The public functions, those of the reference, and the engine's entries."""
    from bam_kernels import bam_loss, bam_targets, reference, sinkhorn_attention, tune
    from bam_kernels.engine import slab

    specified = inspect.getmembers(reference, inspect.isfunction)
    chosen = {x for name, x in specified if x.__module__ == reference.__name__ and name[0] != "_"}
    engine = {slab.evaluate, slab.targets, slab.from_scores, tune.best, tune.measured_rates}
    return chosen | engine | {bam_loss, bam_targets, sinkhorn_attention}
