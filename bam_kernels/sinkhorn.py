"""Balanced attention for use in other methods: Sinkhorn-normalised cosine similarities.

m rows q, N keys k of all ranks, D features; for mask "block", layout.py defines the dimension letters.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .agreement import share_errors_with_ranks
from .backends import choose, row_kernels
from .engine import attention
from .engine.cost import fastest_rows
from .layout import Layout
from .operators import as_tensor, define, make_differentiable, refuse_second_derivative
from .options import AttentionOptions, check_positive
from .precision import product_precision
from .ranks import ranks_named, ranks_of
from .ways import split


def sinkhorn_attention(
    q: Tensor,
    k: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    mask: str = "none",
    views: int = 1,
    key_views: int | None = None,
    normalize: bool = True,
    output: str = "plan",
    differentiable: bool = False,
    group: Any = None,
    backend: str = "auto",
    precision: str = "default",
) -> Tensor | tuple[Tensor, Tensor]:
    """Balanced attention P_ij = exp(s_ij/epsilon + f_i + g_j) of scores s = q kᵀ, by Sinkhorn normalisation.

    From f = 0, each of `iterations` sets g_j = -log Σ_i exp(s_ij/epsilon + f_i), then
    f_i = -log Σ_j exp(s_ij/epsilon + g_j). Columns come first and rows last, so every row of P sums to one.

    q, k            (m, D) and (n, D), float32, float16, bfloat16, or float64 (reference); k None: the keys are q
    epsilon         Sinkhorn regularisation
    iterations      Sinkhorn iterations
    mask            "none"; "self": row i does not attend to key i, and k must be None; "block": rows and keys are
                    view-major, row v*B + i is view v of image i, and a row does not attend to the views of its image
    views, key_views  for mask "block": q has views*B rows, k has key_views*B rows (default: key_views = views); with k
                    None the keys are the first key_views*B rows of q
    normalize       L2-normalise the rows of q and k first
    output          "plan": P (m, N); "potentials": f (m,) and g (N,), natural logarithms, in memory linear in m + N
    differentiable  True: exact gradient through the unrolled iterations, by recomputation; second derivatives are an
                    error except with backend="reference". False: the result is a constant
    group           torch.distributed process group over whose ranks q and k are spread, with an equal number of keys on
                    each rank; None: the default group, or one rank if torch.distributed is not initialised
    backend         auto | reference | cpu | triton | cuda, as in `bam_loss`: auto takes the fastest verified kernels
    precision       default | exact, as in `bam_loss`

    Returns float32 (float64 for float64 input); columns are the keys of all ranks, ordered by view, rank, image.
    Raises: ValueError or TypeError naming the argument, what must hold and what came; NotImplementedError for
    differentiable=True with several ranks.
    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013, in log space.
    """
    options = AttentionOptions(
        epsilon,
        iterations,
        mask,
        views,
        key_views,
        normalize,
        output,
        differentiable,
        group,
        backend,
        precision,
    )
    with share_errors_with_ranks("sinkhorn_attention", group, q):
        options = options.with_python_numbers("sinkhorn_attention")
        layout = options.layout("sinkhorn_attention", q, k)
        ranks = ranks_of("sinkhorn_attention", group)
        ways = choose("sinkhorn_attention", options, q.device, q.dtype, "slab", ranks)
    if ways == "reference":
        return reference.attention(q, k, layout, options)
    if not options.differentiable:
        q, k = q.detach(), k.detach() if k is not None else None
    plan, f, g = _attention_operator(
        q,
        k,
        as_tensor(options.epsilon),
        options.iterations,
        mask,
        [layout.V, layout.T, layout.W, layout.rank],
        options.normalize,
        output == "plan",
        precision,
        fastest_rows(split(ways)).backend,
        ranks[2],
    )
    return plan if output == "plan" else (f, g)


def _layout(q: Tensor, k: Tensor | None, mask: str, dimensions: list[int]) -> Layout:
    V, T, W, rank = dimensions
    B = q.shape[0] // V if mask == "block" else (q if k is None else k).shape[0]
    return Layout(B=B, V=V, L=V, T=T, D=q.shape[1], W=W, rank=rank)


def _options(
    epsilon: Tensor, iterations: int, mask: str, dimensions: list[int], normalize: bool, plan: bool, precision: str
) -> AttentionOptions:
    value = epsilon.item()
    check_positive("sinkhorn_attention", "epsilon", value)  # a compiled function does not check values of tensors
    return AttentionOptions(
        epsilon=value,
        iterations=iterations,
        mask=mask,
        views=dimensions[0],
        key_views=dimensions[1],
        normalize=normalize,
        output="plan" if plan else "potentials",
        differentiable=False,
        group=None,
        backend="auto",
        precision=precision,
    )


def _attention_impl(
    q: Tensor,
    k: Tensor | None,
    epsilon: Tensor,
    iterations: int,
    mask: str,
    dimensions: list[int],
    normalize: bool,
    plan: bool,
    precision: str,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, ranks = _layout(q, k, mask, dimensions), ranks_named(group, *dimensions[2:])
    options = _options(epsilon, iterations, mask, dimensions, normalize, plan, precision)
    with product_precision(q.device, precision):
        return attention.forward(q, k, layout, options, ranks, row_kernels(backend))


def _attention_fake(
    q: Tensor,
    k: Tensor | None,
    epsilon: Tensor,
    iterations: int,
    mask: str,
    dimensions: list[int],
    normalize: bool,
    plan: bool,
    precision: str,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    N = _layout(q, k, mask, dimensions).N
    m = q.shape[0]
    return (
        q.new_empty((m, N) if plan else 0, dtype=torch.float32),
        q.new_empty(m, dtype=torch.float32),
        q.new_empty(N, dtype=torch.float32),
    )


def _backward_impl(
    q: Tensor,
    k: Tensor | None,
    epsilon: Tensor,
    iterations: int,
    mask: str,
    dimensions: list[int],
    normalize: bool,
    precision: str,
    backend: str,
    plan: Tensor | None,
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = _layout(q, k, mask, dimensions)
    options = _options(epsilon, iterations, mask, dimensions, normalize, plan is not None, precision)
    with product_precision(q.device, precision):
        dq, dk = attention.backward(q, k, layout, options, row_kernels(backend), plan, (grad_plan, grad_f, grad_g))
    return dq.to(q.dtype), dk.to(q.dtype if k is None else k.dtype)


def _backward_fake(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else q.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, epsilon, iterations, mask, dimensions, normalize, wants_plan, precision, backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, epsilon, output[0] if wants_plan else None)
    ctx.problem = (iterations, mask, dimensions, normalize, precision, backend)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, epsilon, plan = ctx.saved_tensors
    dq, dk = _backward_operator(q, k, epsilon, *ctx.problem, plan, *grads)
    return (dq, dk if k is not None else None, *[None] * (len(ctx.needs_input_grad) - 2))


_PROBLEM = "Tensor q, Tensor? k, Tensor epsilon, int iterations, str mask, SymInt[] dimensions, bool normalize"
_attention_operator = make_differentiable(
    define(
        f"sinkhorn_attention({_PROBLEM}, bool plan, str precision, str backend, str group) "
        "-> (Tensor plan, Tensor f, Tensor g)",
        _attention_impl,
        _attention_fake,
    ),
    _backward,
    _setup_context,
)
_backward_operator = make_differentiable(
    define(
        f"sinkhorn_attention_backward({_PROBLEM}, str precision, str backend, Tensor? plan, Tensor? grad_plan, "
        "Tensor? grad_f, Tensor? grad_g) -> (Tensor dq, Tensor dk)",
        _backward_impl,
        _backward_fake,
    ),
    refuse_second_derivative,
)
