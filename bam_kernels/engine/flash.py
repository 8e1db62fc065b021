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
from ..backends.interface import Potential, UnitRows
from ..layout import Layout
from ..options import Options
from ..ranks import Ranks
from .plan import FLASH_FEATURES
from .scores import Keys
from .slab import balance, unit_rows
from .sums import Evaluated, Sums

if TYPE_CHECKING:
    from ..backends.triton.flash_kernels import FlashKernels


@dataclass
class _Embedded:
    """Unit rows, those of the Sinkhorn problem (which may be the student's), keys and the rows' first potential."""

    z: UnitRows
    target_rows: Tensor
    keys: Keys
    own_keys: bool
    row: Potential
    flash: "FlashKernels"


class _Rows:
    """The Sinkhorn problem's rows as one slab: the flash kernels take rows where others take scores."""

    def __init__(self, rows: Tensor, flash: "FlashKernels") -> None:
        self.rows = rows
        self.step, self.columns = 1 / flash.unit**2, len(flash.keys)
        self.kept_type = None  # they are no scores
        self.kernels: Any = flash  # of the row kernels, those that `balance` calls

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.rows

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        self.kernels.column_lse(self.rows, scale * self.step, row, shift, sums, accumulate=False)


def _check(name: str, layout: Layout, options: Options) -> None:
    if options.top_k:
        raise ValueError(f'{name}: engine="flash" keeps all columns, got top_k={options.top_k}; use engine="slab"')
    if layout.D > FLASH_FEATURES:
        raise ValueError(
            f'{name}: engine="flash" takes up to {FLASH_FEATURES} features, got D={layout.D}; use engine="slab"'
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
    kernels: Any,
    *,
    needs_grad: bool,
    sixteen_bit: bool,
) -> _Embedded:
    """Raises: ValueError on non-finite rows, on what this engine cannot do, and where ranks differ."""
    with agreed(ranks, name, options.header(layout, student, teacher, kernels.backend, needs_grad), student.device):
        _check(name, layout, options)
        z, y = unit_rows(name, student, teacher, kernels, sixteen_bit)
    keys = Keys.of((z if y is None else y).views(layout.T, layout.B), ranks, kernels, sixteen_bit=sixteen_bit)
    target_rows = z.read if y is None or options.target_rows == "student" else y.read
    row = kernels.centre_potential(target_rows, keys.centre, options.epsilon)
    flash = triton.flash()(
        keys.whole,
        layout,
        masked=options.mask_positives,
        unit=keys.unit,
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )
    return _Embedded(z, target_rows, keys, y is None, row, flash)


def _targets(x: _Embedded, options: Options, layout: Layout, ranks: Ranks) -> tuple[Potential, Potential, Tensor]:
    """Finished potentials of the L*B target rows and of the columns, and the column sums before the last step."""
    col, column_sums = balance(_Rows(x.target_rows, x.flash), x.row, options.epsilon, options.iterations, ranks)
    kept = layout.L * layout.B
    row = x.row.rows(0, kept)
    x.flash.row_step(x.target_rows[:kept], x.flash.score_scale(options.epsilon), col, row)
    return row, col, column_sums


def evaluate(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: Any,
    *,
    needs_grad: bool,
    sixteen_bit: bool = False,
) -> Evaluated:
    """The loss of this rank, its statistics and, if wanted, dz: the gradient of the sum of all ranks' losses.

    sixteen_bit: products of fp16 rows; else of float32 ones, as torch.get_float32_matmul_precision() says.
    Cost in score products of all rows, T = 2: 2 per iteration, one for the source's sums, 1 + L in the match (dz
    included) and, without a teacher, about 1 + L/V for dk.
    """
    x = _embed(name, student, teacher, layout, options, ranks, kernels, needs_grad=needs_grad, sixteen_bit=sixteen_bit)
    row, col, column_sums = _targets(x, options, layout, ranks)
    z = x.z.read
    source = Potential(*row.mantissa.new_empty(2, layout.M))
    x.flash.row_step(z, x.flash.score_scale(options.temperature), None, source)
    scales = {"epsilon": options.epsilon, "temperature": options.temperature}
    matched, dz = x.flash.match(z, x.target_rows, row, source, col, needs_grad=needs_grad, **scales)
    if dz is not None:
        if x.own_keys:
            n = layout.T * layout.B
            # What rows have in common is added in float32: near collapse it is most of them.
            centred = kernels.half_rows(student, x.keys.centre).read if sixteen_bit else z - x.keys.centre
            dk, sums = x.flash.key_gradient(z, centred, row, source, col, **scales)
            blocks = dk.addr_(sums, x.keys.centre).split(n)
            dz[:n] += ranks.scatter(lambda rank: blocks[rank])
        dz = kernels.project_(dz, x.z)
    total = Sums(kernels)
    total.add(matched)
    return total.evaluated(layout, options.mask_positives, column_sums, dz)


def targets(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    layout: Layout,
    options: Options,
    ranks: Ranks,
    kernels: Any,
    *,
    sixteen_bit: bool = False,
) -> Tensor:
    """P (L*B, N) float32, public column order."""
    x = _embed(name, student, teacher, layout, options, ranks, kernels, needs_grad=False, sixteen_bit=sixteen_bit)
    row, col, _ = _targets(x, options, layout, ranks)
    rows = x.target_rows[: layout.L * layout.B]
    P = col.mantissa.new_empty(len(rows), layout.N)
    x.flash.targets(rows, x.flash.score_scale(options.epsilon), row, col, P)
    return layout.to_public(P)
