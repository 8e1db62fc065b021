"""CPU kernels under the names of GPU ways, so that CPU tensors show which way the library chooses."""

from weakref import WeakKeyDictionary

import pytest
import torch

from bam_kernels import backends, checked_call, tuned
from bam_kernels.backends import cuda, triton
from bam_kernels.backends.cpu import CpuKernels
from bam_kernels.engine import attention, flash, slab
from bam_kernels.verification import trust
from bam_kernels.verification.store import Verdict
from bam_kernels.ways import GPU_WAYS


class StandInWays:
    """CPU tensors count as tensors of a GPU on which `trusted` ways are verified.

    ran: backend and engine of each call of an engine, in order; the engine of attention is "slab".
    """

    def __init__(self, patch: pytest.MonkeyPatch, trusted: tuple[str, ...] = GPU_WAYS) -> None:
        self.ran: list[str] = []
        patch.setattr(backends, "GPU", "cpu")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda index: "stand-in of the tests")
        patch.setattr(trust, "_trust", {})
        patch.setattr(trust, "_common_ways", WeakKeyDictionary())
        for name, module in (("cuda", cuda), ("triton", triton)):
            patch.setattr(module, "unavailable", lambda device: None)
            patch.setattr(module, "kernels", lambda name=name: self._kernels(name))
        for name in ("evaluate", "targets"):
            original = getattr(slab, name)
            patch.setattr(slab, name, lambda call, f=original: self._note(f"{call.kernels.backend} slab", f, call))
            patch.setattr(flash, name, lambda call, f=original: self._note(f"{call.kernels.backend} flash", f, call))
        for name, place in (("forward", 5), ("backward", 4)):  # of the kernels among the arguments
            original = getattr(attention, name)
            patch.setattr(
                attention,
                name,
                lambda *args, f=original, at=place: self._note(f"{args[at].backend} slab", f, *args),
            )
        patch.setenv(tuned.FILE, "")
        tuned.tuning.cache_clear()
        backends._warn_once.cache_clear()
        self.trust(*trusted)

    def trust(self, *ways: str) -> None:
        """From now on these ways are verified, and all others have failed, whatever calls have kept."""
        checked_call.forget()
        known = {way: Verdict("verified") if way in ways else Verdict("failed", "for a test") for way in GPU_WAYS}
        trust._trust[0] = trust.Trust(ways, known)

    def taken(self) -> list[str]:
        """What ran since the last call of this."""
        ran, self.ran[:] = list(self.ran), []
        return ran

    def _note(self, way: str, function, *args):
        self.ran.append(way)
        return function(*args)

    @staticmethod
    def _kernels(backend: str) -> CpuKernels:
        kernels = CpuKernels()
        kernels.backend = backend
        return kernels


@pytest.fixture
def ways(monkeypatch) -> StandInWays:
    """All ways of a GPU are verified."""
    yield StandInWays(monkeypatch)
    monkeypatch.undo()
    tuned.tuning.cache_clear()
