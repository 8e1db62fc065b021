"""Every Triton kernel once, compiled ahead of time for three generations of GPUs; no GPU is needed."""

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from bam_kernels.backends.triton import compile as ahead  # noqa: E402

# The instructions that multiply on the tensor cores of each: by warp, by warp group, by the whole multiprocessor.
TARGETS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Bytes of shared memory besides blocks of operands: barriers, since products of a whole multiprocessor end later than
# they are issued, and in one form 64 numbers of float32.
OTHER_SHARED = {"sm_80": 0, "sm_90": 0, "sm_100": 16 + 64 * 4}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_the_hot_ones_stay_in_registers(target):
    forms = {f"{one.name}, form {i}": one for i, one in enumerate(ahead.configurations(small=True))}
    found = {
        name: ahead.compile_for(one, ahead.TARGETS[target], disassemble=name.startswith("flash"))
        for name, one in forms.items()
    }
    written = "".join(path.read_text() for path in Path(ahead.__file__).parent.glob("*.py"))
    assert {re.match(r"\w+", name).group() for name in found} == set(re.findall(r"def (\w+)_kernel\(", written))
    hot = re.compile(r"(sinkhorn_pass|match|column_lse|column_products|row_step)(\+epilogue)? ")
    assert len({hot.match(name).group(1) for name in found if hot.match(name)}) == 5
    assert sum("PRECISION" in one.constants for one in forms.values()) > 20
    for name, one in found.items():
        assert one.wide_fills == 0, name
        if hot.match(name):  # with float32 scores a few numbers of a thread
            assert one.stack <= (16 if "fp32" in name else 0), (name, one)
        blocks = (64 if "tf32" in name else 48) * 1024  # of operands
        assert one.shared <= blocks + OTHER_SHARED[target], (name, one)
        multiplies = "PRECISION" in forms[name].constants
        if multiplies and "D=64 fp16" in name:
            assert one.products.keys() == {TARGETS[target]}, (name, one)
        if "+epilogue D=64 fp16" in name:  # with the mask, as they are used
            assert one.stack == one.spills == 0, (name, one)
        if multiplies and "D=64 fp32" in name:  # tf32, or float32 without the tensor cores
            assert one.products.keys() == ({TARGETS[target]} if "tf32" in name else set()), (name, one)
