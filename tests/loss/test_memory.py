"""Peak memory: the budget is obeyed, and what is beyond it is small."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from problems import needs_cpu_kernels

from bam_kernels.engine import plan

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

# Peak resident bytes of one call beyond what was resident before it, in a process of its own. The same call before it
# brings in the libraries, their threads and the product library's buffers, which take 5 to 15 MB as threads come by.
PROGRAM = """
import ctypes, sys, torch
from bam_kernels import bam_loss, reference
from bam_kernels.simulated import SimulatedRanks
torch.set_num_threads(2)
def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))
function = reference.bam_loss if {reference} else bam_loss
def run(student, teacher, **options):
    function(student, teacher, **options).backward()
student = torch.randn(2, {B}, {D}, requires_grad=True)
teacher = torch.randn({R}, {B}, {D}) if {R} else None
keys = torch.randn(2 * {B} * {W}, {D}) if {W} > 1 else None
group = SimulatedRanks({W}, 0, keys) if {W} > 1 else None
run(student, teacher, group=group, **{options})
student.grad = None
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
run(student, teacher, group=group, **{options})
print(resident("VmHWM") - before)
"""


def peak_bytes(B: int, D: int, R: int = 0, *, W: int = 1, by_reference: bool = False, **options) -> int:
    """Two views of B images; W > 1: one rank's share of W. The least of three runs: a busy machine only adds to it."""
    program = PROGRAM.format(B=B, D=D, R=R, W=W, options=options, reference=by_reference)
    command = [sys.executable, "-c", program]
    return min(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3))


def test_budget_is_obeyed():
    B, D = 2560, 64
    M = N = 2 * B
    scores, embeddings = 4 * M * N, 4 * M * D
    for budget in (scores, scores // 8):
        peak = peak_bytes(B, D, memory_budget=budget)
        # Unit rows, centred keys and gradients; the kernels' partial sums and the product library's own buffers.
        assert peak <= budget + 7 * embeddings + (10 << 20), (peak, budget)


def test_peak_beyond_the_slab_is_a_tenth_of_the_eager_reference():
    # M = 2048 rows against N = 8192 keys: 8 views of a teacher.
    shape = {"B": 1024, "D": 64, "R": 8, "key_views": 8, "target_views": 2, "target_rows": "student"}
    slab = 4 * 2048 * 8192
    eager = peak_bytes(**shape, by_reference=True)
    ours = peak_bytes(**shape, memory_budget=slab)
    assert ours - slab <= 0.1 * eager, (ours, eager)


@pytest.mark.parametrize(
    ("columns", "l2_bytes", "rows"),
    [(8192, 50 << 20, 512), (2048, 50 << 20, 1024), (4096, 40 << 20, 768), (65536, 50 << 20, 1024)],
)
def test_products_are_read_where_they_were_left_if_that_holds_enough_rows(monkeypatch, columns, l2_bytes, rows):
    device = SimpleNamespace(L2_cache_size=l2_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert plan.product_rows(columns, torch.device("cuda")) == rows
    assert plan.product_rows(columns, torch.device("cpu")) == plan.PRODUCT_ROWS
