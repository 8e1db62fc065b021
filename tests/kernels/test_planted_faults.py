"""Each planted fault shows in the kernel that it names, and in no other one."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_device import DEVICE
from planted_faults import FAULTS, build, faulty_source

if DEVICE.type != "cpu":
    pytest.skip("of the emulator", allow_module_level=True)

# Calls each kernel that has a fault in some build, and says what became of it; one that takes too long ends the
# process. Those that end have time also on a busy machine.
PROGRAM = """
import signal, sys
import torch
sys.path.insert(0, TESTS)
from cuda_device import kernels_on, one
from row_problems import made_scores

kernels = kernels_on()
m, n = 9, 300
s = made_scores(m, n)

def sinkhorn_pass():
    kernels.sinkhorn_pass(s, 30.0, one(m), one(n), torch.empty(n), accumulate=False)

def column_lse():
    memory = torch.zeros(n + 1)
    kernels.column_lse(s, 30.0, one(m), torch.empty(n), memory[:n], accumulate=False)
    if memory[n] != 0:
        raise RuntimeError("written past the end")

def sinkhorn():
    assert kernels.fits_on_chip(m, n, s.dtype, s.device)
    kernels.sinkhorn(s, 30.0, one(m), 3)

for run in (sinkhorn_pass, column_lse, sinkhorn):
    print(run.__name__, "...", end=" ", flush=True)
    signal.alarm(5 if run.__name__ == NEVER_ENDS else 30)
    try:
        run()
        print("right", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
"""
SHOWN = {
    "wrong phase": r"emulator: threads wait for ever: .*\d+ for an arrival",
    "write past the end": "written past the end",
    "no end": "",
}


def run(library: str, never_ends: str | None) -> tuple[dict[str, str], int]:
    """What the program prints of each kernel with that emulator library, and its exit status."""
    program = PROGRAM.replace("TESTS", repr(str(Path(__file__).resolve().parents[1] / "support"))).replace(
        "NEVER_ENDS", repr(never_ends)
    )
    environment = os.environ | {"BAM_EMULATED": library}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    lines = (line.partition(" ... ") for line in result.stdout.splitlines())
    return {kernel: found for kernel, _, found in lines}, result.returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows_in_its_kernel_alone(name):
    fault = FAULTS[name]
    found, status = run(build(fault), fault.kernel if name == "no end" else None)
    assert re.fullmatch(SHOWN[name], found.pop(fault.kernel)), found
    assert list(found.values()) == ["right", "right"]
    assert status == (-signal.SIGALRM if name == "no end" else 0)


def test_a_fault_is_planted_in_one_place_or_not_at_all():
    with pytest.raises(ValueError, match="has 0 lines to change"):
        faulty_source(replace(FAULTS["no end"], line="no such line"))
