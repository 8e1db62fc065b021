"""The flash engine: scores never reach memory; every kernel makes those it needs again from rows and keys.

Memory beside rows, keys and gradients is O(M + N). A row sum must be finished before columns can be added, so an
iteration multiplies twice. Letters are those of layout.py; z, y, k are unit rows, k centred as in slab.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..agreement import agreed
from ..backends import triton
from ..backends.interface import Potential, RowKernels
from ..layout import Layout
from ..options import Options, check_finite
from ..ranks import Ranks
from .scores import Keys
from .slab import Evaluated, _Sums, balance

if TYPE_CHECKING:
    from ..backends.triton.flash_kernels import FlashKernels

LARGEST_D = 512
HALF_UNIT = 64.0  # fp16 rows are unit rows times this: their small entries are normal numbers


@dataclass
class _Embedded:
    """Unit rows and what products read: the same rows, or fp16 ones times HALF_UNIT; centre of the keys; potential."""

    z: Tensor
    z_norm: Tensor
    z_read: Tensor
    y_read: Tensor  # rows of the Sinkhorn problem, which may be z_read
    centre: Tensor
    own_keys: bool
    row: Potential
    flash: "FlashKernels"


class _Rows:
    """The Sinkhorn problem's rows as one slab: the flash kernels take rows where others take scores."""

    def __init__(self, rows: Tensor, flash: "FlashKernels") -> None:
        self.rows = rows
        self.step, self.columns = 1 / flash.unit**2, len(flash.keys)
        self.kernels: Any = flash  # of the row kernels, those that `balance` calls

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.rows


def _check(name: str, layout: Layout, options: Options) -> None:
    if options.top_k:
        raise ValueError(f'{name}: engine="flash" keeps all columns, got top_k={options.top_k}; use engine="slab"')
    if layout.D > LARGEST_D:
        raise ValueError(
            f'{name}: engine="flash" takes up to {LARGEST_D} features, got D={layout.D}; use engine="slab"'
        )
    if options.regather and layout.W > 1:
        raise ValueError(f'{name}: engine="flash" holds the keys, got regather=True; use engine="slab"')


def _embed(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: RowKernels,
    *,
    needs_grad: bool,
    fixed: bool,
) -> _Embedded:
    """Raises: ValueError on non-finite rows, on what this engine cannot do, and where ranks differ."""
    y = None
    with agreed(ranks, name, options.header(layout, student, teacher, kernels.backend, needs_grad), student.device):
        _check(name, layout, options)
        z, z_norm = kernels.normalize(student.reshape(layout.M, layout.D))
        check_finite(name, "student", z_norm)
        if teacher is not None:
            y, y_norm = kernels.normalize(teacher.reshape(layout.R * layout.B, layout.D))
            check_finite(name, "teacher", y_norm)
    keys = Keys((z if y is None else y)[: layout.T * layout.B], ranks)
    target_rows = z if y is None or options.target_rows == "student" else y
    row = kernels.centre_potential(target_rows, keys.centre, options.epsilon)
    z_read = _read(z, fixed)
    flash = triton.flash()(
        _read(keys.whole, fixed),
        layout,
        masked=options.mask_positives,
        unit=HALF_UNIT if fixed else 1.0,
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )
    y_read = z_read if target_rows is z else _read(target_rows, fixed)
    return _Embedded(z, z_norm, z_read, y_read, keys.centre, y is None, row, flash)


def _read(x: Tensor, fixed: bool) -> Tensor:
    return (x * HALF_UNIT).half() if fixed else x


def _targets(x: _Embedded, options: Options, layout: Layout, ranks: Ranks) -> tuple[Potential, Potential, Tensor]:
    """Finished potentials of the L*B target rows and of the columns, and the column sums before the last step."""
    col, column_sums = balance(_Rows(x.y_read, x.flash), x.row, options.epsilon, options.iterations, ranks)
    kept = layout.L * layout.B
    row = x.row.rows(0, kept)
    x.flash.row_step(x.y_read[:kept], x.flash.score_scale(options.epsilon), col, row)
    return row, col, column_sums


def evaluate(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: RowKernels,
    *,
    needs_grad: bool,
    fixed: bool = False,
) -> Evaluated:
    """The loss of this rank, its statistics and, if wanted, dz: the gradient of the sum of all ranks' losses.

    fixed: products of fp16 rows; else of float32 ones, as torch.get_float32_matmul_precision() says.
    Cost in score products of all rows, T = 2: 2 per iteration, one for the source's sums, 1 + L in the match (dz
    included) and, without a teacher, about 1 + L/V for dk.
    """
    x = _embed(name, student, teacher, layout, options, ranks, kernels, needs_grad=needs_grad, fixed=fixed)
    row, col, column_sums = _targets(x, options, layout, ranks)
    source = Potential(*row.mantissa.new_empty(2, layout.M))
    x.flash.row_step(x.z_read, x.flash.score_scale(options.temperature), None, source)
    scales = {"epsilon": options.epsilon, "temperature": options.temperature}
    matched, dz = x.flash.match(x.z_read, x.y_read, row, source, col, needs_grad=needs_grad, **scales)
    if dz is not None:
        if x.own_keys:
            n = layout.T * layout.B
            # What rows have in common is added in float32: near collapse it is most of them.
            dk, sums = x.flash.key_gradient(x.z_read, _read(x.z - x.centre, fixed), row, source, col, **scales)
            blocks = dk.addr_(sums, x.centre).split(n)
            dz[:n] += ranks.scatter(lambda rank: blocks[rank])
        dz = kernels.project_(dz, x.z, x.z_norm)
    total = _Sums()
    total.add(matched)
    return total.evaluated(layout, options.mask_positives, column_sums, dz)


def targets(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: RowKernels,
    *,
    fixed: bool = False,
) -> Tensor:
    """P (L*B, N) float32, public column order."""
    x = _embed(name, student, teacher, layout, options, ranks, kernels, needs_grad=False, fixed=fixed)
    row, col, _ = _targets(x, options, layout, ranks)
    rows = x.y_read[: layout.L * layout.B]
    P = x.z.new_empty(len(rows), layout.N)
    x.flash.targets(rows, x.flash.score_scale(options.epsilon), row, col, P)
    return layout.to_public(P)
