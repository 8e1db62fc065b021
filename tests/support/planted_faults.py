"""Kernels with a fault planted in them, under the emulator: what looks for faults must find each of these.

    environment = os.environ | {"BAM_EMULATED": build(FAULTS["wrong phase"])}

A process started with that environment runs csrc/cuda with one line changed, and everything else as it is.
"""

from dataclasses import dataclass
from pathlib import Path

import emulated


@dataclass(frozen=True)
class Fault:
    """`line` of csrc/cuda/`file`.cu becomes `faulty`; `kernel` is the row kernel (a method of CudaKernels) it hits."""

    kernel: str
    file: str
    line: str
    faulty: str


FAULTS = {
    # Where rows come by bulk copies (Hopper and newer, rows that fit on chip) the call fails: threads wait for ever.
    "wrong phase": Fault(
        "sinkhorn_pass",
        "sinkhorn_pass",
        "arriving.wait<kGroups - 1>(stage_of(group, kGroups), odd_use(group, kGroups));",
        "arriving.wait<kGroups - 1>(stage_of(group, kGroups), odd_use(group, kGroups) ^ 1);",
    ),
    # The results are right; the 4 bytes after `sums` are overwritten, and a guarded page there ends the process.
    "write past the end": Fault(
        "column_lse",
        "column_lse",
        "p.sum[j] = before.total *",
        "p.sum[j] = p.sum[p.n] = before.total *",
    ),
    # The call does not return, from two iterations on of a problem that fits on chip.
    "no end": Fault(
        "sinkhorn",
        "sinkhorn_on_chip",
        "for (int iteration = 1; iteration < p_.iterations; ++iteration) {",
        "for (int iteration = 1; iteration < p_.iterations;) {",
    ),
}


def faulty_source(fault: Fault) -> str:
    source = (emulated.SOURCES / f"{fault.file}.cu").read_text()
    if source.count(fault.line) != 1:
        raise ValueError(f"{fault.file}.cu has {source.count(fault.line)} lines to change, not one: {fault.line}")
    return source.replace(fault.line, fault.faulty)


def build(fault: Fault) -> str:
    """Path of an emulator library with this fault, for BAM_EMULATED; built once, in the emulator's build folder."""
    name = f"{fault.file}-{fault.kernel}-faulty"

    def compile_and_link(library: Path) -> None:
        source, out = library.with_suffix(".cu"), library.with_suffix(".o")
        source.write_text(faulty_source(fault))
        emulated.compile_source(source, out)
        emulated.link(emulated.objects() | {fault.file: out}, library)

    return emulated.built(f"{name}.so", compile_and_link)
