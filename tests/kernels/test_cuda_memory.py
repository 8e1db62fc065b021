"""No kernel touches what lies past the end of its tensors: each ends where a page begins that is no one's."""

import signal
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from cuda_device import DEVICE

if DEVICE.type != "cpu":
    pytest.skip("of the emulator; on a GPU compute-sanitizer looks", allow_module_level=True)

# Scores of whole octets and not; rows as far apart as they are long, and further; whole rows and slabs of them.
PROGRAM = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, TESTS)
import emulated
from cuda_device import kernels_on
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.interface import Positives, Potential
from bam_kernels.layout import Layout

libc = ctypes.CDLL(None, use_errno=True)
held = []

def guarded(shape, dtype=torch.float32, fill=None):
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    held.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    last = start + (pages - 1) * mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0  # neither read nor written
    offset = (pages - 1) * mmap.PAGESIZE - size
    x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    return x.copy_(fill) if fill is not None else x.zero_()

def potential(n):
    return Potential(guarded((n,)), guarded((n,)).fill_(1))

for limits, most_threads in (({}, 512), ({}, 32), ({"shared_bytes": 0}, 512)):
    shapes.MOST_THREADS = most_threads
    kernels = kernels_on(**limits)
    for B, W in ((2, 3), (4, 66)):
        layout = Layout(B=B, V=3, L=2, T=2, D=1, W=W, rank=W - 1)
        m, n = layout.M, layout.N
        made = guarded((m, n), fill=torch.rand(m, n) * 2 - 1)
        fixed, row, col = guarded((m, n), torch.int16), potential(m), potential(n)
        shift, sums, c = guarded((n,)), guarded((n,)), guarded((n,))
        kernels.finish_scores(
            made, guarded((n,)), 1 / 32000, fixed, Positives(layout, 0, m), 1e-3, row, shift, sums, accumulate=False
        )
        kernels.mask_positives_(made, Positives(layout, 0, m))
        for s, scale in ((fixed, 1e-3), (made, 30.0)):
            kernels.column_lse(s, scale, row, shift, sums, accumulate=True)
            kernels.sinkhorn_pass(s, scale, row, col, c, accumulate=False)
            kernels.divide_potential_(col, c)
            total = guarded((n,), torch.float64, kernels.column_totals(shift, sums, 29))
            kernels.total_potential(total, 29)
            kernels.plan_products(s, scale, row, col, guarded((n,)), guarded((m,)))
            kernels.plan_subtract_(guarded((m, n)), s, scale, row, col, guarded((m,)), guarded((n,)))
            if kernels.fits_on_chip(m, n, s.dtype, s.device):
                kernels.sinkhorn(s, scale, row, 3)
            for top_k in (0, 3):
                images = s.clone() if s is made else s
                images = guarded(images.shape, images.dtype, images).view(layout.V, B, n)
                gradient = images if s is made else images.view(torch.float16)
                kernels.match(
                    images[:2], images, layout, col, guarded((2, B)), epsilon=0.05, temperature=0.1,
                    step=1.0 if s is made else 1 / 32000, top_k=top_k, targets=guarded((2, B, n)),
                    row_out=potential(B), gradient=gradient,
                )
        d = guarded((m, 13), fill=torch.randn(m, 13))
        x, centre = guarded((m, 13), torch.bfloat16, torch.randn(m, 13)), guarded((13,))
        rows, _ = kernels.half_rows(x, centre, 0.05)
        kernels.mean_unit_row(x)
        kernels.product_step(centre, guarded((n,)), guarded((m,)), guarded((m + 1,)))
        kernels.project_(d, rows)
        kernels.symmetrize_(guarded((m, m), torch.float16))
print("nothing was touched", flush=True)
kernels.divide_potential_(potential(7), guarded((8,)))  # one potential too few
"""


def test_nothing_past_the_end_is_touched():
    emulated.library()
    program = PROGRAM.replace("TESTS", repr(str(Path(__file__).resolve().parents[1] / "support")))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "nothing was touched" in found.stdout, found.stderr[-3000:]
    assert found.returncode == -signal.SIGSEGV  # the last call's overrun is seen
