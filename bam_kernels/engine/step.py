"""One call of `bam_loss` or `bam_targets`, with checked arguments: how it is computed, and its recordings.

layout.py defines the dimension letters.
"""

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ranges, tuned
from ..backends import cpu, row_kernels
from ..backends.addresses import first_address
from ..backends.extension import NotFinite
from ..header import NonFinite
from ..layout import Layout
from ..options import Options
from ..precision import float32_products, is_sixteen_bit, may_round_products, product_precision
from ..ranks import ONE_RANK, ranks_named
from ..ways import WAYS, Way, split
from . import flash, slab
from .call import Call
from .cost import Problem, choose_way, fastest_rows, rates
from .noted import NotRecordable
from .recorded_ranks import RecordedRanks
from .recorder import Recorder
from .recording import NoRoom, Recording

MOST_RECORDED_SCORES = 1 << 25  # with more scores, a device needs longer than the host needs to prepare its work
MOST_RECORDINGS = 16  # recordings of one step; they differ in strides and flags

# The loss (), its statistics (6,) and dz, in the shape of the student or empty, all float32.
Result = tuple[Tensor, Tensor, Tensor]
FIRST = "first"  # in place of a recording: the step has run once
NEVER = "never"  # in place of a recording: the step cannot be recorded


@dataclass(eq=False)
class Step:
    """One kind of call: dimensions, options, and how it may be computed.

    name      public function, for messages
    options   checked, without the process group; backend and engine are unused
    ways      as `choose` returns them
    group     name of the ranks, as `ranks_of` returns it
    """

    name: str
    layout: Layout
    options: Options
    ways: str
    group: str

    def __post_init__(self) -> None:
        layout = self.layout
        self._may_record = max(layout.V, layout.R) * layout.B * layout.N <= MOST_RECORDED_SCORES
        self._backends = [WAYS[way].backend for way in split(self.ways)]
        self._recordings: dict[Hashable, Recording | str] = {}

    def loss(self, student: Tensor, teacher: Tensor | None, needs_grad: bool) -> Result:
        """Compute loss, statistics and dz. Calls like an earlier one repeat its operations, without the engine.

        The first call goes through the engine, the second is recorded. Recordings differ in all that operations depend
        on besides this step: types, strides, flags of torch.
        """
        key = self._key(student, teacher, needs_grad)
        state = self._recordings.get(key) if key is not None else NEVER
        try:
            if isinstance(state, Recording):
                result = self._repeated(state, student, teacher)
                if result is not None:
                    return result
            if state is None:
                self._set(key, FIRST)
            return self._computed(student, teacher, needs_grad, key if state is FIRST else None)
        except NonFinite:
            dz = student.new_full(student.shape if needs_grad else (0,), math.nan, dtype=torch.float32)
            loss = student.new_full((), math.nan, dtype=torch.float32)
            return loss, loss.expand(6).clone(), dz

    def _repeated(self, recording: Recording, student: Tensor, teacher: Tensor | None) -> Result | None:
        """Repeat a recording; None where the engine must compute instead, which no other rank notices."""
        precision = "exact" if self._splits_products(student) else self.options.precision
        with product_precision(student.device, precision):
            try:
                ranks = ranks_named(self.group) if self.layout.W > 1 else ONE_RANK
                loss, stats, dz = recording.run(*_given(student, teacher), ranks=ranks)
                return loss, stats, dz
            except (NotFinite, NoRoom):
                # The engine tells all ranks which row is not finite, and can work with less memory. A repeated step
                # has sent no messages yet.
                return None
            except torch.OutOfMemoryError:
                if self.layout.W > 1:  # messages may have been sent, which the engine would send again
                    raise
                return None

    def _computed(self, student: Tensor, teacher: Tensor | None, needs_grad: bool, record_as: Hashable) -> Result:
        """Compute with the engine; record_as: key of the recording to make, or None."""
        with self.call(student, teacher, needs_grad=needs_grad) as (engine, call):
            if record_as is None:
                return _result(engine, call)
            recorder = Recorder(_given(student, teacher))
            ranks = RecordedRanks(call.ranks, recorder) if call.layout.W > 1 else call.ranks
            with recorder:
                result = _result(engine, replace(call, kernels=call.kernels.recorded(recorder), ranks=ranks))
        try:
            self._set(record_as, recorder.finish(result))
        except NotRecordable:
            self._set(record_as, NEVER)
        return result

    def _set(self, key: Hashable, state: Recording | str) -> None:
        if key not in self._recordings and len(self._recordings) >= MOST_RECORDINGS:
            self._recordings.clear()
        self._recordings[key] = state

    def _key(self, student: Tensor, teacher: Tensor | None, needs_grad: bool) -> Hashable:
        """All that operations depend on besides the step; None if they must not be repeated from a recording."""
        if (
            not self._may_record
            or ranges.are_on()
            or tuned.uses_candidates()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.maybe_current_level() is not None
        ):
            return None
        device = student.device
        return (
            needs_grad,
            _geometry(student),
            _geometry(teacher) if teacher is not None else None,
            device,
            torch.get_num_threads() if student.is_cpu else 0,
            float32_products(device),
            tuned.tuning() if self._backends != ["cpu"] else None,
            *[row_kernels(backend) for backend in self._backends],
        )

    @contextmanager
    def call(self, student: Tensor, teacher: Tensor | None, *, needs_grad: bool) -> Iterator[tuple[Any, Call]]:
        """Choose the engine and make its call; in the block, product precision is set."""
        options, ways, ranks = self.options, split(self.ways), ranks_named(self.group)
        sixteen_bit = is_sixteen_bit(WAYS[ways[0]].backend, options, student.dtype, student.device)
        splits = self._splits_products(student)
        with product_precision(student.device, "exact" if splits else options.precision):
            way = self._fastest(ways, student, sixteen_bit, needs_grad=needs_grad)
            chosen = replace(options, backend=way.backend, engine=way.engine)
            kernels = cpu.kernels().with_split_products() if splits else row_kernels(way.backend)
            call = Call(self.name, student, teacher, self.layout, chosen, ranks, kernels, needs_grad, sixteen_bit)
            yield flash if way.engine == "flash" else slab, call

    def _splits_products(self, student: Tensor) -> bool:
        """Whether products are of two bf16 parts of each number. Small products are float32 then."""
        if self._backends != ["cpu"] or not may_round_products(self.options, student.dtype, student.device):
            return False
        return cpu.kernels().can_split_products

    def _fastest(self, ways: tuple[str, ...], student: Tensor, sixteen_bit: bool, *, needs_grad: bool) -> Way:
        """Choose one of the ways. Reads the product precision of the moment."""
        layout, options = self.layout, self.options
        if len(ways) == 1:
            return WAYS[ways[0]]
        if "flash" not in ways:
            return fastest_rows(ways)
        shared = not layout.R or options.target_rows == "student"
        scatters = needs_grad and not layout.R
        problem = Problem(layout, shared, options.iterations, needs_grad, scatters, sixteen_bit, options.regather)
        at = rates() if sixteen_bit else rates().float32(float32_products(student.device))
        return WAYS[choose_way(problem, ways, options.top_k, options.memory_budget, student.device, at)]


def _result(engine: Any, call: Call) -> Result:
    found = engine.evaluate(call)
    student = call.student
    dz = found.dz.view(student.shape) if found.dz is not None else student.new_empty(0, dtype=torch.float32)
    return found.loss.float(), found.stats.float(), dz


def _given(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, ...]:
    return (student,) if teacher is None else (student, teacher)


def _geometry(x: Tensor) -> tuple[Any, ...]:
    """What operations on x depend on besides its contents; compiled kernels depend on the alignment of its address."""
    return x.dtype, x.shape, x.stride(), first_address(x) % 16
