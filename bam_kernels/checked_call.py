"""The checks of `bam_loss` and `bam_targets`, made once for calls whose arguments agree in all that they depend on.

layout.py defines the dimension letters.
"""

import json
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends import choose, is_final
from .constant import constant_in_graphs
from .engine.cost import flash_supports
from .engine.step import Step
from .layout import Layout
from .operators import are_plain, as_tensor
from .options import Options, check_positive
from .ranks import ranks_named, ranks_of

# Arguments of the operators after the tensors: [V, L, T, R, W, rank, iterations, top_k, memory_budget or 0], then
# [temperature, epsilon], then what else there is as `_text` writes it.
PACKED = "SymInt[] numbers, Tensor scales, str text"
MOST_CALLS = 256  # checked calls that are kept; a schedule of epsilon makes one at every step


@dataclass(eq=False)
class CheckedCall:
    """A call of a public function whose arguments have been checked.

    options   without the group: a process group ends its threads only when nobody holds it
    ranks     W, rank and name, as `ranks_of` returns them
    plain     as `are_plain` of the tensors
    """

    name: str
    options: Options
    layout: Layout
    ranks: tuple[int, int, str]
    plain: bool
    _ways: str | None = None
    _steps: dict[str, Step] = field(default_factory=dict)

    def ways(self, student: Tensor) -> str:
        """How to compute: "reference" or joined ways, as `choose` returns them."""
        if self._ways is not None:
            return self._ways
        options, device = self.options, student.device
        final = is_final(options.backend, device, self.ranks)  # first: another thread may decide while this one chooses
        ways = choose(self.name, options, device, student.dtype, options.engine, self.ranks)
        if ways == "flash" and options.engine == "auto":
            if not flash_supports(self.layout, options.top_k, options.regather):
                ways = choose(self.name, options, device, student.dtype, "slab", self.ranks)
        if final:
            self._ways = ways
        return ways

    def step(self, ways: str) -> Step:
        """What is computed in one of these ways; the same object for calls that are alike."""
        step = self._steps.get(ways)
        if step is None:
            step = self._steps[ways] = Step(self.name, self.layout, self.options, ways, self.ranks[2])
        return step

    def packed(self, ways: str) -> tuple[list[int], Tensor, str]:
        """The call as arguments of an operator, PACKED, from which `unpacked` makes the step."""
        layout, options = self.layout, self.options
        numbers = [layout.V, layout.L, layout.T, layout.R, layout.W, layout.rank]
        numbers += [options.iterations, options.top_k, options.memory_budget or 0]
        flags = (options.mask_positives, options.target_rows, options.precision, options.regather, options.non_finite)
        return numbers, as_tensor(options.temperature, options.epsilon), _text(ways, self.ranks[2], *flags)


_calls: OrderedDict[Hashable, CheckedCall] = OrderedDict()  # the latest that was used is at the end


def checked_call(name: str, student: Tensor, teacher: Tensor | None, options: Options) -> CheckedCall:
    """Check the arguments of a call, or find the result of earlier checks. Raises: ValueError, TypeError."""
    key = _key(name, student, teacher, options)
    if key is None:
        return _checked(name, student, teacher, options)
    call = _calls.get(key)  # stays where others find it: a thread that missed it would record its steps again
    if call is None:
        call = _calls.setdefault(key, _checked(name, student, teacher, options))
    try:
        _calls.move_to_end(key)
        if len(_calls) > MOST_CALLS:
            _calls.popitem(last=False)
    except KeyError:  # another thread has taken it out
        pass
    return call


def _checked(name: str, student: Tensor, teacher: Tensor | None, options: Options) -> CheckedCall:
    options = options.checked(name)
    layout = options.layout(name, student, teacher)
    ranks, plain = ranks_of(name, options.group), are_plain(student, teacher)
    return CheckedCall(name, replace(options, group=None), layout, ranks, plain)


def forget() -> None:
    """Forget all checks and recordings."""
    _calls.clear()
    _unpacked.cache_clear()


def _key(name: str, student: Tensor, teacher: Tensor | None, options: Options) -> Hashable:
    """All that the checks depend on; None if they must be made at every call."""
    if student is None or not are_plain(student, teacher):
        return None
    values = options.key
    if values is None:
        return None
    dtype, device, of_teacher = student.dtype, student.device, None
    if teacher is not None:
        may_mix = dtype is not teacher.dtype and torch.is_autocast_enabled(device.type)
        of_teacher = teacher.shape, teacher.dtype, teacher.device, may_mix
    return name, student.shape, dtype, device, of_teacher, ranks_of(name, options.group), values


@constant_in_graphs
def _text(ways: str, group: str, *flags: Any) -> str:
    return json.dumps([ways, group, *flags])


def unpacked(
    name: str, student: Tensor, numbers: list[int], scales: Tensor, text: str, *, same_world: bool = False
) -> Step:
    """The step that `CheckedCall.packed` describes. same_world: W and rank must be as they were then."""
    W, rank = numbers[4:6]
    group = json.loads(text)[1]
    ranks = ranks_named(group, W, rank) if same_world else ranks_named(group)
    B = student.numel() // (numbers[0] * student.shape[-1])
    now = [*numbers[:4], ranks.W, ranks.rank, *numbers[6:]]
    return _unpacked(name, B, student.shape[-1], tuple(now), tuple(scales.tolist()), text)


@lru_cache(MOST_CALLS)
def _unpacked(name: str, B: int, D: int, numbers: tuple[int, ...], scales: tuple[float, float], text: str) -> Step:
    V, L, T, R, W, rank, iterations, top_k, memory_budget = numbers
    ways, group, *flags = json.loads(text)
    for field_name, value in zip(("temperature", "epsilon"), scales, strict=True):
        check_positive(name, field_name, value)  # a compiled function does not check values of tensors
    mask_positives, target_rows, precision, regather, non_finite = flags
    options = Options(
        temperature=scales[0],
        epsilon=scales[1],
        iterations=iterations,
        top_k=top_k,
        mask_positives=mask_positives,
        target_rows=target_rows,
        precision=precision,
        memory_budget=memory_budget or None,
        regather=regather,
        non_finite=non_finite,
    )
    layout = Layout(B=B, V=V, L=L, T=T, D=D, R=R, W=W, rank=rank)
    options.check_keys(name, layout)  # again: W may have changed since a function was compiled
    return Step(name, layout, options, ways, group)
