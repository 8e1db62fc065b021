"""Which ways `backend="auto"` uses on a GPU of this process, decided once for each device.

1. What this project has verified for such a GPU and software: verified.py.
2. What was verified on this machine: store.py. If nothing is kept, the kernels are tried now, in other processes.
3. Nothing else: the caller computes with the reference.

BAM_KERNELS_VERIFY decides about trying: auto; off (never, what is known counts); force (whatever is known).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..backends import cuda, triton
from ..ranks import ranks_named
from ..ways import GPU_WAYS, WAYS
from . import store, trial, verified
from .identity import Identity, identity
from .store import Verdict

MODE = "BAM_KERNELS_VERIFY"
MODES = ("auto", "off", "force")
WAIT_S = 60.0  # for another process that tries the kernels, from when its kernels are compiled
COMMAND = "python -m bam_kernels.verify"


@dataclass(frozen=True)
class Trust:
    """The decision for one device: trusted ways, and what is known of each way.

    settled: it holds for this process. False: the kernels could not be tried at that moment.
    """

    ways: tuple[str, ...]
    known: dict[str, Verdict] = field(default_factory=dict)
    settled: bool = True


_trust: dict[int, Trust] = {}
_deciding = threading.Lock()


def ways(operation: str, device: torch.device, ranks: tuple[int, int, str]) -> tuple[str, ...]:
    """Trusted ways on `device`; of several ranks, the ways that all of them trust.

    ranks: as `ranks_of` returns them. Raises: ValueError for a wrong value of BAM_KERNELS_VERIFY, or if ranks differ.
    """
    own = of_device(device).ways
    if ranks[0] == 1 or _must_not_wait():
        return own
    return ranks_named(ranks[2]).common_ways(operation, own, device)


def of_device(device: torch.device) -> Trust:
    """The decision for a device, made at the first call."""
    index = device.index or 0
    trust = _trust.get(index)
    if trust is not None:
        return trust
    if not torch.cuda.is_available():  # tensors without memory, on a machine without a GPU
        return Trust((), settled=False)
    with _deciding:
        trust = _trust.get(index) or decide(index, may_try=not _must_not_wait())
        if trust.settled:
            _trust[index] = trust
    return trust


def reason(device: torch.device) -> str:
    """Why no way is used on `device`, and what to type."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    trust = _trust.get(device.index or 0, Trust(()))
    said = "; ".join(f"{way} {verdict}" for way, verdict in trust.known.items() if way not in trust.ways)
    if trust.ways and not said:
        return f"ranks have verified different kernels; `{COMMAND}` tries them"
    return f"no kernels are verified on this GPU{f' ({said})' if said else ''}; `{COMMAND}` tries them"


def decide(index: int, may_try: bool) -> Trust:
    """Decide for device `index`; may_try: kernels may be tried if a way is not known."""
    mode = _mode()
    here = identity(index)
    known = known_verdicts(here) if mode != "force" else {}
    left = [way for way in GPU_WAYS if way not in known]
    unavailable = unavailable_ways(left, torch.device("cuda", index))
    left = [way for way in left if way not in unavailable]
    settled = True
    if left and mode != "off":
        settled = may_try
        if may_try:
            known = {**known, **try_together(left, index, here, print_line, afresh=mode == "force")}
    known |= {way: Verdict("unknown", why) for way, why in unavailable.items()}
    trusted = tuple(way for way in GPU_WAYS if way in known and known[way].status == "verified")
    return Trust(trusted, known, settled)


def known_verdicts(here: Identity) -> dict[str, Verdict]:
    """Verdicts of this project and of this machine for an identity."""
    by_project = {way: Verdict("verified", "by this project") for way in verified.ways(here)}
    return store.load(here) | by_project


def unavailable_ways(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Ways that cannot run on `device`, with the reason."""
    reasons: dict[str, str | None] = {}
    for name in names:
        backend = WAYS[name].backend
        if backend not in reasons:
            reasons[backend] = (cuda if backend == "cuda" else triton).unavailable(device)
    return {name: why for name in names if (why := reasons[WAYS[name].backend])}


def try_together(
    names: list[str], index: int, here: Identity, say: Callable[[str], None], *, afresh: bool = False
) -> dict[str, Verdict]:
    """Try ways on device `index` and keep the verdicts; of several processes of this machine one tries, others wait.

    here: identity of the device. say: gets a line before and after. afresh: kept verdicts do not count, except those
    that another process made during the wait.
    """
    with store.Lock(here) as lock:
        if not lock.acquire():
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"another process tries the kernels on {here['gpu']}; waiting for its verdict")
            afresh = False
            if not lock.wait(WAIT_S):
                kept = store.load(here)
                waited = Verdict("unknown", f"another process has tried the kernels for more than {WAIT_S:.0f} s")
                return {name: kept.get(name, waited) for name in names}
        kept = store.load(here)
        left = [name for name in names if afresh or name not in kept]
        if not left:
            return {name: kept[name] for name in names}
        say(
            f"trying the kernels ({', '.join(left)}) on {here['gpu']}, once for this GPU and these versions; it takes "
            f"minutes if Triton compiles. {MODE}=off skips this"
        )
        begin = time.monotonic()
        found = trial.run(left, index, here, lock.touch)
        file = store.save(here, kept | found)
        say(summary(found, time.monotonic() - begin, file))
        return {name: (kept | found)[name] for name in names}


def summary(found: dict[str, Verdict], seconds: float, file: Path | None) -> str:
    """Line about what was found, and where it is kept."""
    said = "; ".join(f"{way} {verdict}" for way, verdict in found.items())
    return f"{said} ({seconds:.0f} s, {f'kept in {file}' if file else 'not kept'})"


def print_line(text: str) -> None:
    """Print a line about a trial to standard error."""
    print(f"bam_kernels: {text}", file=sys.stderr, flush=True)


def _must_not_wait() -> bool:
    """Whether this is no moment to start processes or to exchange messages."""
    return (
        torch.compiler.is_compiling()
        or torch.utils.data.get_worker_info() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _mode() -> str:
    mode = os.environ.get(MODE, "auto")
    if mode not in MODES:
        raise ValueError(f"{MODE} must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
    return mode
