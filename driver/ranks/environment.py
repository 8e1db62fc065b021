"""Environment variables that give each process of a run its rank: those of torchrun, or of a script for a scheduler."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import UserError

HOST = re.compile(r"[^\s:/@]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?")
"""A host's name or IPv4 address without a port, or an IPv6 address."""
PORTS = range(1, 2**16)


@dataclass(frozen=True)
class Place:
    """Rank of this process among `size` ranks, and where rank 0 is met."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int
    hosted: bool
    """Whether a launcher, such as torchrun, hosts the store, rather than rank 0."""
    attempt: str
    """Number of times that the launcher has started the ranks anew. Its store keeps what earlier ranks have written."""


def place_in(environment: Mapping[str, str]) -> Place | None:
    """Place that the environment variables give to this process; None for one process alone.

    Raises: UserError where a variable is missing or has no meaning.
    """
    if "WORLD_SIZE" not in environment:
        if "RANK" in environment:
            raise UserError(
                f"RANK is {environment['RANK']!r}, but WORLD_SIZE is not set: set it to the number of ranks, "
                "or unset RANK for one process alone"
            )
        return None
    size = _number(environment, "WORLD_SIZE", 1)
    alone = size == 1
    rank = 0 if alone and "RANK" not in environment else _number(environment, "RANK", 0, size - 1)
    local_rank = _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else rank
    if alone:
        return None
    host = _text(environment, "MASTER_ADDR")
    if not HOST.fullmatch(host):
        raise UserError(f"MASTER_ADDR must be a host name or an IP address, without a port, got {host!r}")
    port = _number(environment, "MASTER_PORT", PORTS[0], PORTS[-1])
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, local_rank, host, port, hosted, environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise UserError(
            f"{name} is not set, and WORLD_SIZE is {environment['WORLD_SIZE']}: several ranks need RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT, which torchrun sets; unset WORLD_SIZE for one process alone"
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str, lowest: int, highest: int | None = None) -> int:
    text = _text(environment, name)
    number = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text.strip()) else None
    if number is None or number < lowest or (highest is not None and number > highest):
        bounds = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        why = f" (WORLD_SIZE is {environment['WORLD_SIZE']})" if name == "RANK" else ""
        raise UserError(f"{name} must be an integer {bounds}{why}, got {text!r}")
    return number
