"""One call of an engine."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..layout import Layout
from ..options import Options
from ..ranks import Ranks


@dataclass(frozen=True)
class Call:
    """`bam_loss` or `bam_targets` (the name) of one rank, shapes checked. Letters are those of layout.py.

    kernels: RowKernels; SixteenBitKernels where sixteen_bit: products of fp16 rows, in the slab engine int16 scores and
    their gradient in fp16; else float32 products, as torch.get_float32_matmul_precision() says.
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
        """Whether the Sinkhorn problem's rows are the student's."""
        return self.teacher is None or self.options.target_rows == "student"

    @property
    def header(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        made = self.options.header(self.layout, self.student, self.teacher, self.kernels.backend, self.needs_grad)
        return made | {"16 bit": self.sixteen_bit}
