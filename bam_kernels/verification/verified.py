"""Kernels that this project has verified on hardware: verified.json, which benchmarks/gpu/add_verified.py writes.

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
    capability = here["capability"].partition(":")[0]  # without the switches of an AMD GPU's memory
    common = {"way": way, "capability": capability, "torch": _minor(here["torch"])}
    if way != "cuda":
        compiler = f"triton {_minor(here['triton'])}"
        common |= {"code": capability, "compiler": compiler, "sources": here["sources"]}
        return common if here["triton"] else None
    built_from, _, architectures = here["extension"].partition(" for ")
    code = code_for(capability, architectures.split()) if capability[0].isdigit() else ""
    if not code:
        return None
    csrc, _, compiler = built_from.partition(" ")
    return common | {"code": code, "compiler": compiler, "sources": f"{here['sources']} {csrc}"}


def code_for(capability: str, architectures: list[str]) -> str:
    """Which of the compiled architectures, in torch's notation, a GPU of this compute capability runs; "": none.

    Machine code runs on its own major version from its minor version on, PTX on all newer GPUs. With the suffix "a"
    either runs on its own architecture alone; PTX with "f" on its own major version.
    """
    here = _number(capability)

    def fits(architecture: str, *, as_ptx: bool) -> bool:
        name = architecture.removesuffix("+PTX")
        there, suffix = _number(name.rstrip("af")), name[-1]
        if suffix == "a":
            return there == here
        return there <= here and (there[0] == here[0] or (as_ptx and suffix != "f"))

    def newest(names: list[str]) -> str:
        return max(names, key=lambda name: (_number(name.rstrip("af")), name[-1] == "a"), default="")

    machine = newest([a.removesuffix("+PTX") for a in architectures if fits(a, as_ptx=False)])
    ptx = newest([a.removesuffix("+PTX") for a in architectures if a.endswith("+PTX") and fits(a, as_ptx=True)])
    return machine or (f"{ptx}+PTX" if ptx else "")


def _number(architecture: str) -> tuple[int, int]:
    major, _, minor = architecture.partition(".")
    return int(major), int(minor)


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
