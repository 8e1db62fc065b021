"""What the tests compute with: the published implementation's problems, embeddings, and the comparison.

Letters are those of bam_kernels/layout.py; tests/golden/README.md describes the files.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from row_problems import rows_of_any_norm
from torch import Tensor

from bam_kernels import bam_loss, reference
from bam_kernels.backends import cpu
from bam_kernels.checked_call import checked_call
from bam_kernels.options import Options

GOLDEN_FILES = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.npz"))
COSINES = (0.0, 0.9, 0.99, 0.999)  # mean cosine between images: training may start near collapse

# Relative errors of the gradient of 160 images, by the mean cosine: twice what the kernels have on the CPU, or more.
# Float32 loses by cancellation, and a GPU adds in another order; 2e-4 of float16's are the rounding of the result.
GRADIENT_ERRORS = {
    torch.float32: dict(zip(COSINES, (2e-6, 1e-5, 1e-4, 1e-3), strict=True)),
    torch.float16: dict(zip(COSINES, (1.2e-3, 1.2e-3, 1.4e-3, 1.4e-3), strict=True)),
}

needs_cpu_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
golden = pytest.mark.parametrize("golden", GOLDEN_FILES, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Tolerance:
    """Largest error of loss and gradient relative to their maximum, of the gradient besides, and of a target."""

    loss: float
    grad: float
    grad_floor: float
    target: float


FLOAT64 = Tolerance(loss=1e-10, grad=1e-9, grad_floor=0.0, target=1e-11)
FLOAT32 = Tolerance(loss=1e-5, grad=1e-4, grad_floor=1e-7, target=1e-4)


@dataclass(frozen=True)
class Problem:
    """One golden file as one process that holds the images of all ranks: image i of rank r is image r*B + i.

    student (V, W*B, D) and teacher (R, W*B, D) or None, float32; options of bam_loss; float64 truth: loss, the mean of
    the ranks'; grad (V, W*B, D), that of the loss, 1/W of what the ranks hold; target (L*W*B, N).
    """

    student: Tensor
    teacher: Tensor | None
    options: dict[str, Any]
    loss: Tensor
    grad: Tensor
    target: Tensor

    def check_loss(self, loss: Tensor, tolerance: Tolerance) -> None:
        assert_close(loss, self.loss, tolerance.loss * self.loss.abs().item())

    def check_grad(self, grad: Tensor, tolerance: Tolerance) -> None:
        assert_close(grad, self.grad, tolerance.grad * self.grad.abs().max().item() + tolerance.grad_floor)

    def check_target(self, target: Tensor, tolerance: Tolerance) -> None:
        assert_close(target, self.target, tolerance.target)


def load(path: Path) -> Problem:
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    config = {key: value.item() for key, value in data.items() if value.ndim == 0}
    W, B = config["world_size"], config["batch_size"]

    def merged(key: str) -> Tensor:
        """(W, views*B, n) of the ranks -> (views, W*B, n)."""
        of_ranks = torch.from_numpy(data[key])
        return of_ranks.unflatten(1, (-1, B)).transpose(0, 1).flatten(1, 2)

    return Problem(
        student=merged("z"),
        teacher=merged("z_teacher") if config["n_teacher_views"] else None,
        options={
            "target_views": config["n_large"],
            "key_views": config["n_key_views"],
            "temperature": config["temperature"],
            "epsilon": config["reg"],
            "iterations": config["n_iters"],
            "top_k": config["top_k"],
            "mask_positives": config["positive_masking"],
            "target_rows": config["target_rows"],
        },
        loss=torch.from_numpy(data["loss"]).mean(),
        grad=merged("grad") / W,
        target=merged("target").flatten(0, 1),
    )


def features(views: int, images: int, D: int, *, cosine: float = 0.0, seed: int = 0) -> Tensor:
    """(views, images, D) float32 rows of lengths around 3; two images have the given cosine in the mean.

    Half of what does not belong to all rows is the image's own, half the view's. The type is named: ranks that are
    threads call this while another rank may have set another default.
    """
    float32 = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, D, generator=generator, **float32), dim=-1)

    rest = math.sqrt((1 - cosine) / 2)
    x = math.sqrt(cosine) * unit(1, 1) + rest * unit(1, images) + rest * unit(views, images)
    return x * (2 + 2 * torch.rand(views, images, 1, generator=generator, **float32))


def loss_arguments(student: Tensor, teacher: Tensor | None, **options: Any) -> tuple:
    """Arguments of torch.ops.bam_kernels.loss after student (V, B, D) and teacher, for CPU kernels."""
    return checked_call("bam_loss", student, teacher, Options(**options)).packed("cpu")


def loss_and_grad(function, student: Tensor, teacher: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a fresh leaf with the student's values and strides."""
    leaf = student.detach().requires_grad_()
    loss = function(leaf, teacher, **options) if teacher is not None else function(leaf, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def check_against_float64(
    student: Tensor, teacher: Tensor | None, dtype: torch.dtype, cosine: float, **options: Any
) -> None:
    """`bam_loss` of the embeddings rounded to dtype, and its gradient, against the reference of the same in float64.

    The loss is scaled as a GradScaler does: near collapse the gradient is too small for float16.
    """
    x, y = student.to(dtype), teacher.to(dtype) if teacher is not None else None
    truth = loss_and_grad(reference.bam_loss, x.double(), y.double() if y is not None else None)
    scale = 2.0 ** (10 - math.frexp(truth[1].abs().max().item())[1])  # the largest is then below 2^10
    loss, grad = loss_and_grad(lambda *given, **named: scale * bam_loss(*given, **named), x, y, **options)
    loss_error = (loss.double() / scale / truth[0] - 1).abs().item()
    assert loss_error <= 1e-6, f"relative error of the loss {loss_error:.3g}"
    error = ((grad.double() / scale - truth[1]).norm() / truth[1].norm()).item()
    bound = GRADIENT_ERRORS[dtype][cosine]
    assert error <= bound, f"relative error of the gradient {error:.3g}, bound {bound:.3g}"


def check_rows_of_any_norm(
    dtype: torch.dtype, R: int, device: torch.device, errors: tuple[float, float], **options: Any
) -> None:
    """`bam_loss` of rows whose squares overflow or underflow, beside ordinary ones, against the reference in float64.

    That is given unit rows: the loss does not depend on the length of a row above the floor, and the gradient by that
    row falls with it. errors: of the loss, relatively, and of the gradient by unit rows, relative to its largest.
    """
    student = rows_of_any_norm(100).view(3, 4, 100).to(device, dtype)
    teacher = rows_of_any_norm(100).roll(5, 0).view(3, 4, 100)[:R].to(device, dtype) if R else None
    norm = norm_above_floor(student)
    y = teacher.double() / norm_above_floor(teacher) if R else None
    truth, truth_grad = loss_and_grad(reference.bam_loss, student.double() / norm, y)
    loss, grad = loss_and_grad(bam_loss, student, teacher, **options)
    assert_close(loss, truth, errors[0] * truth.item())
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = errors[1] * truth_grad.abs().max() + least * norm
    assert_close(grad.double() * norm, truth_grad, bound)


def norm_above_floor(x: Tensor) -> Tensor:
    """(..., 1) float64; 1 for rows that are shorter than the floor: they keep their length."""
    norm = x.double().norm(dim=-1, keepdim=True)
    return torch.where(norm < 1e-12, 1.0, norm)


def assert_close(actual: Tensor, expected: Tensor | float, bound: float | Tensor) -> None:
    """Every element within `bound`; NaN is not."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"largest error {error.max():.3g}, bound {torch.as_tensor(bound).max():.3g}"
