"""Kernels that this project has verified on hardware: verified.json, which benchmarks/gpu/verified.py writes.

An entry names a way, the GPU's compute capability, the code that ran there, minor versions of torch and of the kernels'
compiler, and a hash of the sources. After any change of a source it no longer holds.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ..ways import GPU_WAYS
from .identity import Identity

FILE = Path(__file__).with_name("verified.json")
Entry = dict[str, str]


def ways(here: Identity) -> tuple[str, ...]:
    """Ways that this project has verified for an identity."""
    return tuple(way for way in GPU_WAYS if entry(way, here) in entries())


def entry(way: str, here: Identity) -> Entry | None:
    """The entry that a verdict on `way` gives; None if the way cannot run there."""
    torch, capability = _minor(here["torch"]), here["capability"]
    common = {"way": way, "capability": capability, "torch": torch}
    if way != "cuda":
        compiler = f"triton {_minor(here['triton'])}"
        return common | {"code": capability, "compiler": compiler, "sources": here["sources"]}
    if not here["extension"] or not capability[0].isdigit():
        return None
    built_from, _, architectures = here["extension"].partition(" for ")
    csrc, _, compiler = built_from.partition(" ")
    code = code_for(capability, architectures.split())
    return common | {"code": code, "compiler": compiler, "sources": f"{here['sources']} {csrc}"}


def code_for(capability: str, architectures: list[str]) -> str:
    """Which of the compiled architectures, in torch's notation, a GPU of this compute capability runs."""
    major, minor = map(int, capability.split("."))

    def number(architecture: str) -> tuple[int, int]:
        first, _, second = architecture.removesuffix("+PTX").rstrip("af").partition(".")
        return int(first), int(second)

    machine = [a for a in architectures if number(a)[0] == major and number(a)[1] <= minor]
    machine = [a for a in machine if not a.endswith("a") or number(a) == (major, minor)]
    if machine:
        return max(machine, key=lambda a: (number(a), a.endswith("a"))).removesuffix("+PTX")
    portable = [a for a in architectures if a.endswith("+PTX") and number(a) <= (major, minor)]
    return max(portable, key=number, default="")


@cache
def entries() -> list[Entry]:
    """All entries. Raises: ValueError naming the file if it is damaged."""
    try:
        listed: Any = json.loads(FILE.read_text())
        return [dict(one) for one in listed]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{FILE}: {error}") from error


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
