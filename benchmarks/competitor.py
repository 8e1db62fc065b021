"""What one competitor of a benchmark is, the choice of competitors, and the input buffers they read in rotation."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from problem import Problem, Truth, Work
from torch import Tensor

from bam_kernels.backends import cpu, cuda, triton
from bam_kernels.backends.interface import RowKernels

RowName = Literal[
    "cpu",
    "cpu-int16",
    "cpu-split",
    "triton",
    "triton-int16",
    "triton-flash",
    "triton-flash-int16",
    "cuda",
    "cuda-int16",
    "triton-int16-graph",
    "triton-flash-int16-graph",
    "cuda-int16-graph",
    "cuda-int16-again",
    "triton-graph",
    "cuda-graph",
    "eager",
    "compile",
    "compile-graph",
    "compile-autocast",
    "compile-autocast-graph",
    "gemms",
    "gemms-half",
    "authors",
    "authors-autocast",
    "flash-sinkhorn",
    "flash-sinkhorn-tf32",
    "flash-sinkhorn-graph",
    "flash-sinkhorn-tf32-graph",
]
GIVEN_SCORES: tuple[RowName, ...] = ("cpu", "cpu-int16", "triton", "triton-int16", "cuda", "cuda-int16")
WHOLE: tuple[RowName, ...] = (
    "cpu",
    "cpu-split",
    "triton",
    "triton-int16",
    "triton-flash",
    "triton-flash-int16",
    "cuda",
    "cuda-int16",
)
# Rows replayed as CUDA graphs: their times leave out the launch of each kernel, which dominates small problems.
GRAPHS: tuple[RowName, ...] = ("triton-int16-graph", "triton-flash-int16-graph", "cuda-int16-graph")
SINKHORN_GRAPHS: tuple[RowName, ...] = ("triton-graph", "cuda-graph")
# The whole loss in 16 bit with so small a memory budget that scores are made again instead of kept.
SCORES_AGAIN: tuple[RowName, ...] = ("cuda-int16-again",)
OURS: tuple[RowName, ...] = tuple(dict.fromkeys(GIVEN_SCORES + WHOLE + GRAPHS + SINKHORN_GRAPHS + SCORES_AGAIN))
Isa = Literal["auto", "avx512", "avx2", "plain"]


@dataclass
class Competitor:
    """One implementation on one problem: run(*fresh()) is timed, fresh() is not.

    outputs() returns what is compared with the truth; None: there is nothing to compare. `kind` is the name in options
    and ratios, `name` the printed one. held_bytes counts preallocated outputs of `run`, which its peak must include.
    precision is one of:
    - float32: everything;
    - split: products of two bf16 parts of each number, the rest float32;
    - tf32: TF32 products, the rest float32;
    - int16: int16 fixed-point scores, the rest fp16;
    - fp16: as int16, and the embeddings and the returned gradient are fp16;
    - autocast: what torch.autocast makes of it.
    """

    kind: RowName
    name: str
    fresh: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    outputs: Callable[[], Truth] | None
    work: Work
    precision: str = "float32"
    held_bytes: int = 0
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.kind in OURS


@dataclass(frozen=True)
class Choice:
    """The competitors to make, as the command line names them."""

    rows: tuple[RowName, ...]
    isa: tuple[Isa, ...]
    authors: Path | None
    cold_bytes: int  # least bytes written between two uses of a buffer: more than a GPU's L2 cache holds

    def ours(self, problem: Problem, all_rows: tuple[RowName, ...]) -> list[tuple[RowName, RowKernels]]:
        """The rows among `all_rows` that are chosen and can run on the problem's device, with their kernels.

        A CPU row appears once per instruction set. A row named int16 has int16 scores; in the whole loss its rows,
        keys and gradient are fp16. The row named split has products on tile units, where the processor has them.
        """
        device = problem.student.device
        chosen = [row for row in all_rows if row in self.rows]
        found: list[tuple[RowName, RowKernels]] = []
        if device.type == "cpu" and cpu.unavailable() is None:
            found += [(row, kernels) for isa in self.isa for row in chosen if (kernels := _on_cpu(row, isa))]
        on_gpus: dict[str, Any] = {"triton": triton, "cuda": cuda}
        for name, backend in on_gpus.items():
            rows = [row for row in chosen if row.startswith(name)]
            reason = backend.unavailable(device)
            if reason is None:
                found += [(row, backend.kernels()) for row in rows]
            elif rows and device.type == "cuda":
                print(f"left out: {', '.join(rows)}: {reason}")
        return found


def _on_cpu(row: RowName, isa: Isa) -> cpu.CpuKernels | None:
    """The CPU kernels of a row; None for rows of GPUs, and for split products where there are no tile units."""
    if not row.startswith("cpu"):
        return None
    kernels = cpu.kernels(isa)
    if row != "cpu-split":
        return kernels
    return kernels.with_split_products() if kernels.can_split_products else None


class Rotation:
    """Copies of tensors in buffers used in rotation, so that a GPU run finds none of its input in the L2 cache."""

    def __init__(self, given: tuple[Tensor | None, ...], cold_bytes: int, requires_grad: bool = False) -> None:
        self.given = given
        self.requires_grad = requires_grad
        size = sum(x.nbytes for x in given if x is not None)
        self.buffers = deque(self._copy() for _ in range(1 + math.ceil(cold_bytes / size)))

    def _copy(self) -> tuple[Tensor | None, ...]:
        return tuple(x.clone() if x is not None else None for x in self.given)

    def __call__(self) -> tuple[Tensor | None, ...]:
        for buffer, x in zip(self.buffers[0], self.given, strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        self.buffers.rotate(-1)
        first, *rest = self.buffers[0]
        return (first.detach().requires_grad_(), *rest) if self.requires_grad and first is not None else (first, *rest)
