"""The functions `bam_loss` and `bam_targets` and the module `BAMLoss`: argument checks, operators, gradient.

layout.py defines the dimension letters.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .agreement import share_errors_with_ranks
from .backends import decide_early
from .checked_call import PACKED, checked_call, unpacked
from .engine.step import Step
from .graphs import StepGraphs
from .header import NonFinite
from .operators import (
    are_plain,
    define,
    make_differentiable,
    refuse_second_derivative,
    rounded_product,
    wants_gradient,
    without_operator,
)
from .options import Options, check_bool, options_of, python_number
from .precision import flags_of_products
from .stats import BAMStats


def bam_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    views: int | None = None,
    target_views: int | None = None,
    key_views: int | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    top_k: int = 0,
    mask_positives: bool = True,
    target_rows: str = "teacher",
    group: Any = None,
    backend: str = "auto",
    engine: str = "auto",
    precision: str = "default",
    memory_budget: int | None = None,
    regather: bool = False,
    non_finite: str = "error",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BAMStats]:
    """BAM loss: cross entropy between the attention A of each view and the balanced attention P of the other views.

        loss = mean_{t<L} mean_{v != t} mean_i ( -Σ_j P_t,ij log A_v,ij )

    A = softmax(z kᵀ / temperature) is the attention of each view over the images of the global batch. P is
    exp(y kᵀ / epsilon) after `iterations` of Sinkhorn normalisation of columns, then rows; P is a constant of the
    gradient. z, y and k are L2-normalised: student embeddings, teacher embeddings (or z, see target_rows) and keys. A
    row does not attend to the views of its own image.
    All V views of the student (all R views of a teacher) are rows of the Sinkhorn problem, but only the first L views
    give targets. For V = 1 the view is matched to its own target. A row with a norm below 1e-12 is divided by 1e-12 and
    gets no gradient.

    student         (V*B, D) embeddings, row v*B + i is view v of image i, or (V, B, D); float32, float16, bfloat16, or
                    float64 (reference)
    teacher         (R*B, D) or (R, B, D), never differentiated: keys, and by default targets, come from its embeddings;
                    None: they come from the student's embeddings
    views           V; needed for a 2-D student
    target_views    L: the first L views give targets; default min(V, 2), or min(V, R, 2) with a teacher
    key_views       T: the first T views are the keys; default L
    temperature     tau, the temperature of the source attention A
    epsilon         Sinkhorn regularisation of the target P, at least 1e-6; float32 is accurate down to 1e-3
    iterations      Sinkhorn iterations, columns then rows
    top_k           keep the k largest columns of each image's mean target in all its target views, and normalise the
                    rows to sum to one; 0, or N and more: keep all
    mask_positives  leave the views of a row's own image out of A and P
    target_rows     with a teacher: rows of the Sinkhorn problem, whose first L views give targets, "teacher" or
                    "student"
    group           torch.distributed process group over whose ranks the batch is spread, with an equal number of images
                    on each rank; None: the default group, or one rank if torch.distributed is not initialised
    backend         auto | reference | cpu | triton | cuda; auto: cpu for CPU tensors, on a GPU the fastest verified
                    kernels (see below), reference for float64 and, with a warning, where there are no kernels
    engine          auto | slab | flash (triton only); auto: the engine that is forecast to be faster
    precision       default: where the input has 16 bits or torch's flag allows rounding, 16-bit arithmetic on GPUs and
                    products of two bf16 parts on CPUs with AMX; exact: float32 products whatever torch's flags; fp8:
                    where a backend has it
    memory_budget   bytes the engine may use for scores; None: a quarter of the memory that is free, 64 MiB at least
    regather        with several ranks: do not keep the gathered keys but gather them again for the gradient; all scores
                    are then kept
    non_finite      on CPUs, if a row has an infinite or NaN entry on any rank: "error" raises ValueError; "nan" makes
                    loss and gradient NaN, so that a gradient scaler skips the step. On GPUs always NaN
    return_stats    return (loss, BAMStats)

    Returns a scalar, float32 (float64 for float64 input): the mean over this rank's images.
    Gradient: computed together with the loss. With several ranks it is the gradient of the sum of all ranks' losses by
    this rank's embeddings. DistributedDataParallel averages parameter gradients over ranks, which gives the gradient of
    the mean loss. The kernels have no second derivatives and no forward mode; asking for one is an error. The reference
    has both, with P a constant.
    Ranks: every rank must call, with equal options; ranks that differ raise ValueError.
    backend="auto" on a GPU: kernels count as verified if this project has tested them on such a GPU with the same
    software, or if a trial on this machine has found them right. The trial runs once, in other processes, at the first
    call or when BAMLoss is constructed; it takes minutes where Triton compiles. Its verdict is kept on disk.
    BAM_KERNELS_VERIFY=off skips it. torch.compile, the capture of a CUDA graph and data workers never start a trial,
    but use what is known. Several ranks use kernels that are verified on all of them.
    Raises: ValueError or TypeError naming the argument, what must hold and what came.
    Source: Shalam and Korman, "Unsupervised Representation Learning by Balanced Self Attention Matching", ECCV 2024.
    """
    options = Options(
        views,
        target_views,
        key_views,
        temperature,
        epsilon,
        iterations,
        top_k,
        mask_positives,
        target_rows,
        group,
        backend,
        engine,
        precision,
        memory_budget,
        regather,
        non_finite,
    )
    return _loss(student, teacher, options, return_stats)


def _loss(
    student: Tensor, teacher: Tensor | None, options: Options, return_stats: bool, graphs: StepGraphs | None = None
) -> Tensor | tuple[Tensor, BAMStats]:
    with share_errors_with_ranks("bam_loss", options.group, student):
        if type(return_stats) is not bool:
            return_stats = python_number("bam_loss", "return_stats", return_stats)
            check_bool("bam_loss", "return_stats", return_stats)
        call = checked_call("bam_loss", student, teacher, options)
        ways = call.ways(student)
    if ways == "reference":
        if graphs is not None:
            graphs.warn("the reference computes this call, and a graph needs kernels")
        checked = replace(call.options, group=options.group)
        return reference.loss(student, teacher, call.layout, checked, return_stats)
    teacher = teacher.detach() if teacher is not None else None
    if call.plain:
        loss, stats, _ = _loss_directly(student, teacher, call.step(ways), wants_gradient(student), graphs)
    else:
        loss, stats, _ = _loss_operator(student, teacher, *call.packed(ways), wants_gradient(student))
    return (loss, BAMStats(*stats.unbind())) if return_stats else loss


def bam_targets(student: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
    """Targets P of the BAM loss, without gradient, for inspection and tests.

    student, teacher, options: as `bam_loss`, without return_stats.
    Returns P (L*B, N), float32 (float64 for float64 input): row t*B + i is target view t of image i; columns are the
    keys of all ranks, ordered by view, rank, image. Every row sums to one.
    Raises: ValueError or TypeError as `bam_loss`.
    """
    with share_errors_with_ranks("bam_targets", options.get("group"), student):
        call = checked_call("bam_targets", student, teacher, options_of("bam_targets", options))
        ways = call.ways(student)
    if ways == "reference":
        checked = replace(call.options, group=options.get("group"))
        return reference.targets(student, teacher, call.layout, checked)
    teacher = teacher.detach() if teacher is not None else None
    return _targets_operator(student.detach(), teacher, *call.packed(ways))


def _loss_impl(
    student: Tensor, teacher: Tensor | None, numbers: list[int], scales: Tensor, text: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return unpacked("bam_loss", student, numbers, scales, text).loss(student, teacher, needs_grad)


def _loss_fake(student: Tensor, teacher: Tensor | None, *packed_and_needs_grad: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad = packed_and_needs_grad[-1]
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(6, dtype=torch.float32),
        student.new_empty(student.shape if needs_grad else 0, dtype=torch.float32),
    )


def _loss_of_step(
    student: Tensor, teacher: Tensor | None, step: Step, needs_grad: bool, graphs: StepGraphs | None
) -> tuple[Tensor, ...]:
    if graphs is None:
        return step.loss(student, teacher, needs_grad)
    refusal = "the batch is spread over several ranks" if step.layout.W > 1 else None
    key = step, needs_grad, *flags_of_products(student.device)
    return graphs(key, partial(step.loss, needs_grad=needs_grad), student.detach(), teacher, refusal)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save dz for the backward pass, in eager mode.

    dz stays differentiable, so that a derivative of the gradient reaches `_backward`, which raises an error.
    """
    student, (_, stats, dz) = inputs[0], output
    ctx.set_materialize_grads(False)  # else torch makes zeros for stats and dz
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(dz)
    ctx.dtype = student.dtype


def _setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save dz and the student for the backward pass, under torch.compile.

    The compiler asks for derivatives of all differentiable outputs, so dz is marked as not differentiable. The gradient
    comes from an operator that takes the student, so that the compiler sees the dependence.
    """
    _setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], inputs[0])


def _backward(ctx: Any, grad_loss: Tensor | None, _: None, grad_dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_dz is not None:
        refuse_second_derivative()
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    dz, *student = ctx.saved_tensors
    grad = _gradient_operator(grad_loss, dz, *student) if student else _scaled(grad_loss, dz, ctx.dtype)
    return (grad, *[None] * (len(ctx.needs_input_grad) - 1))


def _scaled(grad_loss: Tensor, dz: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():  # a product that is recorded is made of torch's own operators
        return (grad_loss * dz).to(dtype)
    if dtype == dz.dtype:
        return grad_loss * dz
    if are_plain(grad_loss):
        return torch.mul(grad_loss, dz, out=torch.empty_like(dz, dtype=dtype))
    return rounded_product(grad_loss, dz, dtype)


def _targets_impl(student: Tensor, teacher: Tensor | None, *packed: Any) -> Tensor:
    step = unpacked("bam_targets", student, *packed, same_world=True)
    try:
        with step.call(student, teacher, needs_grad=False) as (engine, call):
            return engine.targets(call)
    except NonFinite:
        return _targets_fake(student, teacher, *packed).fill_(math.nan)


def _targets_fake(student: Tensor, teacher: Tensor | None, numbers: list[int], *rest: Any) -> Tensor:
    V, L, T, _, W = numbers[:5]
    B = student.numel() // (V * student.shape[-1])
    return student.new_empty((L * B, T * B * W), dtype=torch.float32)


_gradient_operator = make_differentiable(
    define(
        "loss_backward(Tensor grad_loss, Tensor dz, Tensor student) -> Tensor",
        lambda grad_loss, dz, student: _scaled(grad_loss, dz, student.dtype),
        lambda grad_loss, dz, student: student.new_empty(student.shape),
    ),
    refuse_second_derivative,
)
_loss_operator = make_differentiable(
    define(
        f"loss(Tensor student, Tensor? teacher, {PACKED}, bool needs_grad) -> (Tensor loss, Tensor stats, Tensor dz)",
        _loss_impl,
        _loss_fake,
    ),
    _backward,
    _setup_context,
    setup_compiled=_setup_compiled,
)
_loss_directly = without_operator("bam_loss", _loss_of_step, _backward, _setup_context)
_targets_operator = define(
    f"targets(Tensor student, Tensor? teacher, {PACKED}) -> Tensor", _targets_impl, _targets_fake
)


class BAMLoss(nn.Module):
    """BAM loss as a module: `bam_loss` with its options given at construction.

        criterion = BAMLoss(views=2, epsilon=lambda step: max(0.02, 0.1 * 0.999**step))
        loss = criterion(student, teacher, step=step)

    epsilon: a float, or a schedule: a callable from the step to a float; `forward` then needs `step`.
    cuda_graph: replay whole steps, loss and gradient, as CUDA graphs: less time on the host for small problems. The
    first two calls with a problem (options, torch's flags, shapes, types, device, whether a gradient is wanted) run as
    usual, later ones replay. A graph needs kernels, not the reference, and one rank on a CUDA device, not ROCm.
    Elsewhere, for more than 8 problems, and for new problems after a capture that failed, calls run without one, and a
    warning says why once. In a capture of your own the step becomes a part of your graph; in functions that
    torch.compile has compiled, and in torch.func's transforms, there are no graphs, without a warning. Graphs keep
    their memory until the module is freed; copies have none.
    return_stats, options: as `bam_loss`. With backend="auto" and a CUDA context, GPU kernels that are not known yet are
    tried at construction, for minutes.
    Raises: ValueError or TypeError as `bam_loss`, for options already at construction.
    """

    def __init__(
        self,
        *,
        epsilon: float | Callable[[int], float] = 0.05,
        cuda_graph: bool = False,
        return_stats: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = options_of("BAMLoss", options if callable(epsilon) else options | {"epsilon": epsilon})
        self.epsilon = epsilon if callable(epsilon) else self.options.epsilon
        self.return_stats = python_number("BAMLoss", "return_stats", return_stats)
        check_bool("BAMLoss", "return_stats", self.return_stats)
        self.cuda_graph = python_number("BAMLoss", "cuda_graph", cuda_graph)
        check_bool("BAMLoss", "cuda_graph", self.cuda_graph)
        self._graphs: StepGraphs | None = None  # made when it is needed: a compiled function may construct this module
        if self.options.backend == "auto":
            decide_early()

    def forward(
        self, student: Tensor, teacher: Tensor | None = None, step: int | None = None
    ) -> Tensor | tuple[Tensor, BAMStats]:
        """Loss of student and teacher embeddings, as `bam_loss`; with return_stats, (loss, BAMStats)."""
        return _loss(student, teacher, self._options_at(step), self.return_stats, self._steps_as_graphs())

    def way(self, student: Tensor, teacher: Tensor | None = None, step: int | None = None) -> str:
        """What `forward` computes these embeddings with: "reference", or the backend and its engine, "cuda slab".

        With backend="auto" and several ranks on GPUs, every rank must call this, unless `forward` was called before.
        """
        call = checked_call("BAMLoss", student, teacher, self._options_at(step))
        ways = call.ways(student)
        if ways == "reference":
            return ways
        with call.step(ways).call(student, teacher, needs_grad=wants_gradient(student)) as (_, chosen):
            return f"{chosen.options.backend} {chosen.options.engine}"

    def _steps_as_graphs(self) -> StepGraphs | None:
        if not self.cuda_graph or torch.compiler.is_compiling():
            return None
        if self._graphs is None:
            self._graphs = StepGraphs()
        return self._graphs

    def _options_at(self, step: int | None) -> Options:
        """Options at a step. Raises: ValueError if epsilon is a schedule and there is no step."""
        epsilon = self.epsilon
        if callable(epsilon):
            if step is None:
                raise ValueError("BAMLoss: epsilon is a schedule, so forward needs step, got None")
            epsilon = epsilon(step)
        return self.options if epsilon is self.options.epsilon else replace(self.options, epsilon=epsilon)

    def extra_repr(self) -> str:
        shown = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        shown |= {"epsilon": self.epsilon, "cuda_graph": self.cuda_graph, "return_stats": self.return_stats}
        default = {f.name: f.default for f in fields(Options)} | {"cuda_graph": False, "return_stats": False}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value != default[name])
