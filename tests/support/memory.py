"""Peak memory of one loss and its gradient, in a process of its own."""

import math
import subprocess
import sys

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


def peak_bytes(
    B: int, D: int, R: int = 0, *, W: int = 1, by_reference: bool = False, at_most: float = 0, **options
) -> int:
    """Two views of B images; W > 1: one rank's share of W.

    The first of three runs that takes at_most bytes, else the least of the three: a busy machine only adds to it.
    """
    program = PROGRAM.format(B=B, D=D, R=R, W=W, options=options, reference=by_reference)
    measured: list[int] = []
    while len(measured) < 3 and min(measured, default=math.inf) > at_most:
        run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        measured.append(int(run.stdout))
    return min(measured)
