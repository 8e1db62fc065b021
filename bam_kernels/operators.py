"""Define operators of torch.library, and their derivatives, so that torch.compile and fake tensors can use kernels.

In eager mode an autograd.Function differentiates an operator, because torch.func's transforms understand it. Under
torch.compile the formula registered with the operator does. Both use one backward function.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("bam_kernels", "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator from its schema and return it.

    fake: gives outputs of the right shapes and dtypes, for tensors without memory. torch.func.vmap calls the operator
    once per element.
    """
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, implementation, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.bam_kernels, name)
    torch.library.register_fake(f"bam_kernels::{name}", fake, lib=library)
    torch.library.register_vmap(f"bam_kernels::{name}", _vmap_rule(operator), lib=library)
    return operator


def make_differentiable(
    operator: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    *,
    setup_compiled: Callable[..., None] | None = None,
    jvp: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return the operator as a function with derivatives.

    backward, setup_context, jvp: as of torch.autograd.Function; without `jvp`, forward mode is a NotImplementedError.
    setup_compiled: replaces setup_context under torch.compile; None: setup_context is used there too.
    """
    name = operator.__name__
    setup = setup_compiled or setup_context
    torch.library.register_autograd(f"bam_kernels::{name}", backward, setup_context=setup, lib=library)

    members = {
        "forward": staticmethod(lambda *args: operator(*args)),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp or _without_forward_mode(name)),
        "generate_vmap_rule": True,
    }
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(members))

    def eager(*args: Any) -> Any:
        return torch.compiler.disable(function.apply)(*args)

    # Equal to torch.compiler.disable, which would import the compiler here.
    eager._torchdynamo_disable = True  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function.apply(*args)
        # A compiled operator drops tangents and does not know torch.func's transforms.
        return eager(*args) if _inside_transform() else operator(*args)

    return call


def without_operator(
    name: str,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Callable[..., Any]:
    """Return a function with derivatives that calls no operator, which saves the host the time of torch.library.

    For tensors of which `are_plain` is true. name: for messages. implementation: its arguments may be of any type.
    backward, setup_context: as in `make_differentiable`.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_without_forward_mode(name)),
    }
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(members))
    # Without the work of Function.apply for torch.func's transforms, which plain tensors are not in.
    return super(torch.autograd.Function, function).apply


PLAIN = (Tensor, torch.nn.Parameter)
# Whether a tensor stands for others: in a transform of torch.func, and in a gradient with is_grads_batched=True.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether the memory of these tensors holds their values, and nothing but autograd watches operators on them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    for x in tensors:
        if x is not None and (
            type(x) not in PLAIN
            or x.layout is not torch.strided
            or x.is_nested
            or x.is_meta
            or x.is_neg()
            or _is_wrapped(x)
            or _is_batched(x)
        ):
            return False
    return True


def _inside_transform() -> bool:
    """Whether a forward-mode derivative or a transform of torch.func is active while the compiler traces."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def as_tensor(*numbers: Any) -> Tensor:
    """Pack numbers (floats or 0-d tensors) that a schedule may change into one float64 CPU tensor, for an operator.

    As a float argument, or in torch.tensor, each new value would make torch.compile compile again.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])


def _without_forward_mode(name: str) -> Callable[..., Any]:
    def jvp(*_: Any) -> Any:
        raise NotImplementedError(
            f'bam_kernels: {name} has no forward-mode derivative (jvp, jacfwd, hessian); backend="reference" has'
        )

    return jvp


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient by x may be asked for; under torch.func's transforms x.requires_grad may be False."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or torch._C._functorch.maybe_current_level() is not None


def anchor_gradient(x: Tensor) -> Tensor:
    """Return x; in a compiled function, a copy of x whose backward pass reads x.

    Without the copy the compiler would treat the gradient as a constant in second derivatives, silently; with it, a
    second derivative raises an error.
    """
    return _anchor(x) if torch.compiler.is_compiling() and wants_gradient(x) else x


def refuse_second_derivative(*_: Any) -> Any:
    """Backward function of a kernel's gradient: raises RuntimeError, because no kernel has second derivatives."""
    raise RuntimeError(
        "bam_kernels: the gradient of a kernel is not differentiable, and a derivative of it was asked for (a gradient "
        'penalty, a Hessian); backend="reference" is differentiable twice'
    )


def _vmap_rule(operator: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def element(i: int) -> Any:
            chosen = (
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(args, in_dims, strict=True)
            )
            return operator(*chosen)

        results = [element(i) for i in range(info.batch_size)]
        if results[0] is None:
            return None, None
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_anchor_backward = make_differentiable(
    define(
        "anchor_backward(Tensor grad, Tensor x) -> Tensor",
        lambda grad, x: grad.clone(memory_format=torch.contiguous_format),
        lambda grad, x: x.new_empty(x.shape),
    ),
    refuse_second_derivative,
)
_anchor = make_differentiable(
    define(
        "anchor(Tensor x) -> Tensor",
        lambda x: x.clone(memory_format=torch.contiguous_format),
        lambda x: x.new_empty(x.shape),
    ),
    lambda ctx, grad: _anchor_backward(grad, *ctx.saved_tensors),
    _save_input,
)
# factor * x, rounded to another type in one launch; without derivatives. vmap refuses `out`, but calls an operator.
rounded_product = define(
    "rounded_product(Tensor factor, Tensor x, ScalarType dtype) -> Tensor",
    lambda factor, x, dtype: torch.mul(factor, x, out=torch.empty_like(x, dtype=dtype)),
    lambda factor, x, dtype: torch.empty_like(x, dtype=dtype),
)
