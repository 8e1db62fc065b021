"""The loss and its statistics in Triton against float64, and which kernels a step launches."""

from functools import partial

import pytest
import torch
from problems import features
from recorded_operators import RecordedOperators, launches_nothing
from row_problems import assert_close
from stats_checks import SPOILT, check_loss_and_stats, check_sums_in_float64
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels.backends import triton as backend
from bam_kernels.backends.interface import Potential
from bam_kernels.backends.triton.launch import launch
from bam_kernels.backends.triton.row_kernels import TritonKernels
from bam_kernels.engine import flash, slab
from bam_kernels.engine.call import Call
from bam_kernels.layout import Layout
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK

kernels = backend.kernels()


# One of everything; more than a block of 4096.
@pytest.mark.parametrize("count", [1, 1500])
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_stats(count, spoilt, dtype):
    check_loss_and_stats(kernels, DEVICE, count, spoilt, dtype)


def test_sums_are_float64():
    check_sums_in_float64(kernels, DEVICE)


# One view, which is its own target; several, of which the last gives no target. More rows than a program has.
@pytest.mark.parametrize(("V", "L"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_sums_of_a_flash_match(V, L, chunks):
    B, tau, unit = 213 * 3 // V, 0.1, 8.0
    layout = Layout(B=B, V=V, L=L, T=1, D=1)
    sums = torch.rand(chunks, 3, layout.M)
    source = Potential(torch.randint(-20, 20, (layout.M,)).float(), 1 + torch.rand(layout.M))
    engine = backend.flash()(torch.zeros(layout.N, 1, device=DEVICE), None, layout, masked=False, unit=unit)
    on_device = Potential(source.exponent.to(DEVICE), source.mantissa.to(DEVICE))
    found = engine._match_sums(sums.to(DEVICE), on_device, tau)

    matched, attended, informed = sums.double().sum(0) / (tau * unit**2)
    lse = -source.natural_log()
    targets = torch.tensor([L - (v < L and V > 1) for v in range(V)]).repeat_interleave(B)
    weight = targets / (L * max(V - 1, 1))
    size = lse.abs().sum().item()
    assert found.images.shape == (3, -(-layout.M // 512))
    assert_close(found.loss.cpu(), (weight * lse - matched).sum(), 0, 1e-7 * size)
    assert_close(found.source_entropy.cpu(), (lse - attended).sum(), 0, 1e-7 * size)
    assert_close(found.target_entropy.cpu(), -informed.sum() * (tau * unit**2) * torch.tensor(2.0).double().log(), 1e-7)


EMBEDDING = ["unit_rows", "mean_row", "unit_rows"]
FIRST_STEP = ["column_lse", "merge_lse", "reciprocal_potential"]
FIRST_FLASH_STEP = ["flash_lse", "merge_lse", "reciprocal_potential"]
ROW_STEP = ["flash_lse", "merge_lse"]
FLASH_PASS = [*ROW_STEP, "flash_column_sums", "add_chunks"]
STEPS = {
    ("slab", 0): [
        *EMBEDDING,
        *("mm", "product_step", *FIRST_STEP, *["sinkhorn_pass", "add_chunks"] * 2, "match"),
        *("symmetrize", "add_chunks", "mm", "addr_", "project", "loss_and_stats"),
    ],
    ("slab", 2): [
        *(*EMBEDDING, "unit_rows"),
        *("mm", "product_step", *FIRST_STEP, *["sinkhorn_pass", "add_chunks"] * 2, "mm", "quantize", "match"),
        *("mm", "project", "loss_and_stats"),
    ],
    ("flash", 0): [
        *(*EMBEDDING, *FIRST_FLASH_STEP, *FLASH_PASS * 2, *ROW_STEP * 2, "flash_match", "flash_sums"),
        *("flash_dk", "addr_", "add_", "project", "loss_and_stats"),
    ],
    ("flash", 2): [
        *(*EMBEDDING, "unit_rows", *FIRST_FLASH_STEP, *FLASH_PASS * 2, *ROW_STEP * 2, "flash_match", "flash_sums"),
        *("project", "loss_and_stats"),
    ],
}


@pytest.mark.parametrize(("engine", "R"), STEPS)
def test_the_launches_of_a_small_step(engine, R, monkeypatch):
    """A 16-bit step of one rank: kernels, named as their functions, and operators of torch that launch something."""
    launched: list[str] = []
    launching = False

    def run(kernel, grid, *args, **options) -> None:
        nonlocal launching
        launched.append(kernel.fn.__name__.removesuffix("_kernel"))
        launching = True  # the interpreter's own operators do not count
        launch(kernel, grid, *args, **options)
        launching = False

    def left_out(*operator) -> bool:
        return launching or launches_nothing(*operator)

    monkeypatch.setattr("bam_kernels.engine.rows.check_finite", lambda *_: None)
    monkeypatch.setattr(backend, "flash", partial(lambda made: partial(made, run=run), backend.flash()))
    student, teacher = (features(views, 8, 16, seed=views).to(DEVICE) if views else None for views in (2, R))
    options = Options(group=ONE_RANK)
    layout = options.layout("bam_loss", student, teacher)
    call = Call("bam_loss", student, teacher, layout, options, ONE_RANK, TritonKernels(run), True, sixteen_bit=True)
    with torch.no_grad(), RecordedOperators(launched, left_out):
        {"slab": slab, "flash": flash}[engine].evaluate(call)
    assert launched == STEPS[engine, R]
