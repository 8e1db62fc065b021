"""backend="cuda" through the public functions, against the published implementation's outputs and the reference.

Where there is no GPU the library is given the emulated kernels and CPU tensors.
"""

import emulated
import pytest
import torch
from cuda_device import DEVICE, kernels_on, pytestmark  # noqa: F401
from derivative_tests import FEW, check_errors, check_transforms
from loss_checks import check_attention, check_golden, check_one_rank_of_two
from problems import (
    GOLDEN_FILES,
    assert_close,
    check_against_float64,
    check_rows_of_any_norm,
    features,
    loss_and_grad,
)
from recorded_operators import NO_LAUNCH, RecordedOperators, launches_nothing

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import cuda
from bam_kernels.backends.extension import _C
from bam_kernels.engine import slab
from bam_kernels.engine.call import Call
from bam_kernels.engine.rows import rows_and_keys
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK
from bam_kernels.simulated import SimulatedRanks

EXACT = {"backend": "cuda", "precision": "exact"}


@pytest.fixture(autouse=True, params=["one launch", "a launch a pass"])
def in_use(request, monkeypatch):
    """All Sinkhorn iterations of one rank in one launch, and what a device without clusters does."""
    limits = {} if request.param == "one launch" else {"cluster": 1}
    made = kernels_on(**limits)
    monkeypatch.setattr(cuda, "kernels", lambda: made)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    return made


@pytest.mark.parametrize("path", [p for p in GOLDEN_FILES if p.stem.endswith("_w1")], ids=lambda path: path.stem)
def test_golden(path):
    check_golden(path, DEVICE, EXACT)


@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize("memory_budget", [None, 3000])  # all scores kept; slabs of some rows, made again
def test_sixteen_bit(R, memory_budget, matmul_precision):
    """fp16 rows, int16 scores, their gradient in fp16."""
    student, teacher = features(4, 14, 40, seed=1), features(R, 14, 40, seed=1) if R else None
    y = teacher.double() if R else None
    loss, grad = loss_and_grad(reference.bam_loss, student.double(), y)
    P = reference.bam_targets(student.double(), y)
    torch.set_float32_matmul_precision("high")
    on_device = student.to(DEVICE), teacher.to(DEVICE) if R else None
    options = {"backend": "cuda", "memory_budget": memory_budget or 1 << 30}
    found_loss, found_grad = loss_and_grad(bam_loss, *on_device, **options)
    found_P = bam_targets(*on_device, **options).cpu()
    assert_close(found_loss.cpu(), loss, 2e-4 * loss.item())
    assert (found_grad.cpu() - grad).norm() <= 1e-3 * grad.norm()
    assert 1e-6 < (found_P - P).norm() / P.norm() <= 1e-3  # they were int16 scores


@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize("cosine", [0.0, 0.999])
def test_float16_embeddings_near_collapse(R, cosine):
    student = features(4, 160, 200, cosine=cosine).to(DEVICE)
    teacher = features(R, 160, 200, cosine=cosine, seed=1).to(DEVICE) if R else None
    check_against_float64(student, teacher, torch.float16, cosine, backend="cuda")


@pytest.mark.parametrize("R", [0, 2])
def test_rows_of_any_norm(R):
    """float32 scores, and fp16 rows with int16 scores."""
    check_rows_of_any_norm(torch.float32, R, DEVICE, (1e-6, 2e-6), **EXACT)
    check_rows_of_any_norm(torch.bfloat16, R, DEVICE, (2e-4, 2**-8), backend="cuda")


@pytest.mark.parametrize("R", [0, 2])
def test_one_rank_of_two(R):
    check_one_rank_of_two(R, DEVICE, EXACT)


@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_attention(output):
    check_attention(output, DEVICE, EXACT)


def recorded(kernels, called: list[str]) -> None:
    """Lists what is asked of the kernels' table from now on."""

    class Recorder:
        def __getattr__(self, name):
            called.append(name)
            return getattr(table, name)

    table, kernels._kernels = kernels._kernels, Recorder()


def test_which_kernels_ran(in_use):
    """A small problem of one rank takes one launch for its iterations where the device has that."""
    called = []
    recorded(in_use, called)
    loss_and_grad(bam_loss, features(2, 9, 8).to(DEVICE), None, iterations=4, **EXACT)
    at_once = in_use.fits_on_chip(18, 18, torch.float32, DEVICE)
    assert called.count("sinkhorn_on_chip") == int(at_once)
    assert called.count("sinkhorn_pass") == (0 if at_once else 3)


EMBEDDING = ["normalize", "mean_row", "normalize"]
# Ours, and with torch's; sums of blocks that a second kernel adds up count twice.
KERNELS = {("one launch", 0): 11, ("one launch", 2): 11, ("a launch a pass", 0): 15, ("a launch a pass", 2): 15}
LAUNCHES = {("one launch", 0): 14, ("one launch", 2): 14, ("a launch a pass", 0): 18, ("a launch a pass", 2): 18}
SINKHORN = {
    "one launch": ["column_lse", "sinkhorn_on_chip"],
    "a launch a pass": ["column_lse", "reciprocal_potential", "sinkhorn_pass", "sinkhorn_pass"],
}


def launches_of_a_small_step(kernels, R, ranks, monkeypatch) -> tuple[list[str], int]:
    """Everything that a 16-bit step launches, kernels and torch's operators in order, and how many kernels.

    What a CPU does besides is left out: its look for rows that are not finite, and its products in float32.
    """
    torch.set_float32_matmul_precision("high")
    launched: list[str] = []

    def given(*tensors):
        return [features(views, 8, 16, seed=views).to(DEVICE) if views else None for views in tensors]

    monkeypatch.setattr("bam_kernels.engine.rows.check_finite", lambda *_: None)
    student, teacher = given(2, R)
    options = Options(epsilon=0.05, temperature=0.1, group=ranks)
    layout = options.layout("bam_loss", student, teacher)
    recorded(kernels, launched)
    before = emulated.library().emulator_launches()
    with torch.no_grad(), RecordedOperators(launched, launches_nothing):
        slab.evaluate(Call("bam_loss", student, teacher, layout, options, ranks, kernels, True, sixteen_bit=True))
    return launched, emulated.library().emulator_launches() - before


OF_THE_EMULATOR = pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulator counts launches")


@OF_THE_EMULATOR
@pytest.mark.parametrize("R", [0, 2])
def test_the_launches_of_a_small_step(in_use, request, R, monkeypatch, matmul_precision):
    """One rank: the cost of 512 x 512."""
    form = request.node.callspec.params["in_use"]
    launched, kernels = launches_of_a_small_step(in_use, R, ONE_RANK, monkeypatch)
    embedding = [*EMBEDDING, "normalize"] if R else EMBEDDING
    target = ["mm", "product_step", *SINKHORN[form]]
    source = ["mm", "column_lse"] if R else []
    gradient = ["mm", "project"] if R else ["symmetrize", "mm", "addr_", "project"]
    assert launched == [*embedding, *target, *source, "match", *gradient, "loss_and_stats"]
    own = [name for name in launched if name in dir(_C.CudaKernels)]
    assert kernels == KERNELS[form, R]
    assert len(launched) - len(own) + kernels == LAUNCHES[form, R]


@OF_THE_EMULATOR
@pytest.mark.parametrize("R", [0, 2])
def test_the_launches_of_a_small_step_of_several_ranks(in_use, R, monkeypatch, matmul_precision):
    """Between the gather and the match: sums of columns are added up over ranks, which is not a launch here."""
    ranks = SimulatedRanks(3, 1, features(1, 3 * 16, 16)[0].to(DEVICE), keep_sent=True)
    launched, _ = launches_of_a_small_step(in_use, R, ranks, monkeypatch)
    embedding = [*EMBEDDING, "normalize"] if R else EMBEDDING
    source = ["mm", "column_lse"] if R else []  # during the sum over ranks
    target = ["product_step", "column_lse", "column_totals", *source, "total_potential"]
    target += 2 * ["sinkhorn_pass", "divide_potential"]
    assert launched[: len(embedding)] == embedding
    assert launched[launched.index("product_step") : launched.index("match")] == target


@pytest.mark.parametrize("R", [0, 2])
def test_keys_are_sent_from_where_they_are_made(in_use, R, matmul_precision):
    """With several ranks the kernel that makes fp16 keys writes the message, which nothing copies."""
    torch.set_float32_matmul_precision("high")
    launched: list[str] = []
    student, teacher = features(2, 8, 20).to(DEVICE), features(R, 8, 20, seed=1).to(DEVICE) if R else None
    ranks = SimulatedRanks(3, 1, features(1, 48, 20)[0].to(DEVICE))
    options = Options(group=ranks)
    call = Call(
        "bam_loss", student, teacher, options.layout("bam_loss", student, teacher), options, ranks, in_use, True, True
    )
    with torch.no_grad(), RecordedOperators(launched):
        rows = rows_and_keys(call, None)
    assert set(launched) <= NO_LAUNCH
    made = rows.z if R == 0 else rows.target
    keys = rows.keys.whole
    assert torch.equal(keys[16:32], made.read) and torch.equal(rows.keys.bias[16:32], made.bias)


@pytest.mark.slow
def test_derivatives():
    """What the kernels have not is an error; torch.func's transforms are right."""
    check_errors(DEVICE, FEW, **EXACT)
    check_transforms(DEVICE, **EXACT)
