"""Compares one kernel in one form with float64, in its own process, so that a crash or hang stops nothing else.

    python benchmarks/gpu/probe.py --list
    python benchmarks/gpu/probe.py cuda-match-cluster --out DIR

- The name of each kernel is printed before its call, so that the last line of the output names one that never ends.
- The checks run twice: once waiting for every launch, once without waiting, with overlapping launches if the device has
  them. Both runs must give the same bits.
- Memory is filled with NaN first, so that missing writes are seen. Outputs lie between zones in which nothing may be
  written.
- A wrong result is saved with its operands.
- Without a GPU (--toy) CUDA kernels run under the tests' emulator and Triton kernels under Triton's interpreter.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support"), str(REPOSITORY / "benchmarks" / "gpu")]


@dataclass(frozen=True)
class Case:
    """One probe: a check of probe_checks.py on m x n scores or m rows of n features.

    `toy` holds m and n for a toy run, `limits` fields of the device to override. `form` is what int16 scores of this
    shape must take: rows in a "block", a "cluster" or "long" ones; empty for any.
    """

    backend: str
    check: str
    m: int
    n: int
    toy: tuple[int, int] = (5, 300)
    limits: dict[str, Any] = field(default_factory=dict)
    form: str = ""
    threads: int | None = None  # most threads of a block in a toy run, so that short rows need clusters


LONG = {"shared_bytes": 0}
CASES = {
    "cuda-embed": Case("cuda", "embed", 65, 4099, (5, 33)),
    "cuda-symmetrize": Case("cuda", "symmetrize", 1030, 0, (33, 0)),
    "cuda-columns": Case("cuda", "columns", 70, 3004, (7, 300)),
    "cuda-pass-block": Case("cuda", "sinkhorn_pass", 300, 3001, form="block"),
    "cuda-pass-cluster": Case("cuda", "sinkhorn_pass", 300, 20008, (9, 1032), threads=32, form="cluster"),
    "cuda-pass-wide-cluster": Case("cuda", "sinkhorn_pass", 40, 65541, (5, 1031), threads=32, form="cluster"),
    "cuda-pass-long": Case("cuda", "sinkhorn_pass", 40, 3001, limits=LONG, form="long"),
    "cuda-pass-beyond-clusters": Case("cuda", "sinkhorn_pass", 20, 200_001, limits=LONG, form="long"),
    "cuda-match-block": Case("cuda", "match", 2, 3000, (2, 300), form="block"),
    "cuda-match-cluster": Case("cuda", "match", 2, 20008, (2, 1032), threads=32, form="cluster"),
    "cuda-match-wide-cluster": Case("cuda", "match", 2, 65540, (2, 1036), threads=32, form="cluster"),
    "cuda-match-long": Case("cuda", "match", 2, 3000, (2, 300), LONG, form="long"),
    "cuda-plan": Case("cuda", "plan", 37, 4099, (5, 33)),
    "cuda-stats": Case("cuda", "stats", 700, 1400, (20, 40)),
    "cuda-on-chip": Case("cuda", "on_chip", 512, 512, (150, 33), form="cluster"),
    "cuda-on-chip-odd": Case("cuda", "on_chip", 131, 1003, (13, 603), form="cluster"),
    "cuda-on-chip-small": Case("cuda", "on_chip", 100, 130, (30, 20), form="cluster"),
    "cuda-step": Case("cuda", "step", 130, 72, (9, 8)),
    "triton-embed": Case("triton", "embed", 65, 4099, (5, 33)),
    "triton-symmetrize": Case("triton", "symmetrize", 1030, 0, (33, 0)),
    "triton-columns": Case("triton", "columns", 70, 3004, (7, 60)),
    "triton-pass": Case("triton", "sinkhorn_pass", 300, 3001, (5, 61)),
    "triton-pass-whole-vectors": Case("triton", "sinkhorn_pass", 40, 3008, (5, 48)),
    "triton-pass-long": Case("triton", "sinkhorn_pass", 40, 65541, (5, 61)),
    "triton-match": Case("triton", "match", 2, 3000, (2, 60)),
    "triton-match-whole-vectors": Case("triton", "match", 2, 3008, (2, 48)),
    "triton-match-long": Case("triton", "match", 2, 65540, (2, 60)),
    "triton-plan": Case("triton", "plan", 37, 4099, (5, 33)),
    "triton-step": Case("triton", "step", 130, 72, (9, 8)),
    "triton-flash": Case("triton", "flash_step", 130, 72, (9, 8)),
}


class LoggedKernels:
    """Row kernels that print their name before each call and call `wait` after it."""

    def __init__(self, kernels: Any, wait: Callable[[], None]) -> None:
        self.kernels, self.wait = kernels, wait

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.kernels, name)
        if not callable(method):
            return method

        def run(*args: Any, **options: Any) -> Any:
            print(f"    {name} ...", end="", flush=True)
            result = method(*args, **options)
            self.wait()
            print(" ended", flush=True)
            return result

        return run


def kernels_of(case: Case, toy: bool, overlapping: bool) -> Any:
    """The row kernels of the case's backend, on a device with the case's limits."""
    if case.backend == "triton":
        from bam_kernels.backends import triton

        return triton.kernels()
    from bam_kernels.backends import cuda
    from bam_kernels.backends.cuda import shapes
    from bam_kernels.backends.cuda.row_kernels import CudaKernels
    from bam_kernels.backends.extension import _C

    if toy:
        import emulated

        if case.threads is not None:
            shapes.MOST_THREADS = case.threads
        return emulated.kernels(replace(emulated.HOPPER, programmatic=overlapping, **case.limits))
    here = cuda.query_device(0)
    device = replace(here, programmatic=here.programmatic and overlapping, **case.limits)
    return CudaKernels(_C.cuda_kernels(), lambda index: device)


def form_of(case: Case, m: int, n: int, device: Any) -> str:
    """The form that int16 scores (m, n) take on a device."""
    from bam_kernels.backends.cuda import shapes

    if case.check == "on_chip":
        return "too large for the chip" if shapes.on_chip(m, n, device) is None else "cluster"
    if case.check == "match":
        shape = shapes.match_shape(2, n, 2, device)
    else:
        shape = shapes.pass_shape(n, 2, device)
    team = None if shape is None else shape.team
    return "long" if team is None else "cluster" if team.cluster > 1 else "block"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES, help="probe to run")
    parser.add_argument("--list", action="store_true", help="print the names of the probes")
    parser.add_argument("--toy", action="store_true", help="run toy sizes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for wrong results (default: .)")
    options = parser.parse_args()
    if options.list or options.case is None:
        print("\n".join(CASES))
        return 0
    case = CASES[options.case]
    if options.toy and case.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    return probe(options.case, case, options.toy, options.out)


def probe(name: str, case: Case, toy: bool, out: Path) -> int:
    """Run a probe, waiting for launches and overlapping; exit status 0 if all results are right and equal."""
    import torch
    from probe_checks import CHECKS, Findings, poison

    if toy and case.backend == "triton":
        import triton_device  # noqa: F401  (mends Triton 3.6's interpreter)
    device = torch.device("cpu" if toy else "cuda")
    m, n = case.toy if toy else (case.m, case.n)
    wait = (lambda: None) if toy else torch.cuda.synchronize
    runs = []
    for overlapping in (False, True):
        how = "launches as the device can" if overlapping else "each launch waited for"
        print(f"{name}: {m} x {n}, {how}", flush=True)
        poison(device)
        findings = Findings(out / f"probe-{name}-{'overlapping' if overlapping else 'waiting'}")
        kernels = kernels_of(case, toy, overlapping)
        if case.form:
            findings.expect_form(case.form, form_of(case, m, n, kernels._query_device(0)))
        torch.manual_seed(0)
        CHECKS[case.check](LoggedKernels(kernels, (lambda: None) if overlapping else wait), device, m, n, findings)
        wait()
        findings.check_zones()
        runs.append(findings)
    first, second = runs
    if not first.results:
        first.wrong.append("nothing was checked")
    if not all(torch.equal(a, b) for a, b in zip(first.results, second.results, strict=True)):
        second.wrong.append("other bits where launches overlap, or from run to run")
    wrong = list(dict.fromkeys(first.wrong + second.wrong))
    worst = max(first.worst, second.worst)
    print(f"{name}: {'WRONG: ' + ', '.join(wrong) if wrong else 'right'}; largest error {worst:.2g} of its bound")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
