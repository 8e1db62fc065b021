"""Processes that load images, forked by one that has no threads.

A fork of the run itself, whose threads it does not take along, may wait for ever for what one of them held. Signals
that ask the run to save and end reach all its processes, as from Slurm; the main one answers, and needs the others.
"""

import multiprocessing
import signal
from functools import cache
from multiprocessing import forkserver
from typing import Any

from .signals import StopSignal


def processes(count: int) -> dict[str, Any]:
    """A DataLoader's arguments for this many."""
    return {"num_workers": count, "multiprocessing_context": _server() if count else None}


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])
    # What is blocked stays so in the processes that are started meanwhile; here it comes late, and is not lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.NAMES)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
