"""Options of the public functions, and all checks of options and arguments. layout.py defines the dimension letters."""

import sys
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .header import SCHEDULED, NonFinite
from .layout import Layout
from .precision import LEAST_EPSILON_OF_ONE_SUM
from .ranks import ranks_of
from .saved_group import picklable_group

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENGINES = ("auto", "slab", "flash")
PRECISIONS = ("default", "exact", "fp8")
MASKS = ("none", "self", "block")
OUTPUTS = ("plan", "potentials")
LARGEST_SCALE = sys.float_info.max
LEAST_SCALE = 1e-6  # float32 holds the exponents of exp(1/eps) as exact integers down to 2e-7


@dataclass(frozen=True)
class Options:
    """Options shared by `bam_loss`, `bam_targets` and `BAMLoss`; the docstring of `bam_loss` explains each."""

    views: int | None = None
    target_views: int | None = None
    key_views: int | None = None
    temperature: float = 0.1
    epsilon: float = 0.05
    iterations: int = 3
    top_k: int = 0
    mask_positives: bool = True
    target_rows: str = "teacher"
    group: Any = None
    backend: str = "auto"
    engine: str = "auto"
    precision: str = "default"
    memory_budget: int | None = None
    regather: bool = False
    non_finite: str = "error"

    def __deepcopy__(self, memo: Any) -> "Options":
        return self  # immutable, and a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAMES} | {"group": picklable_group(self.group)}

    @cached_property
    def key(self) -> tuple[Any, Any] | None:
        """All options but the group, with types: 1, 1.0 and True are equal. None if a value may change, as an array."""
        values = _values(self.__dict__)
        types = tuple(map(type, values))
        return (values, types) if {int, float, bool, str, type(None)}.issuperset(types) else None

    def checked(self, name: str) -> "Options":
        """Check all options; return a copy with Python numbers for numpy scalars and 0-d tensors.

        name: the public function, for messages. Raises: ValueError, TypeError.
        """
        options = _with_python_numbers(self, name)
        options._check(name)
        return options

    def _check(self, name: str) -> None:
        for field in ("views", "target_views", "key_views", "memory_budget"):
            if getattr(self, field) is not None:
                _check_int(name, field, getattr(self, field), 1)
        _check_int(name, "iterations", self.iterations, 1)
        _check_int(name, "top_k", self.top_k, 0)
        check_positive(name, "temperature", self.temperature)
        check_positive(name, "epsilon", self.epsilon)
        check_bool(name, "mask_positives", self.mask_positives)
        check_bool(name, "regather", self.regather)
        _check_choice(name, "target_rows", self.target_rows, ("teacher", "student"))
        _check_choice(name, "engine", self.engine, ENGINES)
        _check_choice(name, "non_finite", self.non_finite, ("error", "nan"))
        check_execution(name, self.backend, self.precision)
        if self.engine == "flash" and self.backend not in ("auto", "triton"):
            raise ValueError(f'{name}: engine="flash" exists for backend="triton" only, got backend="{self.backend}"')

    def layout(self, name: str, student: Tensor, teacher: Tensor | None) -> Layout:
        """Check student and teacher against the options; return the dimensions. Raises: ValueError, TypeError."""
        check_tensor(name, "student", student, (2, 3))
        V, B = self._student_shape(name, student)
        D = student.shape[-1]
        R = 0
        if teacher is not None:
            check_tensor(name, "teacher", teacher, (2, 3))
            check_same(name, "student", student, "teacher", teacher)
            R = _teacher_views(name, teacher, B)
        L, T = self.view_counts(name, V, R)
        W, rank, _ = ranks_of(name, self.group)
        layout = Layout(B=B, V=V, L=L, T=T, D=D, R=R, W=W, rank=rank)
        self.check_keys(name, layout)
        return layout

    def check_keys(self, name: str, layout: Layout) -> None:
        """Check that each row has a key that is not masked. Raises: ValueError."""
        if self.mask_positives and layout.N <= layout.T:
            raise ValueError(
                f"{name}: nothing left to attend to: N={layout.N} keys, all of them views of the one image; "
                "give at least 2 images over all ranks, or mask_positives=False"
            )

    def header(
        self, layout: Layout, student: Tensor, teacher: Tensor | None, backend: str, needs_grad: bool
    ) -> dict[str, Any]:
        """Values that must be equal on all ranks: number, order and size of messages follow from them."""
        return {
            "backend": backend,
            **{letter: getattr(layout, letter) for letter in "BVRLTD"},
            "student's type": str(student.dtype),
            "teacher's type": str(teacher.dtype) if teacher is not None else None,
            "temperature": self.temperature,
            "epsilon": self.epsilon,
            "one sum": _one_sum(self.epsilon),
            "iterations": self.iterations,
            "top_k": self.top_k,
            "mask_positives": self.mask_positives,
            "target_rows": self.target_rows if teacher is not None else None,
            "precision": self.precision,
            "regather": self.regather,
            "non_finite": self.non_finite,
            "engine": self.engine,
            "needs_grad": needs_grad,
        }

    def _student_shape(self, name: str, student: Tensor) -> tuple[int, int]:
        if student.dim() == 3:
            V, B = student.shape[0], student.shape[1]
            if self.views not in (None, V):
                raise ValueError(f"{name}: student has {V} views in dimension 0, but views={self.views}")
        elif self.views is None:
            raise ValueError(f"{name}: views is needed for a 2-D student, got shape {tuple(student.shape)}")
        else:
            V = self.views
            if student.shape[0] % V:
                raise ValueError(f"{name}: student has {student.shape[0]} rows, not a multiple of views={V}")
            B = student.shape[0] // V
        if V == 0 or B == 0 or student.shape[-1] == 0:
            raise ValueError(f"{name}: student is empty, got shape {tuple(student.shape)}")
        return V, B

    def view_counts(self, name: str, V: int, R: int) -> tuple[int, int]:
        L = self.target_views
        if L is None:
            L = min(V, R, 2) if R else min(V, 2)
        T = L if self.key_views is None else self.key_views
        if L > V:
            raise ValueError(f"{name}: target_views={L} must be at most views={V}")
        if R and self.target_rows == "teacher" and L > R:
            raise ValueError(f"{name}: target_views={L} must be at most the teacher's {R} views")
        if R and T > R:
            raise ValueError(f"{name}: key_views={T} must be at most the teacher's {R} views")
        if not R and T > V:
            raise ValueError(f"{name}: key_views={T} must be at most views={V}")
        return L, T


NAMES = tuple(field.name for field in fields(Options))
_values = itemgetter(*(name for name in NAMES if name != "group"))


def options_of(name: str, keywords: dict[str, Any]) -> Options:
    """Make checked Options from keywords. Raises: TypeError naming an unknown keyword, and as `checked`."""
    for keyword in keywords:
        if keyword not in NAMES:
            raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}")
    return Options(**keywords).checked(name)


@dataclass(frozen=True)
class AttentionOptions:
    """Options of `sinkhorn_attention`; its docstring explains each. `layout` checks them."""

    epsilon: float
    iterations: int
    mask: str
    views: int
    key_views: int | None
    normalize: bool
    output: str
    differentiable: bool
    group: Any
    backend: str
    precision: str

    def with_python_numbers(self, name: str) -> "AttentionOptions":
        """Return a copy with Python numbers for numpy scalars and 0-d tensors.

        Raises: ValueError for a tensor with a gradient or a tangent.
        """
        return _with_python_numbers(self, name)

    def layout(self, name: str, q: Tensor, k: Tensor | None) -> Layout:
        """Check options, q and k, and return the dimensions; without mask "block", B = n and V = T = 1.

        Raises: ValueError, TypeError; NotImplementedError for differentiable=True on several ranks.
        """
        check_positive(name, "epsilon", self.epsilon)
        _check_int(name, "iterations", self.iterations, 1)
        _check_int(name, "views", self.views, 1)
        if self.key_views is not None:
            _check_int(name, "key_views", self.key_views, 1)
        _check_choice(name, "mask", self.mask, MASKS)
        _check_choice(name, "output", self.output, OUTPUTS)
        check_bool(name, "normalize", self.normalize)
        check_bool(name, "differentiable", self.differentiable)
        check_execution(name, self.backend, self.precision)
        check_tensor(name, "q", q, (2,))
        if k is not None:
            check_tensor(name, "k", k, (2,))
            check_same(name, "q", q, "k", k)
        if 0 in q.shape or (k is not None and 0 in k.shape):
            shapes = f"q {tuple(q.shape)}" + (f", k {tuple(k.shape)}" if k is not None else "")
            raise ValueError(f"{name}: q and k must not be empty, got {shapes}")
        W, rank, _ = ranks_of(name, self.group)
        if W > 1 and self.differentiable:
            raise NotImplementedError(f"{name}: differentiable=True is for one rank, the process group has {W}")
        if self.mask == "block":
            return self._block_layout(name, q, k, W, rank)
        if self.views != 1 or self.key_views is not None:
            raise ValueError(f'{name}: views and key_views belong to mask="block", got mask="{self.mask}"')
        if self.mask == "self" and k is not None:
            raise ValueError(f'{name}: mask="self" is for k=None, where row i and key i are the same')
        n = q.shape[0] if k is None else k.shape[0]
        layout = Layout(B=n, V=1, L=1, T=1, D=q.shape[1], W=W, rank=rank)
        if self.mask == "self" and layout.N < 2:
            raise ValueError(f'{name}: nothing left to attend to: mask="self" with {layout.N} key')
        return layout

    def header(self, layout: Layout, q: Tensor, k: Tensor | None, backend: str) -> dict[str, Any]:
        """Values that must be equal on all ranks. Without a mask, ranks may have different numbers of rows."""
        return {
            "backend": backend,
            **{letter: getattr(layout, letter) for letter in "BVTD"},
            "q's type": str(q.dtype),
            "k's type": str(k.dtype) if k is not None else None,
            **{field: getattr(self, field) for field in ("epsilon", "iterations", "mask", "normalize", "precision")},
            "one sum": _one_sum(self.epsilon),
        }

    def _block_layout(self, name: str, q: Tensor, k: Tensor | None, W: int, rank: int) -> Layout:
        V, T = self.views, self.views if self.key_views is None else self.key_views
        if q.shape[0] % V:
            raise ValueError(f"{name}: q has {q.shape[0]} rows, not a multiple of views={V}")
        B = q.shape[0] // V
        if k is None and T > V:
            raise ValueError(f"{name}: key_views={T} must be at most views={V} where k is None")
        if k is not None and k.shape[0] != T * B:
            raise ValueError(f"{name}: k has {k.shape[0]} rows, must have key_views * B = {T} * {B}")
        layout = Layout(B=B, V=V, L=V, T=T, D=q.shape[1], W=W, rank=rank)
        if layout.N <= T:
            raise ValueError(f"{name}: nothing left to attend to: N={layout.N} keys, all of them views of one image")
        return layout


def _one_sum(epsilon: float) -> bool | None:
    """Whether one float64 all-reduce adds up column sums; None if epsilon is a tensor of a compiled function."""
    return None if isinstance(epsilon, Tensor) else epsilon >= LEAST_EPSILON_OF_ONE_SUM


def _teacher_views(name: str, teacher: Tensor, B: int) -> int:
    if teacher.dim() == 3:
        if teacher.shape[1] != B:
            raise ValueError(f"{name}: teacher has {teacher.shape[1]} images in dimension 1, student has {B}")
        R = teacher.shape[0]
    else:
        if teacher.shape[0] % B:
            raise ValueError(f"{name}: teacher has {teacher.shape[0]} rows, not a multiple of the student's {B} images")
        R = teacher.shape[0] // B
    if R == 0:
        raise ValueError(f"{name}: teacher is empty, got shape {tuple(teacher.shape)}")
    return R


def check_execution(name: str, backend: str, precision: str) -> None:
    """Check `backend` and `precision`. Raises: ValueError."""
    _check_choice(name, "backend", backend, BACKENDS)
    _check_choice(name, "precision", precision, PRECISIONS)


def check_tensor(name: str, argument: str, x: Tensor, dims: tuple[int, ...]) -> None:
    """Check that x is a dense floating-point tensor with one of `dims` dimensions. Raises: TypeError, ValueError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "to_local"):
        raise TypeError(
            f"{name}: {argument} is a {type(x).__name__} of shape {tuple(x.shape)} spread over ranks; give this rank's "
            f"rows, {argument}.to_local(): the other ranks' keys are gathered here"
        )
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: {argument} must be a dense tensor, got {x.layout}")
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name}: {argument} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() not in dims:
        wanted = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{name}: {argument} must be {wanted}, got shape {tuple(x.shape)}")


def check_same(name: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Check that two tensors can be multiplied: equal features, device and (outside autocast) dtype."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name}: {first} has {a.shape[-1]} features, {second} has {b.shape[-1]}")
    if a.device != b.device:
        raise ValueError(f"{name}: {first} is on {a.device}, {second} on {b.device}")
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        raise TypeError(f"{name}: {first} is {a.dtype}, {second} is {b.dtype}; they may differ under autocast only")


def check_finite(name: str, argument: str, x: Tensor) -> None:
    """Raise NonFinite if a row of x (..., D), or a norm of x (m,), is not finite.

    Checks CPU tensors only: on other devices the check would wait for the device.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    finite = torch.isfinite(x)
    bad = (~(finite if x.dim() == 1 else finite.flatten(0, -2).all(1))).nonzero()
    if len(bad):
        raise NonFinite(
            f"{name}: {argument} has {len(bad)} row(s) with non-finite values, the first is row {int(bad[0])}"
        )


NUMBERS = (
    "views",
    "target_views",
    "key_views",
    "temperature",
    "epsilon",
    "iterations",
    "top_k",
    "mask_positives",
    "memory_budget",
    "regather",
    "normalize",
    "differentiable",
)
AnyOptions = TypeVar("AnyOptions", Options, AttentionOptions)


def _with_python_numbers(options: AnyOptions, name: str) -> AnyOptions:
    changed = {}
    for field in NUMBERS:
        value = getattr(options, field, None)
        if type(value) not in (int, float, bool, type(None)):
            changed[field] = python_number(name, field, value)
    return replace(options, **changed) if changed else options


def python_number(name: str, field: str, value: Any) -> Any:
    """Convert a numpy scalar, a 0-d array or a 0-d tensor to a Python number; return anything else unchanged.

    In a compiled function temperature and epsilon stay tensors, so that their values are not constants of the graph.
    Raises: ValueError for a tensor with a gradient or a tangent.
    """
    if getattr(value, "shape", None) != ():
        return value
    if isinstance(value, Tensor) and (value.requires_grad or unpack_dual(value).tangent is not None):
        raise ValueError(f"{name}: {field} is an option, without derivatives; got a tensor that has one: detach it")
    if torch.compiler.is_compiling() and field in SCHEDULED:
        return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    number = value.item()
    return float(number) if isinstance(number, np.floating) else number


def check_bool(name: str, field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {field} must be True or False, got {value!r}")


def _check_int(name: str, field: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {field} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: {field} must be at least {least}, got {value}")


def check_positive(name: str, field: str, value: Any) -> None:
    if torch.compiler.is_compiling() and isinstance(value, Tensor):  # checked when the compiled function runs
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: {field} must be a number, got {value!r}")
    if not LEAST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(f"{name}: {field} must be positive and finite (at least {LEAST_SCALE}), got {value}")


def _check_choice(name: str, field: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {field} must be one of {', '.join(choices)}, got {value!r}")
