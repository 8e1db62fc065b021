"""The 16-lane kernels on a processor without AVX-512: the same sources compiled for AVX2, two registers a vector.

Shows that nothing depends on the width of a vector; the AVX-512 instructions themselves need a processor that has them.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bam_kernels.backends import cpu
from bam_kernels.backends.cpu import LOG2_E, CpuKernels, Potential
from bam_kernels.backends.extension import _C
from bam_kernels.layout import Layout

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
FAMILIES = ("column_lse", "sinkhorn_pass", "match", "plan", "rows", "symmetrize", "table")

if cpu.unavailable() or cpu.kernels().isa == "plain" or not shutil.which("g++"):
    pytest.skip("needs the extension, AVX2 and g++", allow_module_level=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> CpuKernels:
    folder = tmp_path_factory.mktemp("wide")
    shim = folder / "shim.cpp"
    shim.write_text(
        f'#include "{SOURCES.parent / "bam.h"}"\n'
        "namespace bam::cpu::wide { extern const Kernels table; }\n"
        'extern "C" const void* wide_table() { return &bam::cpu::wide::table; }\n'
    )
    library = folder / "wide.so"
    flags = "-std=c++17 -O1 -fPIC -shared -fopenmp -fno-math-errno -mavx2 -mfma -w -DBAM_ISA=wide -DBAM_LANES=16"
    sources = [str(SOURCES / f"{name}.cpp") for name in FAMILIES]
    subprocess.run(["g++", *flags.split(), str(shim), *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.wide_table.restype = ctypes.c_void_p
    return CpuKernels(table=_C.cpu_kernels_at(loaded.wide_table()))


# A tail below 16, one vector, one and a tail, a panel of 1024 and a tail.
@pytest.mark.parametrize("n", [5, 16, 23, 1030])
def test_sixteen_lanes_agree_with_eight(wide, n):
    assert wide.isa == "wide"
    layout = Layout(B=6, V=3, L=2, T=1, D=1, W=1)
    scores = 2 * torch.rand(18, n, generator=torch.Generator().manual_seed(0)) - 1
    outcomes = []
    for kernels in (cpu.kernels("avx2"), wide):
        row, c, shift, sums = Potential.one(18), torch.empty(n), torch.empty(n), torch.empty(n)
        kernels.column_lse(scores, LOG2_E / 0.02, row, shift, sums, accumulate=False)
        col = kernels.reciprocal_potential(shift, sums)
        kernels.sinkhorn_pass(scores, LOG2_E / 0.02, row, col, c, accumulate=False)
        kernels.divide_potential_(col, c)
        q = kernels.quantize(scores, 1 / 32000, torch.empty(scores.shape, dtype=torch.int16))
        targets, G = torch.empty(2, 6, n), torch.empty(3, 6, n)
        matched = kernels.match(
            scores.view(3, 6, n)[:2],
            scores.view(3, 6, n),
            layout,
            col,
            row.exponent.view(3, 6)[:2],
            epsilon=0.02,
            temperature=0.1,
            targets=targets,
            gradient=G,
        )
        y, w = kernels.plan_products(scores, LOG2_E / 0.02, row, col, torch.ones(n), torch.ones(18))
        square = (scores[:, :5].T @ scores[:, :5]).contiguous()
        column_sums = kernels.symmetrize_(square)
        outcomes.append([c, q.float(), targets, G, matched.loss, matched.source_entropy, y, w, square, column_sums])
    for eight, sixteen in zip(*outcomes, strict=True):
        assert ((sixteen - eight).abs() <= 1e-5 * eight.abs() + 1e-6).all()
