"""backend="triton" through the public functions, against the published implementation's outputs and the reference."""

import pytest
import torch
from derivative_tests import FEW, check_errors
from loss_checks import check_attention, check_golden, check_one_rank_of_two
from problems import GOLDEN_FILES, assert_close, check_rows_of_any_norm, features, loss_and_grad
from triton_device import DEVICE, pytestmark  # noqa: F401

from bam_kernels import BAMLoss, backends, bam_loss, bam_targets, reference
from bam_kernels.verification import trust
from bam_kernels.ways import WAYS

# The interpreter takes a second for each: there those of one rank alone.
FILES = [path for path in GOLDEN_FILES if DEVICE.type != "cpu" or path.stem.endswith("_w1")]
EXACT = {"backend": "triton", "precision": "exact"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    check_golden(path, DEVICE, EXACT)


@pytest.mark.parametrize("R", [0, 2])
def test_flash_engine(R):
    student, teacher = features(3, 7, 9), features(R, 7, 9, seed=1) if R else None
    on_device = student.to(DEVICE), teacher.to(DEVICE) if R else None
    expected = loss_and_grad(reference.bam_loss, student.double(), teacher.double() if R else None)
    for actual, truth in zip(loss_and_grad(bam_loss, *on_device, engine="flash", **EXACT), expected, strict=True):
        assert_close(actual.cpu(), truth, 1e-5)
    P = bam_targets(*on_device, engine="flash", **EXACT)
    assert_close(P.cpu(), bam_targets(student.double(), teacher.double() if R else None), 1e-5)


@pytest.mark.parametrize("engine", ["slab", "flash"])
@pytest.mark.parametrize("R", [0, 2])
def test_rows_of_any_norm(engine, R):
    """float32 scores, and those of fp16 rows."""
    check_rows_of_any_norm(torch.float32, R, DEVICE, (1e-6, 2e-6), engine=engine, **EXACT)
    check_rows_of_any_norm(torch.bfloat16, R, DEVICE, (2e-4, 2**-8), engine=engine, backend="triton")


@pytest.mark.parametrize("way", ["triton", "flash"])
def test_auto_uses_what_is_verified(way, monkeypatch):
    """Bit for bit as if the backend and engine had been named."""
    monkeypatch.setattr(backends, "GPU", DEVICE.type)
    monkeypatch.setattr(trust, "_trust", {0: trust.Trust((way,))})
    student = features(3, 7, 9).to(DEVICE)
    named = loss_and_grad(bam_loss, student, engine=WAYS[way].engine, **EXACT)
    assert BAMLoss(precision="exact").way(student) == f"triton {WAYS[way].engine}"
    for found, expected in zip(loss_and_grad(bam_loss, student, precision="exact"), named, strict=True):
        assert torch.equal(found, expected)


def test_flash_engine_says_what_it_cannot():
    student = features(2, 5, 4).to(DEVICE)
    with pytest.raises(ValueError, match='engine="flash" keeps all columns, got top_k=3'):
        bam_loss(student, engine="flash", top_k=3, **EXACT)
    with pytest.raises(ValueError, match='engine="flash" takes up to 512 features, got D=513'):
        bam_loss(features(2, 3, 513).to(DEVICE), engine="flash", **EXACT)


@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_attention(output):
    check_attention(output, DEVICE, EXACT)


@pytest.mark.parametrize("R", [0, 2])
def test_one_rank_of_two(R):
    check_one_rank_of_two(R, DEVICE, EXACT)


def test_derivatives():
    """What the kernels have not is an error."""
    check_errors(DEVICE, FEW, **EXACT)
