"""A driver for Triton that compiles kernels for a GPU that is not there, and launches nothing."""

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver


class CompilingDriver:
    """Stands for Triton's driver of a GPU.

    launched: kernels, in the order of launches, each with the bytes of shared memory that it takes.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.launched = target, []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: self.launched.append((metadata.name, metadata.shared))

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(monkeypatch, target: GPUTarget, shared_bytes: int = 227 << 10) -> CompilingDriver:
    made = CompilingDriver(target)
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(compiler, "max_shared_mem", lambda device: shared_bytes)  # Triton reads it once a process
    return made
