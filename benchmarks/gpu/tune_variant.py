"""Times the Sinkhorn pass and the match of one build of the extension, after a comparison with float64.

    BAM_KERNELS_EXTENSION=FILE python benchmarks/gpu/tune_variant.py --name NAME --rows FILE
    BAM_KERNELS_EXTENSION=FILE python benchmarks/gpu/tune_variant.py --name NAME --rows FILE --step

A wrong result is printed and not timed.
"""

import argparse
import sys
from pathlib import Path

import torch
from one_step import steps_of
from problem import relative_error
from rows import Row, Rows
from times import EPSILON, TAU, Clock, Operands, backends

SHAPE, VIEWS, TOY_SHAPE, TOY_VIEWS = (2048, 8192, 256), 8, (32, 64, 16), 4
STEPS, TOY_STEPS = (("2048x8192x256", 8), ("2048x8192x4096", 8)), (("16x32x16", 2),)
LARGEST_ERROR = 2e-3
GRADIENT_SCALE = 16384.0  # Operands.match writes a A - Pbar times this


def error_of_pass(made: Operands) -> float:
    """Larger one of the relative errors of row potential and column sums after one Sinkhorn pass."""
    made.sinkhorn_pass()
    K = torch.exp2(made.fixed.double() * made.scale)
    rows = 1 / K.sum(1)
    potential = torch.exp2(made.row.exponent.double()) * made.row.mantissa.double()
    return max(relative_error(potential, rows), relative_error(made.c, (K * rows[:, None]).sum(0)))


def error_of_match(made: Operands) -> float:
    """Relative error of the gradient of the scores that `match` writes."""
    layout = made.layout
    V, L = layout.V, layout.L
    made.match()
    s = made.fixed.double().view(V, layout.B, layout.N) * made.step
    P, A = (s[:L] / EPSILON).softmax(-1), (s / TAU).softmax(-1)
    others = [[t for t in range(L) if t != v] for v in range(V)]
    weight = 1 / (L * (V - 1))
    truth = torch.stack([A[v] * len(of_v) * weight - P[of_v].sum(0) * weight for v, of_v in enumerate(others)])
    gradient = made.gradient.view(torch.float16) if made.gradient.dtype == torch.int16 else made.gradient
    return relative_error(gradient.view_as(truth), truth * GRADIENT_SCALE)


def kernel_rows(clock: Clock, rows: Rows, name: str, toy: bool) -> int:
    """Check and time the kernels; returns how many were wrong."""
    kernels = backends(clock.device).get("cpu" if toy else "cuda")
    if kernels is None:
        raise SystemExit("the extension's kernels cannot run here")
    shape, views = (TOY_SHAPE, TOY_VIEWS) if toy else (SHAPE, VIEWS)
    sets = [Operands(kernels, *shape, views, clock.device, seed) for seed in range(2 if toy else 4)]
    M, N = sets[0].layout.M, sets[0].layout.N
    wrong = 0
    for kernel, error in (("sinkhorn_pass", error_of_pass(sets[0])), ("match", error_of_match(sets[0]))):
        if not error <= LARGEST_ERROR:
            print(f"WRONG {kernel}: error {error:.2g}, not timed", flush=True)
            wrong += 1
            continue
        for how, of_how in (("cold", sets), ("warm", sets[:1] * len(sets))):
            us = clock.graph_us([getattr(made, kernel) for made in of_how])
            rows.add(Row("kernel", kernel, kernels.backend, f"{M}x{N}", f"graph, {how}", us, error=error, note=name))
    return wrong


def step_rows(clock: Clock, rows: Rows, name: str, toy: bool) -> None:
    backend = "cpu" if toy else "cuda"
    for shape, views in TOY_STEPS if toy else STEPS:
        us = clock.graph_us(steps_of(shape, views, backend, clock.device))
        rows.add(Row("step", "loss and gradient", backend, shape, "graph", us, teacher=True, note=name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the build, written to the rows")
    parser.add_argument("--rows", type=Path, help="file to which a JSON line is appended for each number")
    parser.add_argument("--step", action="store_true", help="time whole steps instead of kernels")
    parser.add_argument("--toy", action="store_true", help="run toy sizes with the CPU kernels")
    options = parser.parse_args()
    device = torch.device("cpu" if options.toy else "cuda")
    clock, rows = Clock(device, 0.002 if options.toy else 0.3), Rows(options.rows)
    if options.step:
        step_rows(clock, rows, options.name, options.toy)
        return 0
    return int(kernel_rows(clock, rows, options.name, options.toy) > 0)


if __name__ == "__main__":
    sys.exit(main())
