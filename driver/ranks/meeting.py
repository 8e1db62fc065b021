"""Store in which the ranks of a run meet at its start. A rank that is missing is named, and not awaited for ever."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ..config import UserError
from ..messages.text import amount, first_line, listed
from .environment import Place

T = TypeVar("T")
MEETING_S = 15 * 60
"""Seconds that ranks wait for each other at the start: nodes of a cluster may start minutes apart."""
NOTICE_S = 10
"""Seconds after which a waiting rank says whom it waits for."""
ANSWER_S = 30
"""Seconds within which a store answers that has accepted a connection."""
ANSWER = timedelta(minutes=30)
"""Longest wait for a key of the store, as for what rank 0 alone does: torch's default for a store of ranks."""
POLL_S = 0.1
ASKING_S = 1e-3
"""Seconds between two questions of any ranks, so that thousands of them do not overload the store of rank 0."""
FAILURES = "failures"
"""Key of the number of ranks that have failed."""
MET = "all ranks are here"


def meet(place: Place) -> dist.Store:
    """Store of the run, once all its ranks are here. A rank that ends because another has failed says nothing.

    Raises: UserError where rank 0 or other ranks do not come, or where two processes have one rank.
    """
    whole = _serve(place) if place.rank == 0 and not place.hosted else _connect(place)
    whole.set_timeout(ANSWER)
    store = dist.PrefixStore(f"attempt {place.attempt}", whole)
    patience = _Patience("rank 0")
    try:
        answer(lambda: _register(store, place))
        while not answer(lambda: store.check([MET])):
            _wait(store, place, patience)
    except dist.DistError as error:
        raise UserError(f"rank {place.rank}: rank 0 has ended or been stopped before all ranks were here") from error
    return store


def _serve(place: Place) -> dist.Store:
    """Store that rank 0 hosts. It listens at every address of this machine."""
    try:
        return dist.TCPStore("127.0.0.1", place.port, None, True, wait_for_workers=False)
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise UserError(f"rank 0 cannot listen at port {place.port}: {first_line(error)}") from error
        raise UserError(
            f"port {place.port} of {socket.gethostname()} (MASTER_PORT) is in use: by another run, another program, or "
            "a second process with RANK 0. Give every run on a machine a free port of its own"
        ) from error


def _connect(place: Place) -> dist.Store:
    """Connection to the store at MASTER_ADDR and MASTER_PORT, awaited while nothing listens there."""
    where = f"{place.host}:{place.port}"
    patience = _Patience(f"rank {place.rank} of {place.size}")
    # A plain connection first: torch's own attempts print a warning each.
    while (fault := _unreachable(place)) is not None:
        patience.wait(
            lambda fault=fault: f"rank 0 at {where} (MASTER_ADDR and MASTER_PORT), {fault}",
            "Is rank 0 running, is MASTER_ADDR its machine, and is no firewall between them?",
        )
    limit = timedelta(seconds=ANSWER_S)
    try:
        return answer(lambda: dist.TCPStore(place.host, place.port, None, False, limit))
    except dist.DistError as error:
        raise UserError(
            f"rank {place.rank}: what listens at {where} (MASTER_ADDR and MASTER_PORT) is no rank 0 of a run, "
            "but another program: give the run a free port"
        ) from error


def _unreachable(place: Place) -> str | None:
    """Why no connection to rank 0 can be made; None if one can."""
    try:
        socket.create_connection((place.host, place.port), timeout=5).close()
    except socket.gaierror as error:
        return f"whose name does not resolve ({error.strerror})"
    except UnicodeError:
        return "which is no host name"
    except OSError as error:
        return f"where nobody answers ({error.strerror or error})"
    return None


def pause(ranks: int) -> float:
    """Seconds for which each of so many ranks waits before it asks the store again."""
    return max(POLL_S, ASKING_S * ranks)


def answer(call: Callable[[], T]) -> T:
    """Result of a call to a store, which is in a thread: torch waits for ever for a program that says nothing.

    Raises: DistNetworkError where there is no answer within ANSWER_S; what `call` raises.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if errors:
        raise errors[0]
    if not results:
        raise dist.DistNetworkError(f"the store, which rank 0 has, timed out after {ANSWER_S} s")
    return results[0]


def _register(store: dist.Store, place: Place) -> None:
    """Enter this rank in the store. Raises: UserError where the store has it, or has another number of ranks."""
    size = int(store.compare_set("WORLD_SIZE", "", str(place.size)))
    name = f"{socket.gethostname()}, process {os.getpid()}"
    if size == place.size and store.add(f"count {place.rank}", 1) == 1:
        store.set(_key(place.rank), name)
        return
    if not store.check([MET]):  # else the store is another run's, which goes on
        store.add(FAILURES, 1)
    if size != place.size:
        raise UserError(f"rank {place.rank}: WORLD_SIZE is {place.size} here ({name}), and {size} on another rank")
    raise UserError(
        f"two processes have RANK {place.rank}: {name}, and {_text(store, _key(place.rank))}; give each its own, "
        "and every run on a machine a MASTER_PORT of its own"
    )


def _text(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else "another one"


def _key(rank: int) -> str:
    return f"rank {rank}"


def _wait(store: dist.Store, place: Place, patience: "_Patience") -> None:
    """Wait a moment for the other ranks. Raises: UserError, on rank 0 alone, where some do not come."""
    ranks = range(place.size)
    if answer(lambda: store.add(FAILURES, 0)):
        _linger(place)
        sys.exit(1)
    if place.rank > 0:
        time.sleep(pause(place.size))
    elif store.check([_key(rank) for rank in ranks]):
        store.set(MET, "")
    else:
        try:
            patience.wait(
                lambda: _missing([rank for rank in ranks if not store.check([_key(rank)])], place.size),
                "Start as many processes as WORLD_SIZE says, all with this MASTER_ADDR and MASTER_PORT",
            )
        except UserError:
            store.add(FAILURES, 1)
            _linger(place)
            raise


def _linger(place: Place) -> None:
    """Keep the store of rank 0 a moment longer: the other ranks see in it that one has failed, and end silently."""
    if place.rank == 0:
        time.sleep(5 * POLL_S)


def _missing(ranks: list[int], size: int) -> str:
    """The ranks that are not here, and how many are."""
    return f"rank{'s' * (len(ranks) > 1)} {listed(ranks, 8)}; {size - len(ranks)} of {amount(size, 'rank')} are here"


class _Patience:
    """Patience of `who`, which waits for other ranks: a line after NOTICE_S, an error after MEETING_S."""

    def __init__(self, who: str) -> None:
        self.who, self.began, self.noticed = who, time.monotonic(), False

    def wait(self, whom: Callable[[], str], advice: str) -> None:
        """Wait a moment longer. Raises: UserError after MEETING_S."""
        waited = time.monotonic() - self.began
        if waited > MEETING_S:
            raise UserError(f"{self.who} has waited {MEETING_S} s for {whom()}. {advice}")
        if waited > NOTICE_S and not self.noticed:
            self.noticed = True
            sys.stderr.write(f"{self.who} waits for {whom()}\n")
        time.sleep(POLL_S)
