"""Competitors for unmasked Sinkhorn from embeddings to potentials, among them the flash-sinkhorn package.

The potentials f (M) and g (N) give P = exp(q kᵀ/eps + f_i + g_j), whose rows sum to one; q (M, D) and k (N, D) are
unit rows.
"""

from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from competitor import Choice, Competitor, Rotation, RowName
from our_kernels import our_competitor
from problem import Problem, Truth, Work, sinkhorn_work
from torch import Tensor

from bam_kernels import reference, sinkhorn_attention

POTENTIALS: tuple[RowName, ...] = ("cpu", "triton", "cuda")
Potentials = tuple[Tensor, Tensor]


def truth_of_potentials(problem: Problem) -> Truth:
    """The true P (M, N), computed in float64."""
    q, k = (x.double() for x in rows_of(problem))
    return Truth(reference.sinkhorn_attention(q, k, **given(problem), normalize=False), None)


def rows_of(problem: Problem) -> tuple[Tensor, Tensor]:
    return reference.normalize(problem.student)[0], problem.keys


def given(problem: Problem) -> dict[str, Any]:
    return {"epsilon": problem.options.epsilon, "iterations": problem.options.iterations, "mask": "none"}


def potentials_competitors(problem: Problem, choice: Choice) -> list[Competitor]:
    layout, options = problem.layout, problem.options
    q, k = rows_of(problem)
    fresh = Rotation((q, k), choice.cold_bytes)
    passes = sinkhorn_work(layout, options.iterations)
    work = Work(passes.bytes, passes.exps, 2 * layout.M * layout.N * layout.D)

    def outputs(run: Callable[..., Potentials]) -> Callable[[], Truth]:
        def plan() -> Truth:
            f, g = run(*fresh())
            return Truth((q.double() @ k.double().T / options.epsilon + f.double()[:, None] + g.double()).exp(), None)

        return plan

    def reference_potentials(q: Tensor, k: Tensor) -> Potentials:
        return reference.log_sinkhorn(q @ k.T / options.epsilon, options.iterations)[:2]

    competitors = []
    for kind, kernels in choice.ours(problem, POTENTIALS):

        def run(q: Tensor, k: Tensor, backend: str = kernels.backend) -> Potentials:
            return sinkhorn_attention(
                q, k, **given(problem), normalize=False, output="potentials", precision="exact", backend=backend
            )

        competitors.append(our_competitor(kind, kernels, fresh, run, outputs(run), work))
    others: list[tuple[RowName, str, Callable[..., Potentials]]] = [
        ("eager", "eager reference", reference_potentials),
        ("compile", "torch.compile", torch.compile(reference_potentials, fullgraph=True, dynamic=False)),
    ]
    competitors += [
        Competitor(kind, name, fresh, run, outputs(run), work) for kind, name, run in others if kind in choice.rows
    ]
    return competitors + flash_sinkhorn(problem, choice, fresh, outputs, work)


def flash_sinkhorn(
    problem: Problem,
    choice: Choice,
    fresh: Rotation,
    outputs: Callable[[Callable[..., Potentials]], Callable[[], Truth]],
    work: Work,
) -> list[Competitor]:
    """The alternating solver of the flash-sinkhorn package, if it is installed; it takes CUDA tensors only.

    Half its squared distance of unit rows is 1 - cosine, so its regularisation is our epsilon. It updates its first
    argument first, as our iterations update the keys first: the keys are its first argument. Its plan has uniform
    marginals 1/N and 1/M, which its potentials leave out.
    """
    kinds: tuple[RowName, ...] = ("flash-sinkhorn", "flash-sinkhorn-tf32")
    chosen = [kind for kind in kinds if kind in choice.rows]
    if not chosen or problem.student.device.type != "cuda":
        return []
    try:
        from flash_sinkhorn.kernels import sinkhorn_flashstyle_sqeuclid as kernels
        from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating as solve
        from triton.testing import do_bench
    except ImportError:
        return []
    # The package times 44 tiles before a launch of a new shape; 20 ms for each suffice to find the fastest.
    kernels._flashsinkhorn_lse_fused_kernel_autotune._do_bench = partial(do_bench, warmup=5, rep=20)
    M, N, eps = problem.layout.M, problem.layout.N, problem.options.epsilon
    a, b = (torch.full((size,), 1 / size, device=problem.student.device) for size in (N, M))
    log_N = torch.tensor(float(N)).log().item()
    competitors = []
    for kind in chosen:
        tf32 = kind.endswith("tf32")

        def run(q: Tensor, k: Tensor, tf32: bool = tf32) -> Potentials:
            n_iters = problem.options.iterations
            return solve(k, q, a, b, eps=eps, n_iters=n_iters, cost_scale=0.5, allow_tf32=tf32, threshold=None)

        def in_our_terms(q: Tensor, k: Tensor, run: Callable[..., Potentials] = run) -> Potentials:
            key_potential, row_potential = run(q, k)
            return (row_potential.double() - 1) / eps - log_N, key_potential.double() / eps

        name = f"flash-sinkhorn {metadata.version('flash-sinkhorn')}{' tf32' if tf32 else ''}"
        precision = "tf32" if tf32 else "float32"
        competitors.append(Competitor(kind, name, fresh, run, outputs(in_our_terms), work, precision=precision))
    return competitors
