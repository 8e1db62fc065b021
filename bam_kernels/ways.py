"""Ways to compute: a backend with an engine.

`backend="auto"` chooses among several ways. Operators take them as one string, joined by "+".
"""

from typing import NamedTuple


class Way(NamedTuple):
    """Backend whose kernels run, and engine that calls them."""

    backend: str
    engine: str


# The ways of GPUs are in order of preference where a forecast finds them equally fast.
WAYS = {
    "cuda": Way("cuda", "slab"),
    "triton": Way("triton", "slab"),
    "flash": Way("triton", "flash"),
    "cpu": Way("cpu", "slab"),
}
GPU_WAYS = ("cuda", "triton", "flash")


def joined(names: tuple[str, ...]) -> str:
    """Ways as one string."""
    return "+".join(names)


def split(text: str) -> tuple[str, ...]:
    """Names of the ways in a string that `joined` made."""
    return tuple(text.split("+")) if text else ()


def of_backend(backend: str, engine: str) -> tuple[str, ...]:
    """Names of the ways of a named backend with an engine, or with any engine for "auto"."""
    return tuple(name for name, way in WAYS.items() if way.backend == backend and engine in ("auto", way.engine))
