"""What the compiler made of the CUDA kernels: registers, spills and the instructions they were written for. No GPU."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from bam_kernels.backends import cuda
from bam_kernels.backends.extension import _C

if _C is None or not _C.with_cuda:
    pytest.skip("built without CUDA", allow_module_level=True)
if getattr(_C, "bounded_waits", False):  # an older extension says nothing of them
    pytest.skip("reports of waits take a stack", allow_module_level=True)


def cuobjdump() -> str | None:
    """nvcc's own, or the one that Triton's package has."""
    found = shutil.which("cuobjdump")
    if found or Path("/usr/local/cuda/bin/cuobjdump").exists():
        return found or "/usr/local/cuda/bin/cuobjdump"
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


TOOL = cuobjdump()
if TOOL is None:
    pytest.skip("needs cuobjdump, of nvcc or of Triton", allow_module_level=True)

ARCHITECTURES = [name.removesuffix("+PTX").replace(".", "") for name in cuda.architectures().split()]
# Those whose time is that of a step; the others read rows too long for the chip, or little.
HOT = (
    "column_lse",
    "quantize",
    "merge_lse",
    "add_chunks",
    "sinkhorn_pass",
    "sinkhorn_on_chip",
    "match",
    "column_products",
    "row_step",
    "normalize",
    "project",
    "mean_row",
)


@dataclass(frozen=True)
class Compiled:
    """Of one kernel on one architecture. shared: fixed bytes, beside what a launch asks for; forms of its template."""

    registers: int
    stack: int
    local: int
    shared: int
    forms: int


def dump(*arguments: str) -> str:
    command = [TOOL, *arguments, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_of(line: str) -> str:
    """The kernel's name from its mangled one."""
    return re.search(r"\d([a-z_]+)_kernel(?:I|E)", line).group(1)


@cache
def compiled() -> dict[str, dict[str, Compiled]]:
    """By architecture and kernel, the largest of its forms."""
    found: dict[str, dict[str, Compiled]] = {}
    architecture = ""
    for line in dump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = sm_").strip()
        elif "Function" in line:
            name = kernel_of(line)
        elif "REG:" in line:
            of = found.setdefault(architecture, {})
            before = of.get(name, Compiled(0, 0, 0, 0, 0))
            fields = (
                ("REG", before.registers),
                ("STACK", before.stack),
                ("LOCAL", before.local),
                ("SHARED", before.shared),
            )
            most = (max(int(re.search(rf"{key}:(\d+)", line).group(1)), so_far) for key, so_far in fields)
            of[name] = Compiled(*most, before.forms + 1)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there_and_the_hot_ones_stay_in_registers(architecture):
    found = compiled()[architecture]
    sources = (Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu")
    written = {name for path in sources for name in re.findall(r"(\w+)_kernel\(const ", path.read_text())}
    assert set(found) == written
    for name, one in sorted(found.items()):
        print(
            f"sm_{architecture} {name:20} {one.forms} forms, {one.registers} registers, {one.stack} bytes of stack, "
            f"{one.shared} of fixed shared memory"
        )
        assert one.local == 0
    for name in HOT:
        assert found[name].stack == 0, found[name]
    # 512 threads of these fill a multiprocessor's registers, and 256 of the last.
    for name in ("sinkhorn_pass", "match"):
        assert found[name].registers <= 128
    assert found["sinkhorn_on_chip"].registers <= 255
    # Three blocks of 256 threads (two on sm_100), four, and two of 512 that have all their reads on their way.
    sums_at_once = 2 if architecture.startswith("100") else 3
    for name, threads in (("column_lse", sums_at_once * 256), ("quantize", 4 * 256), ("add_chunks", 2 * 512)):
        assert found[name].registers * threads <= 1 << 16, found[name]


@cache
def machine_code(architecture: str) -> list[tuple[str, str]]:
    """(kernel, its machine code), form by form."""
    parts = dump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]
    return [(kernel_of(part.partition("\n")[0]), part) for part in parts]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_instructions_are_those_that_were_meant(architecture):
    code: dict[str, str] = {}
    for name, form in machine_code(architecture):
        code[name] = code.get(name, "") + form
    # Scores in 16 bytes at a time: to registers where a thread walks down rows, else past them to shared memory, on
    # Hopper and newer in bulk.
    hopper = int(re.match(r"\d+", architecture).group()) >= 90
    walking = "column_lse", "quantize", "column_products", "row_step", "row_products", "match_long", "sinkhorn_on_chip"
    for name in walking:
        assert re.search(r"LDG\.E\.128", code[name]), name
    for name in ("sinkhorn_pass", "match"):
        assert re.search("UBLKCP" if hopper else r"LDGSTS\.E\.BYPASS\.128", code[name]), name
    for name in ("sinkhorn_pass", "sinkhorn_on_chip", "match"):
        assert "LDS.128" in code[name], name
    for name in ("column_lse", "quantize", "match"):  # int16 scores; their gradient
        assert re.search(r"STG\.E\.128", code[name]), name
    for name in ("column_lse", "sinkhorn_pass", "sinkhorn_on_chip", "match"):
        assert "MUFU.EX2" in code[name], name
        assert "LDL" not in code[name] and "STL" not in code[name], name
        # int16 becomes float by its bits: a conversion would take the pipe of the exponentials.
        assert "I2F.S16" not in code[name], name
    if hopper:
        # Sums over a cluster, without a fence of the whole device in the loop.
        for name in ("sinkhorn_pass", "sinkhorn_on_chip", "match"):
            assert "STAS.128" in code[name] and "SYNCS.PHASECHK" in code[name], name
        for name, form in machine_code(architecture):
            if name in ("sinkhorn_pass", "sinkhorn_on_chip", "match"):
                assert form.count("MEMBAR.ALL.GPU") <= form.count("UCGABAR_WAIT") == ("STAS" in form), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_touches_global_memory_before_it_has_followed_the_one_before(architecture):
    """The invariant of csrc/cuda/launch.cuh, in the order of the machine code: the wait, then what touches memory."""
    follows = int(re.match(r"\d+", architecture).group()) >= 90
    for name, form in machine_code(architecture):
        before, wait, after = form.partition("ACQBULK")
        if not follows:
            assert not wait, name
            continue
        assert wait and "PREEXIT" in after, name
        assert not re.search(r"\b(LD|ST|LDG|STG|LDGSTS|UBLKCP|ATOM|ATOMG|RED|REDG|EXIT)\b[. ]", before), name
