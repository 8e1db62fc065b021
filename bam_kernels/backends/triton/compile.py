"""Compile the kernels ahead of time, with no GPU: `python -m bam_kernels.backends.triton.compile`.

The launchers are called with meta tensors, which have shapes and no memory, and every kernel they would launch is
compiled for each target. Prints registers, shared memory, stack and spills of every configuration, as the assembler
reports them.
"""

import argparse
import inspect
import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...layout import Layout
from ..interface import DeviceNumber, Positives, Potential
from .flash_kernels import FlashKernels
from .launch import Launch
from .row_kernels import TritonKernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
}


@dataclass(frozen=True)
class Configuration:
    """One kernel with the argument types, constants and divisibilities of one call."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CompiledKernel:
    """Resources of one compiled kernel.

    registers    registers of a thread
    shared       bytes of shared memory of a program
    stack        bytes of stack of a thread
    spills       instructions that load or store local memory (on AMD: spilled registers); None if not disassembled
    products     number of tensor-core instructions by name, in machine code, or in PTX if not disassembled
    wide_fills   64-bit words moved to 32-bit registers, which are wrong values outside the mask of a load
    """

    registers: int
    shared: int
    stack: int
    spills: int | None
    products: dict[str, int]
    wide_fills: int


def _configuration(label: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Configuration:
    """The configuration that a launch with these arguments would compile."""
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages", 3)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter, value in zip(kernel.params, (*args, *options.values()), strict=True):
        name = parameter.name
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and special and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    assert list(options) == [p.name for p in kernel.params][len(args) :], "constants in the order of the parameters"
    return Configuration(label, kernel, signature, constants, tuple(divisible), num_warps, num_stages)


def configurations(*, small: bool = False) -> Iterator[Configuration]:
    """Yield every kernel as launched at the published shape and at others; small: each form of each kernel once."""
    by_key: dict[Any, Configuration] = {}

    def recorder(label: str) -> Launch:
        def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
            name = kernel.fn.__name__.removesuffix("_kernel")
            name += "+top_k" if options.get("TOP_K") else "+epilogue" if options.get("MASK_POSITIVES") else ""
            key = form(kernel, args, options)
            one = _configuration(f"{name} {label}".strip(), kernel, args, options)
            by_key.setdefault(key if small else (key, *map(str, (one.signature, one.constants, one.divisible))), one)

        return record

    call_all(recorder, small=small)
    yield from by_key.values()


def form(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, ...]:
    """Form of a launch: the kernel, its arguments that are None, and its switches, which decide what is compiled."""
    names = list(inspect.signature(kernel.fn).parameters)
    left_out = [f"no {name}" for name, value in zip(names, args, strict=False) if value is None]
    switches = [f"{name}={value}" for name, value in options.items() if isinstance(value, (bool, str))]
    return kernel.fn.__name__.removesuffix("_kernel"), *left_out, *sorted(switches)


def call_all(recorder: Callable[[str], Launch], *, small: bool) -> None:
    """Call the launchers on meta tensors, in all forms that engines use; recorder(label) replaces the launch."""
    types = (torch.int16, torch.float32)
    shapes = [(8192, 2, 8, dtype) for dtype in types]
    if not small:
        shapes = [(n, L, 8, dtype) for dtype in types for n in (512, 2048, 8192, 16384) for L in (1, 2, 4)]
    shapes += [(65536, 2, 8, dtype) for dtype in types]
    for n, L, V, dtype in shapes:
        _call_row_kernels(TritonKernels(recorder(f"N={n} L={L} {_TYPES[dtype]}")), n, L, V, dtype)
    _call_preparation(TritonKernels(recorder("")))
    for dtype in (torch.float16, torch.float32):
        for D in (64,) if small else (64, 128, 256, 512):
            for precision in ("ieee",) if dtype == torch.float16 else ("tf32", "ieee"):
                for masked in (True, False):
                    label = f"D={D} {_TYPES[dtype]} {precision}".removesuffix(" ieee")
                    _call_flash_kernels(recorder(label), 8192, D, dtype, precision, masked)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call_row_kernels(kernels: TritonKernels, n: int, L: int, V: int, dtype: torch.dtype) -> None:
    B = 256
    layout = Layout(B=B, V=V, L=L, T=2, D=1, W=max(n // (2 * B), 1))
    m = layout.M
    s = _empty(m, n, dtype=dtype)
    row, col = Potential(_empty(m), _empty(m)), Potential(_empty(n), _empty(n))
    images = s.view(V, B, n)
    step = DeviceNumber(1.0, _empty(1)) if dtype == torch.int16 else 1.0
    for divide in (False, True):
        kernels.sinkhorn_pass(s, step, row, col, _empty(n), False, divide)
    G = images.view(torch.float16) if dtype == torch.int16 else images

    def match(source: Tensor | None, top_k: int, **results: Any) -> None:
        kernels.match(
            images[:L],
            source,
            layout,
            col,
            _empty(L, B),
            epsilon=0.05,
            temperature=0.1,
            step=step,
            top_k=top_k,
            **results,
        )

    for top_k, gradient in itertools.product((0, 128), (G, None)):
        match(images, top_k, gradient=gradient)
    for top_k, row_out in ((0, None), (0, Potential(_empty(B), _empty(B))), (128, None)):
        match(None, top_k, targets=_empty(L, B, n), row_out=row_out)
    kernels.column_lse(s, step, row, _empty(n), _empty(n), False)
    if dtype == torch.int16:
        products = _empty(m, n)
        sums = _empty(n)
        for positives in (Positives(layout, 0, m), None):
            kernels.finish_scores(products, sums, step, s, positives, step, row, sums, sums, accumulate=False)
            kernels.quantize(products, step, s, positives, sums)
    for u, v in ((_empty(m), _empty(n)), (_empty(m), None), (None, _empty(n))):
        kernels.plan_products(s, step, row, col, v, u)
        kernels.plan_subtract_(_empty(m, n), s, step, row, col, u, v)


def _call_preparation(kernels: TritonKernels) -> None:
    layout = Layout(B=256, V=8, L=2, T=2, D=4096, W=16)
    kernels.mask_positives_(_empty(layout.M, layout.N), Positives(layout, 0, layout.M))
    x = _empty(2048, 4096, dtype=torch.bfloat16)
    centre = _empty(4096)
    unit = kernels.normalize(x)
    kernels.centre_potential(unit.read, centre, 0.05)
    kernels.mean_row(unit.read)
    kernels.mean_unit_row(x)
    half, _ = kernels.half_rows(x.view(8, 256, 4096), centre, 0.05)
    kernels.half_rows(x, centre, 0.05, _empty(512, 4112, dtype=torch.float16))
    for other in (_empty(512), None):
        kernels.product_step(centre, _empty(8192), _empty(2048), other)
    for rows in (unit, half):
        kernels.project_(_empty(2048, 4096), rows)
    for dtype in (torch.float32, torch.float16):
        kernels.symmetrize_(_empty(2048, 2048, dtype=dtype))
    kernels.reciprocal_potential(_empty(8192), _empty(8192))
    kernels.column_totals(_empty(8192), _empty(8192), 29)
    kernels.total_potential(_empty(8192, dtype=torch.float64), 29)
    kernels.divide_potential_(Potential(_empty(8192), _empty(8192)), _empty(8192))
    for images, norm in (
        (_empty(3, 256), None),
        (_empty(3, 256), unit.norm),
        (_empty(3, 4, dtype=torch.float64), None),
    ):
        kernels.loss_and_stats(images, _empty(8192), norm, layout, 9.0)


def _call_flash_kernels(record: Launch, n: int, D: int, dtype: torch.dtype, precision: str, masked: bool) -> None:
    V, B = 2, 1024
    layout = Layout(B=B, V=V, L=2, T=2, D=D, W=max(n // (2 * B), 1))
    x, k = _empty(layout.M, D, dtype=dtype), _empty(layout.N, D, dtype=dtype)
    bias = _empty(layout.N) if dtype == torch.float16 else None
    kernels = FlashKernels(k, bias, layout, masked=masked, unit=64.0, precision=precision, run=record)
    row, col = Potential(_empty(layout.M), _empty(layout.M)), Potential(_empty(n), _empty(n))
    kernels.column_lse(x, 1.0, row, _empty(n), _empty(n), False)
    kernels.sinkhorn_pass(x, 1.0, row, col, _empty(n), False, divide=True)
    kernels.row_step(x, 1.0, None, row)
    scales = {"epsilon": 0.05, "temperature": 0.1}
    kernels.match(x, x, row, row, col, needs_grad=True, **scales)
    kernels.match(x, x, row, row, col, needs_grad=False, **scales)
    kernels.key_gradient(x, x, row, row, col, **scales)
    kernels.targets(x, 1.0, row, col, _empty(layout.M, n))


def compile_for(one: Configuration, target: GPUTarget, *, disassemble: bool = True) -> CompiledKernel:
    """Compile a configuration for a target and return its resources. Raises: the errors of Triton's compiler."""
    names = [p.name for p in one.kernel.params]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in one.divisible}
    source = ASTSource(one.kernel, one.signature, one.constants, attrs)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=target, options=options)
    shared = kernel.metadata.shared
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        spills = int(re.findall(r"vgpr_spill_count: *(\d+)", text)[0])
        registers = int(re.findall(r"\.vgpr_count: *(\d+)", text)[0])
        stack = int(re.findall(r"private_segment_fixed_size: *(\d+)", text)[0])
        return CompiledKernel(registers, shared, stack, spills, _count_matches(r"\bv_mfma\w*", text), 0)
    return _assembler_report(kernel.asm["cubin"], kernel.asm["ptx"], shared, disassemble)


def _count_matches(pattern: str, text: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text)))


def _assembler_report(cubin: bytes, ptx: str, shared: int, disassemble: bool) -> CompiledKernel:
    """Read resources from the assembler's report and the machine code, with the cuobjdump of Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        listing = subprocess.run(
            [tool, "-res-usage", *(["-sass"] if disassemble else []), path], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", listing)[-1]
    wide_fills = len(re.findall(r"mov\.[bu]32\s+%r\d+, 0xffffffff[0-9a-f]{8};", ptx))
    if not disassemble:
        in_ptx = _count_matches(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx)
        return CompiledKernel(int(registers), shared, int(stack), None, in_ptx, wide_fills)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", listing))
    products = _count_matches(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", listing)
    return CompiledKernel(int(registers), shared, int(stack), spills, products, wide_fills)


def compile_all(
    target: str, *, small: bool = False, containing: str = ""
) -> Iterator[tuple[Configuration, CompiledKernel]]:
    """Compile every configuration whose name contains `containing` for one of TARGETS."""
    for one in configurations(small=small):
        if containing in one.name:
            yield one, compile_for(one, TARGETS[target])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--small", action="store_true", help="compile each form of each kernel once")
    parser.add_argument("--kernels", default="", help="compile only configurations whose name contains this text")
    options = parser.parse_args()
    print(f"{'target':8} {'registers':>9} {'shared':>8} {'stack':>6} {'spills':>6} {'warps':>5}  {'products':26}kernel")
    for target in options.targets:
        for one, c in compile_all(target, small=options.small, containing=options.kernels):
            products = " ".join(f"{count} {name}" for name, count in c.products.items())
            print(
                f"{target:8} {c.registers:9} {c.shared:8} {c.stack:6} {c.spills!s:>6} {one.num_warps:5}  {products:26}"
                f"{one.name}",
                flush=True,
            )


if __name__ == "__main__":
    main()
