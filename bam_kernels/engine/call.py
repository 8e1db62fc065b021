"""Arguments of one call of an engine."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..layout import Layout
from ..options import Options
from ..ranks import Ranks


@dataclass(frozen=True)
class Call:
    """One call of `bam_loss` or `bam_targets` (its `name`) on this rank, with checked arguments.

    layout.py defines the dimension letters.

    kernels: RowKernels, or SixteenBitKernels with sixteen_bit.
    sixteen_bit: True: products of fp16 rows, and in the slab engine int16 scores and their gradient in fp16; False:
    float32 products, in the precision of torch.get_float32_matmul_precision().
    """

    name: str
    student: Tensor
    teacher: Tensor | None
    layout: Layout
    options: Options
    ranks: Ranks
    kernels: Any
    needs_grad: bool = False
    sixteen_bit: bool = False

    @property
    def shared(self) -> bool:
        """Whether the rows of the Sinkhorn problem are the student's."""
        return self.teacher is None or self.options.target_rows == "student"

    @property
    def header(self) -> dict[str, Any]:
        """Values that must be equal on all ranks."""
        made = self.options.header(self.layout, self.student, self.teacher, self.kernels.backend, self.needs_grad)
        return made | {"16 bit": self.sixteen_bit}
