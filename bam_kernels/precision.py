"""Precision of matrix products: the choice of 16-bit arithmetic, and torch's flags set for the length of a block."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .operators import define, make_differentiable

LEAST_EPSILON_OF_FIXED_SCORES = 0.003
# Below this epsilon, float64 column sums of all ranks may overflow or underflow: they span exp(+-1/epsilon).
LEAST_EPSILON_OF_ONE_SUM = 0.0029


class _Options(Protocol):
    @property
    def precision(self) -> str: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def regather(self) -> bool: ...


def may_round_products(options: _Options, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products may be less precise than float32.

    True for 16-bit input, and for float32 input if torch's flag allows products to be rounded. Follows from options and
    types alone, never from free memory. False for small epsilon, because the error of scores is multiplied by
    1/epsilon.
    """
    if options.precision == "exact" or options.epsilon < LEAST_EPSILON_OF_FIXED_SCORES:
        return False
    return dtype in (torch.float16, torch.bfloat16) or float32_products(device) != "highest"


def is_sixteen_bit(backend: str, options: _Options, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU backend uses fp16 rows, keys and score gradients, and int16 fixed-point scores.

    True where products may be rounded. On GPUs reading scores takes most of the time; CPU kernels gain nothing. False
    with `regather`, because the fixed-point step needs all keys at once.
    """
    return backend != "cpu" and not options.regather and may_round_products(options, dtype, device)


def float32_products(device: torch.device) -> str:
    """Torch's precision of float32 products: "highest", "high" or "medium", whichever of its two interfaces set it."""
    newer_setting = _BY_NEWER_SETTING.get(_fp32_precision(device.type), "")
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to read it after both interfaces were used
        return newer_setting or "highest"
    return setting if newer_setting != "highest" else newer_setting


def flags_of_products(device: torch.device) -> tuple[Any, ...]:
    """All flags of torch that decide about the products of a step."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    return float32_products(device), torch.is_autocast_enabled(device.type), matmul.allow_fp16_accumulation, *reduced


def _fp32_precision(device_type: str) -> str:
    return _get_fp32_precision(_LIBRARIES[device_type], "matmul") if device_type in _LIBRARIES else "none"


_BY_NEWER_SETTING = {"ieee": "highest", "tf32": "high", "bf16": "medium"}
_LIBRARIES = {"cuda": "cuda", "cpu": "mkldnn"}  # of products, by device type
# What attributes of torch.backends read and set, without a microsecond of Python each.
_get_fp32_precision = torch._C._get_fp32_precision_getter
_set_fp32_precision = torch._C._set_fp32_precision_setter
_accumulates_in_fp16 = torch._C._get_cublas_allow_fp16_accumulation
_UNCHANGED = nullcontext()


def product_precision(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Context that sets the precision of matrix products, outside autocast.

    precision "exact": float32 products whatever torch's global flags; "default": as the flags say. fp16 products add in
    float32. The flags are process-wide; leaving the block restores them, also after an exception.
    """
    is_set = not (
        torch.is_autocast_enabled(device.type)
        or _accumulates_in_fp16()
        or (precision == "exact" and float32_products(device) != "highest")
    )
    return _UNCHANGED if is_set else _set_precision(device, precision)


@contextmanager
def _set_precision(device: torch.device, precision: str) -> Iterator[None]:
    half_accumulation = torch.backends.cuda.matmul.allow_fp16_accumulation
    with torch.autocast(device.type, enabled=False), _exact_float32(device) if precision == "exact" else nullcontext():
        try:
            if half_accumulation:
                torch.backends.cuda.matmul.allow_fp16_accumulation = False
            yield
        finally:
            if half_accumulation:
                torch.backends.cuda.matmul.allow_fp16_accumulation = True


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Turn off rounding of float32 products, in both of torch's interfaces; restore both on leaving the block.

    Setting the older interface also changes the newer one, for all devices.
    """
    before = {name: _fp32_precision(name) for name in _LIBRARIES}
    try:
        flag = torch.get_float32_matmul_precision()
    except RuntimeError:
        flag = "highest"
    try:
        if flag != "highest":
            torch.set_float32_matmul_precision("highest")
        if _fp32_precision(device.type) not in ("ieee", "none"):
            _set_fp32_precision(_LIBRARIES[device.type], "matmul", "ieee")
        yield
    finally:
        if flag != "highest":
            torch.set_float32_matmul_precision(flag)
        for name, value in before.items():
            if _fp32_precision(name) != value:
                _set_fp32_precision(_LIBRARIES[name], "matmul", value)


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Product a b (m, n) in the precision of `product_precision`, which its derivatives use too."""
    return _differentiable_product(a, b, precision)


def _product_impl(a: Tensor, b: Tensor, precision: str) -> Tensor:
    with product_precision(a.device, precision):
        return a @ b


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    a, b, ctx.precision = inputs
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    da = product(grad, b.T, ctx.precision) if ctx.needs_input_grad[0] else None
    db = product(a.T, grad, ctx.precision) if ctx.needs_input_grad[1] else None
    return da, db, None


def _product_jvp(ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor | None:
    a, b = ctx.saved_tensors
    parts = [product(x, y, ctx.precision) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
    return sum(parts[1:], parts[0])


_differentiable_product = make_differentiable(
    define(
        "product(Tensor a, Tensor b, str precision) -> Tensor",
        _product_impl,
        lambda a, b, precision: a.new_empty(a.shape[0], b.shape[1]),
    ),
    _product_backward,
    _keep_factors,
    jvp=_product_jvp,
)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write a b, or out + a b with `add`, to out (m, n) float32; a (m, k) and b (k, n) both float32 or both fp16."""
    if a.dtype == torch.float32:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # torch has no CPU product of fp16 with a float32 result
        return multiply(a.float(), b.float(), out, add=add)
    if add:
        return out.add_(torch.mm(a, b, out_dtype=torch.float32))
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
