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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ..backends import cuda, triton
from ..ranks import Ranks, ranks_named
from ..ways import GPU_WAYS, WAYS
from . import store, trial, verified
from .identity import Identity, identity
from .store import Verdict
from .trial import MODE

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


Watch = Callable[[Mapping[str, trial.Trial]], None]
_trust: dict[int, Trust] = {}
_deciding = threading.Lock()
_common_ways: WeakKeyDictionary[Ranks, tuple[str, ...]] = WeakKeyDictionary()  # what all ranks of a group trust


def ways(operation: str, device: torch.device, engine: str, ranks: tuple[int, int, str]) -> tuple[tuple[str, ...], str]:
    """Ways that "auto" may use on `device`; and if there are none, why, and what to type.

    engine: "auto", or the engine of all ways. ranks: as `ranks_of` returns them; each must trust a way.
    Raises: ValueError for a wrong value of BAM_KERNELS_VERIFY, or if ranks differ.
    """
    trust = of_device(device)
    common = trust.ways if ranks[0] == 1 else _of_all_ranks(operation, trust.ways, device, ranks_named(ranks[2]))
    found = _with_engine(common, engine)
    return found, "" if found else reason(trust, engine)


def _with_engine(names: tuple[str, ...], engine: str) -> tuple[str, ...]:
    return names if engine == "auto" else tuple(name for name in names if WAYS[name].engine == engine)


def _of_all_ranks(operation: str, own: tuple[str, ...], device: torch.device, ranks: Ranks) -> tuple[str, ...]:
    """Ways that this rank trusts and, once the ranks have compared, all others do.

    Ranks compare at the first call that may wait. Before it, kernels that differ between ranks are an error of the call
    when its header is compared.
    """
    common = _common_ways.get(ranks)
    if common is None:
        if _must_not_wait():
            return own
        common = _common_ways[ranks] = ranks.common_ways(operation, own, device)
    return tuple(way for way in common if way in own)


def of_device(device: torch.device) -> Trust:
    """The decision for a device, made at the first call."""
    index = device.index or 0
    trust = _trust.get(index)
    if trust is not None:
        return trust
    if not torch.cuda.is_available() or os.name != "posix":  # tensors without memory; Windows
        return Trust((), settled=False)
    if _must_not_wait():
        return _keep(index, decide(index, may_try=False))
    with _deciding:
        return _trust.get(index) or _keep(index, decide(index, may_try=True))


def is_decided(device: torch.device) -> bool:
    """Whether there is a decision for a device, which holds for this process."""
    return (device.index or 0) in _trust


def _keep(index: int, trust: Trust) -> Trust:
    if trust.settled:
        _trust[index] = trust
    return trust


def reason(trust: Trust, engine: str) -> str:
    """Why "auto" uses no way with this engine, and what to type."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if os.name != "posix":
        return "kernels are not tried on this operating system; those of a backend that is named run untried"
    if own := _with_engine(trust.ways, engine):
        here = f"kernels ({', '.join(own)}) are verified on the GPU of this rank, but none on those of all ranks"
        return f"{here}; `{COMMAND}` on each machine tries them"
    if not trust.settled:
        return (
            "no kernels are verified on this GPU, and they are not tried while a graph is captured or compiled, or in "
            f"a data worker; run `{COMMAND}` first"
        )
    known = "; ".join(f"{way} {verdict}" for way, verdict in trust.known.items() if way not in trust.ways)
    kernels = "no kernels" if engine == "auto" else f'no kernels of engine="{engine}"'
    return f"{kernels} are verified on this GPU{f' ({known})' if known else ''}; `{COMMAND}` tries them"


def decide(index: int, may_try: bool) -> Trust:
    """Decide for device `index`; may_try: kernels may be tried if a way is not known."""
    mode = trial_mode()
    here, known, left = survey(index, afresh=mode == "force")
    settled = may_try or mode == "off" or not left
    if left and mode != "off" and may_try:
        known |= try_together(left, index, here, print_line, afresh=mode == "force")
    trusted = tuple(way for way in GPU_WAYS if way in known and known[way].status == "verified")
    return Trust(trusted, known, settled)


def survey(index: int, *, afresh: bool = False) -> tuple[Identity, dict[str, Verdict], list[str]]:
    """Identity of device `index`, what is known of its ways, and the ways that a trial would try; nothing is tried.

    A way that cannot run is known as "unknown", with the reason. afresh: verdicts do not spare a way its trial.
    """
    here = identity(index)
    known = known_verdicts(here)
    left = [way for way in GPU_WAYS if way not in known or afresh]
    unavailable = unavailable_ways(left, torch.device("cuda", index))
    known |= {way: Verdict("unknown", why) for way, why in unavailable.items()}
    return here, known, [way for way in left if way not in unavailable]


def known_verdicts(here: Identity) -> dict[str, Verdict]:
    """Verdicts of this project and of this machine for an identity; what has failed on this machine has failed."""
    by_project = {way: Verdict("verified", "by this project") for way in verified.ways(here)}
    on_this_machine = store.load(here)
    failed = {way: verdict for way, verdict in on_this_machine.items() if verdict.status == "failed"}
    return on_this_machine | by_project | failed


def unavailable_ways(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Ways that cannot run on `device`, with the reason."""
    reasons: dict[str, str | None] = {}
    for name in names:
        backend = WAYS[name].backend
        if backend not in reasons:
            reasons[backend] = (cuda if backend == "cuda" else triton).unavailable(device)
    return {name: why for name in names if (why := reasons[WAYS[name].backend])}


def try_together(
    names: list[str],
    index: int,
    here: Identity,
    say: Callable[[str], None],
    *,
    afresh: bool = False,
    watch: Watch | None = None,
) -> dict[str, Verdict]:
    """Try ways on device `index` and keep the verdicts; of several processes of this machine one tries, others wait.

    here: identity of the device. say: gets a line before and after. afresh: kept verdicts do not count, only those
    that another process tells at the end of the wait for it. watch: as in `trial.run`, for a trial that a person
    started; its caller prints the verdicts.
    """
    with store.Lock(here) as lock:
        told: dict[str, Verdict] | None = {}
        if not lock.acquire():
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"another process tries the kernels on {here['gpu']}; waiting for its verdict")
            told = lock.wait(WAIT_S)
        known = {} if afresh else store.load(here)
        if told is None:
            late = Verdict("unknown", f"another process has tried the kernels for more than {WAIT_S:.0f} s")
            return {name: known.get(name, late) for name in names}
        known = told | known
        left = [name for name in names if name not in known]
        if left:
            known |= _try(left, index, here, lock, say, watch)
        return {name: known[name] for name in names}


def _try(
    names: list[str], index: int, here: Identity, lock: store.Lock, say: Callable[[str], None], watch: Watch | None
) -> dict[str, Verdict]:
    once, skip = (", once for this GPU and these versions", f". {MODE}=off skips this") if watch is None else ("", "")
    say(f"trying the kernels ({', '.join(names)}) on {here['gpu']}{once}; it takes minutes if Triton compiles{skip}")

    def touch_and_watch(trials: Mapping[str, trial.Trial]) -> None:
        if any(one.compiles for one in trials.values()):
            lock.touch()
        if watch is not None:
            watch(trials)

    begin = time.monotonic()
    found = trial.run(names, index, here, touch_and_watch)
    file = store.save(here, found)
    lock.tell(found)
    said = "tried" if watch is not None else "; ".join(f"{way} {verdict}" for way, verdict in found.items())
    say(f"{said} ({time.monotonic() - begin:.0f} s, {f'kept in {file}' if file else 'not kept'})")
    return found


def print_line(text: str) -> None:
    """Print a line about a trial to standard error, if it can be written to."""
    if sys.stderr is None:  # print would take standard output
        return
    with suppress(Exception):  # whatever a program has put in its place
        print(f"bam_kernels: {text}", file=sys.stderr, flush=True)


def _must_not_wait() -> bool:
    """Whether this is no moment to start processes or to exchange messages."""
    return (
        torch._guards.TracingContext.try_get() is not None  # is_compiling() is false here with torch 2.11
        or torch._guards.active_fake_mode() is not None
        or torch.utils.data.get_worker_info() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def trial_mode() -> str:
    """Value of BAM_KERNELS_VERIFY. Raises: ValueError for a value without a meaning."""
    mode = os.environ.get(MODE) or "auto"
    if mode not in MODES:
        raise ValueError(f"{MODE} must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
    return mode
