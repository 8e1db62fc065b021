"""The flash engine: scores are never stored; every kernel computes the scores it needs from rows and keys.

Memory besides rows, keys and gradients is O(M + N). A row sum must be finished before column sums start, so an
iteration computes the scores twice. layout.py defines the dimension letters; z, y, k are unit rows, k centred as in
slab.py.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..agreement import agree_with_ranks
from ..backends import triton
from ..backends.interface import Potential
from ..precision import float32_products
from .call import Call
from .plan import FLASH_FEATURES
from .rows import Rows, checked_rows, rows_and_keys
from .slab import balance
from .sums import Evaluation, Sums

if TYPE_CHECKING:
    from ..backends.triton.flash_kernels import FlashKernels


class _RowSweeps:
    """Sweeps over the rows of the Sinkhorn problem: flash kernels take rows where row kernels take scores."""

    def __init__(self, rows: Tensor, flash: "FlashKernels") -> None:
        self.rows = rows
        self.step, self.columns = 1 / flash.unit**2, len(flash.keys)
        self.kept_type = None  # rows, not scores, are kept
        self.kernels: Any = flash  # has the row kernels that `balance` calls

    def sweep(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.rows

    def column_step(self, scale: float, row: Potential, shift: Tensor, sums: Tensor) -> None:
        self.kernels.column_lse(self.rows, scale * self.step, row, shift, sums, accumulate=False)


def _check(call: Call) -> None:
    name, layout, options = call.name, call.layout, call.options
    if options.top_k:
        raise ValueError(f'{name}: engine="flash" keeps all columns, got top_k={options.top_k}; use engine="slab"')
    if layout.D > FLASH_FEATURES:
        raise ValueError(
            f'{name}: engine="flash" takes up to {FLASH_FEATURES} features, got D={layout.D}; use engine="slab"'
        )
    if options.regather and layout.W > 1:
        raise ValueError(f'{name}: engine="flash" holds the keys, got regather=True; use engine="slab"')


def _embed(call: Call) -> "tuple[Rows, FlashKernels]":
    """Normalise the rows, gather the keys and make the flash kernels.

    Raises: ValueError on non-finite rows, on options that this engine does not support, and if ranks differ.
    """
    with agree_with_ranks(call.ranks, call.name, call.header, call.student.device):
        _check(call)
        read = checked_rows(call)
    x = rows_and_keys(call, read)
    flash = triton.flash()(
        x.keys.whole,
        x.keys.bias,
        call.layout,
        masked=call.options.mask_positives,
        unit=x.keys.unit,
        precision="ieee" if float32_products(call.student.device) == "highest" else "tf32",
        run=call.kernels.run,
    )
    return x, flash


def _targets(call: Call, x: Rows, flash: "FlashKernels") -> tuple[Potential, Potential, Tensor]:
    """Potentials of the L*B target rows and of the columns, and the column sums before the last column step."""
    rows, options, kept = x.target.read, call.options, call.layout.L * call.layout.B
    col, column_sums = balance(_RowSweeps(rows, flash), x.potential, options.epsilon, options.iterations, call.ranks)
    row = x.potential.rows(0, kept)
    flash.row_step(rows[:kept], flash.score_scale(options.epsilon), col, row)
    return row, col, column_sums


def evaluate(call: Call) -> Evaluation:
    """Compute the loss of this rank, its statistics and, if wanted, dz: the gradient of the sum of all ranks' losses.

    Cost, in products of all rows with all keys, for T = 2: 2 per iteration, 1 for the sums of the source, 1 + L in the
    match with dz, and without a teacher about 1 + L/V for dk.
    """
    x, flash = _embed(call)
    layout, options, kernels = call.layout, call.options, call.kernels
    row, col, column_sums = _targets(call, x, flash)
    z = x.z.read
    source = Potential(*row.mantissa.new_empty(2, layout.M))
    flash.row_step(z, flash.score_scale(options.temperature), None, source)
    scales = {"epsilon": options.epsilon, "temperature": options.temperature}
    matched, dz = flash.match(z, x.target.read, row, source, col, needs_grad=call.needs_grad, **scales)
    if dz is not None:
        if x.own_keys:
            n = layout.T * layout.B
            # The part common to all rows is added in float32: near collapse it is most of every row.
            centred = z if call.sixteen_bit else z - x.keys.centre
            dk, sums = flash.key_gradient(z, centred, row, source, col, **scales)
            blocks = dk.addr_(sums, x.keys.centre).split(n)
            dz[:n].add_(call.ranks.scatter(lambda rank: blocks[rank]))
        dz = kernels.project_(dz, x.z)
    total = Sums(kernels)
    total.add(matched)
    return total.evaluation(layout, options.mask_positives, column_sums, dz)


def targets(call: Call) -> Tensor:
    """Compute the targets P (L*B, N) float32, columns in public order."""
    x, flash = _embed(call)
    row, col, _ = _targets(call, x, flash)
    rows = x.target.read[: call.layout.L * call.layout.B]
    P = col.mantissa.new_empty(len(rows), call.layout.N)
    flash.targets(rows, flash.score_scale(call.options.epsilon), row, col, P)
    return call.layout.to_public(P)
