"""Normalised embedding rows and gathered keys, in the form that matrix products read.

layout.py defines the dimension letters; k' = k - centre. In float32, rows are unit rows z, and scores are z·k'. In
16 bit, rows are also centred before they are rounded, and z·k' = z'·k' + centre·k'. The first term is a product of
small numbers, whose rounding error falls with the square of the differences between rows. The second is a bias of the
key, computed before rounding. So no precision is lost near collapse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.extension import NotFinite
from ..backends.interface import BIAS_COLUMNS, HALF_UNIT, Potential, UnitRows, first_views
from ..layout import Layout
from ..options import check_finite
from ..ranges import range_for_each
from ..ranks import Ranks
from .call import Call

ALIGNED_COLUMNS = 16  # products and kernels read rows fastest if their stride is a multiple of this


def sent_columns(D: int, sixteen_bit: bool) -> int:
    """Columns of a key in a message; in 16 bit the last two hold the bias, after the features and zeros."""
    return -(-(D + BIAS_COLUMNS) // ALIGNED_COLUMNS) * ALIGNED_COLUMNS if sixteen_bit else D


class Keys:
    """Centred keys k - centre of all ranks, in gathered order: float32, or fp16 times `unit` with a `bias`.

    Any vector can be the centre, because it adds a constant to every row of scores. Float32 keys are sent without
    centring; each rank subtracts the mean of its own keys, which it knows before other keys arrive. This mean is within
    the sampling error of the mean of all keys. fp16 keys are rounded, so they are centred before, on a mean that all
    ranks share.
    regather: keys are not held but gathered again whenever they are read.
    room: for fp16 keys of several ranks, what `message_room` returned, with this rank's message in it.
    """

    def __init__(
        self, own: UnitRows, centre: Tensor, ranks: Ranks, regather: bool = False, room: Tensor | None = None
    ) -> None:
        self.centre, self.ranks = centre, ranks
        self.sixteen_bit = own.bias is not None
        self.unit = HALF_UNIT if self.sixteen_bit else 1.0
        n, D = own.read.shape
        self.bias: Tensor | None = None
        self._own, self._room, self._gathered = own.read, room, None
        self._complete = ranks.W == 1 and self.sixteen_bit
        self._own_is_centred = False
        if self._complete:
            self._gathered, self.bias = own.read, own.bias
        elif room is not None:
            self._own, self._gathered = own_part(room, ranks), room[:, :D]
        elif not regather or ranks.W == 1:
            self._gathered = own.read.new_empty(ranks.W * n, D)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first column, centred keys): one block per rank in order of arrival, or all keys once gathered."""
        if self._gathered is not None and self._complete:
            yield 0, self._gathered
            return
        for first, block in self._arriving():
            part = slice(first, first + len(block))
            if self._gathered is None:
                yield first, block - self.centre
            elif self.sixteen_bit or (self._own_is_centred and first == self._first_own):
                yield first, self._gathered[part]  # in 16 bit the block is a part of the room
            else:
                yield first, torch.sub(block, self.centre, out=self._gathered[part])
        if self._room is not None:
            self.bias = _bias_of(self._room).contiguous()
        self._complete = True

    def _arriving(self) -> Iterator[tuple[int, Tensor]]:
        return range_for_each("gather", iter(self.ranks.gather(self._own, self._as_sent, self._room)))

    def _as_sent(self, unit: Tensor) -> Tensor:
        """The message of a rank whose keys are these unit rows, for simulated ranks."""
        if not self.sixteen_bit:
            return unit.to(self._own.dtype)
        centre = self.centre.double()
        centred = unit.double() - centre
        sent = self._own.new_zeros(len(unit), self._own.shape[1])
        sent[:, : unit.shape[1]] = centred * HALF_UNIT
        _bias_of(sent).copy_(centred @ centre * HALF_UNIT**2)
        return sent

    def room_for_own(self) -> Tensor | None:
        """Where the caller writes this rank's centred float32 keys; None if they are not held."""
        if self._gathered is None:
            return None
        self._own_is_centred = True
        return own_part(self._gathered, self.ranks)

    @property
    def own(self) -> Tensor:
        """Centred keys of this rank (n, D)."""
        if self._gathered is None:
            return torch.sub(self._own, self.centre, out=torch.empty_like(self._own))
        return own_part(self.whole, self.ranks)

    def others(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first column, centred keys) of the other ranks, as `blocks`."""
        if self._gathered is None:
            arriving = self._arriving()
            next(arriving)  # this rank's own
            for first, block in arriving:
                yield first, block - self.centre
            return
        for part in (slice(0, self._first_own), slice(self._first_own + len(self._own), len(self._gathered))):
            if part.start < part.stop:
                yield part.start, self.whole[part]

    @property
    def _first_own(self) -> int:
        return self.ranks.rank * len(self._own)

    @property
    def whole(self) -> Tensor:
        """All keys (N, D); gathers them if they have not arrived. `bias` is complete afterwards."""
        assert self._gathered is not None
        if not self._complete:
            for _ in self.blocks():
                pass
        return self._gathered


def message_room(like: Tensor, layout: Layout) -> Tensor | None:
    """Room (N, sent_columns) for the fp16 keys of all ranks, on the device of `like`; None for one rank."""
    if layout.W == 1:
        return None
    return like.new_empty(layout.N, sent_columns(layout.D, True), dtype=torch.float16)


def own_part(rows: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of the rows of all ranks."""
    n = len(rows) // ranks.W
    return rows[ranks.rank * n : (ranks.rank + 1) * n]


def _bias_of(sent: Tensor) -> Tensor:
    return sent[:, -BIAS_COLUMNS:].view(torch.float32)[:, 0]


@dataclass
class Rows:
    """Rows of one evaluation.

    z           rows of the student
    target      rows of the Sinkhorn problem: the teacher's, or z
    potential   exp(<target_i, centre>/eps), the row potential that Sinkhorn iterations start from
    keys        keys of all ranks
    own_keys    the keys are rows of the student, so that they have a gradient
    """

    z: UnitRows
    target: UnitRows
    potential: Potential
    keys: Keys
    own_keys: bool


def checked_rows(call: Call) -> tuple[UnitRows, UnitRows | None] | None:
    """Check that rows are finite; returns float32 unit rows of student and teacher, or None in 16 bit.

    16-bit rows are made later, because they need the centre of all ranks.
    Raises: ValueError on non-finite rows.
    """
    if call.sixteen_bit:
        check_finite(call.name, "student", call.student)
        if call.teacher is not None:
            check_finite(call.name, "teacher", call.teacher)
        return None
    z = call.kernels.normalize(call.student)
    check_norms(call.name, "student", z.norm, call.kernels)
    if call.teacher is None:
        return z, None
    y = call.kernels.normalize(call.teacher)
    check_norms(call.name, "teacher", y.norm, call.kernels)
    return z, y


def check_norms(name: str, argument: str, norm: Tensor, kernels: Any) -> None:
    """Call `check_finite` on norms of rows, unless the kernels have a faster check and find nothing."""
    try:
        if hasattr(kernels, "require_finite"):
            kernels.require_finite(norm)
            return
    except NotFinite:  # check_finite says which row it is
        pass
    check_finite(name, argument, norm)


def rows_and_keys(call: Call, read: tuple[UnitRows, UnitRows | None] | None) -> Rows:
    """Make the rows and the keys of all ranks; `read` is the result of `checked_rows`."""
    layout, kernels, epsilon = call.layout, call.kernels, call.options.epsilon
    if read is not None:
        z, y = read[0], read[1] if read[1] is not None else read[0]
        own = y.views(layout.T, layout.B)
        keys = Keys(own, kernels.mean_row(own.read), call.ranks, call.options.regather)
        target = z if call.shared else y
        room_for_own = keys.room_for_own() if target is y else None
        potential = kernels.centre_potential(target.read, keys.centre, epsilon, room_for_own)
    else:
        first = first_views(call.student if call.teacher is None else call.teacher, layout.T, layout.B)
        centre = call.ranks.sum(kernels.mean_unit_row(first, layout.W))
        room = message_room(call.student, layout)
        message = own_part(room, call.ranks) if room is not None else None
        if call.teacher is None:
            z, potential = y, y_potential = kernels.half_rows(call.student, centre, epsilon, message)
        else:
            z, potential = kernels.half_rows(call.student, centre, epsilon)
            y, y_potential = kernels.half_rows(call.teacher, centre, epsilon, message)
        target, potential = (z, potential) if call.shared else (y, y_potential)
        keys = Keys(y.views(layout.T, layout.B), centre, call.ranks, call.options.regather, room)
    return Rows(z, target, potential, keys, own_keys=call.teacher is None)
