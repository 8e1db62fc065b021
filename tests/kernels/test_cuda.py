"""What backend="cuda" says where it cannot run, the kernels' functions that run on the host, and the emulator."""

import ctypes
import math
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import emulated
import pytest
import torch

from bam_kernels.backends import cuda
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.extension import _C
from bam_kernels.layout import Layout

built = pytest.mark.skipif(_C is None or not _C.with_cuda, reason="built without CUDA")
needs_compiler = pytest.mark.skipif(_C is None or not shutil.which("g++"), reason="needs the extension and g++")
H100 = replace(emulated.HOPPER, multiprocessors=132, clusters=(66, 32, 15, 7))
A100 = replace(
    emulated.HOPPER,
    capability=(8, 0),
    multiprocessors=108,
    shared_bytes=163 << 10,
    clusters=(0, 0, 0, 0),
    programmatic=False,
)


@built
def test_the_default_architectures_are_compiled():
    assert cuda.architectures()
    assert all(part[0].isdigit() for part in cuda.architectures().split())


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device")
def test_without_a_device_the_module_loads_and_says_so():
    assert cuda.device_count() == 0
    assert cuda.unavailable(torch.device("cuda")).startswith("no CUDA device: ")


def test_it_takes_cuda_tensors():
    assert "got cpu" in cuda.unavailable(torch.device("cpu"))


def test_a_device_that_cannot_run_the_kernels_is_named_with_the_reason():
    old = replace(emulated.HOPPER, name="Tesla T4", capability=(7, 5))
    assert cuda._fault(old) == "Tesla T4 is sm_75, these kernels need sm_80 or newer"
    assert "no kernel image" in cuda._fault(replace(emulated.HOPPER, fault="no kernel image is available"))
    assert cuda._fault(emulated.HOPPER) is None
    assert H100.forms() == "rows over clusters of 16, one-launch Sinkhorn, overlapping launches"
    assert A100.forms() == "no clusters: long rows read twice, one launch a pass, launches one after another"


@pytest.mark.skipif(_C is None, reason="needs the extension")
def test_shapes_of_launches():
    """What the device holds, and no more: a row in one block to 8192 columns, over 16 to 131072, else read twice."""
    assert shapes.pass_shape(8192, 2, H100) == ((512, 1), 4, 132) and shapes.pass_shape(8193, 2, A100) is None
    assert shapes.pass_shape(131072, 4, H100) == ((512, 16), 2, 7) and shapes.pass_shape(131073, 2, H100) is None
    assert shapes.pass_shape(65536, 2, H100) == ((512, 8), 4, 15) and shapes.pass_shape(8193, 2, H100) == (
        (288, 2),
        4,
        66,
    )
    assert shapes.pass_shape(2048, 2, H100) == ((128, 1), 4, 4 * 132)
    # 15 clusters of 8 blocks run at once, not 132 // 8: no chunk is left for a second turn.
    assert -(-2048 // shapes.pass_rows(2048, shapes.pass_shape(65536, 2, H100), H100)) == 15
    few = replace(H100, clusters=(66, 32, 0, 0))
    assert few.cluster == 4 and shapes.pass_shape(65536, 2, few) is None
    # 163 KB hold whole groups of one block of 4096 columns, half groups of two.
    assert shapes.pass_shape(8192, 2, A100) == ((512, 1), 2, 108)
    assert shapes.pass_shape(4096, 2, A100) == ((256, 1), 2, 2 * 108)
    assert shapes.pass_shape(8192, 4, A100) == ((512, 1), 1, 108)
    assert shapes.pass_shape(2000, 2, replace(A100, shared_bytes=20 << 10)) is None
    for device, score_bytes in ((H100, 2), (H100, 4), (A100, 2)):
        assert shapes.match_shape(2, 8192, score_bytes, device).team == (512, 1)
    assert shapes.match_shape(2, 8192, 4, A100) is None  # float32 scores: 196 kB
    # Six rows of int16 scores at once in one block, where they fit it; 8 rows of targets do not.
    assert [shapes.match_shape(2, 8192, 2, device).stages for device in (H100, A100)] == [6, 6]
    assert shapes.match_shape(5, 8192, 2, H100) == ((512, 1), 4) and shapes.match_shape(2, 64, 4, H100) == ((32, 1), 4)
    # Six rows, where two blocks with four fit a multiprocessor, would leave room for one.
    assert [shapes.match_shape(L, 4096, 2, H100) for L in (2, 4)] == [((256, 1), 6), ((256, 1), 4)]
    assert shapes.match_shape(8, 8192, 2, H100) == ((256, 2), 4)
    for device in (H100, A100):
        for m, n in ((1, 1), (512, 512), (2048, 8192), (100_000, 300)):
            shape = shapes.pass_shape(n, 2, device)
            rows = shapes.pass_rows(m, shape, device)
            assert rows % shape.group == 0 and -(-m // rows) <= 2 * device.multiprocessors
            assert shapes.column_rows(m, n, device) % shapes.COLUMN_ROWS == 0
            assert shapes.sum_rows(m, n, 3, device) % shapes.COLUMN_ROWS == 0
    # Each of 8 warps has rows; at most three blocks per multiprocessor; one chunk of long rows, which needs no merge.
    assert [shapes.sum_rows(m, 8192, 3, H100) for m in (1, 300, 512, 2048)] == [32, 32, 44, 172]
    assert shapes.sum_rows(512, 8192, 4, H100) == 32 and shapes.sum_rows(64, 65536, 3, H100) == 64
    assert shapes.sum_rows(1 << 20, 256, 3, H100) == 1 << 13
    # The small problems: a cluster that holds twice as many scores takes longer than all multiprocessors.
    assert shapes.on_chip(512, 512, H100) == (32, 16) and shapes.on_chip(128, 128, H100) == (8, 16)
    assert shapes.on_chip(1024, 512, H100) == (64, 16) and shapes.on_chip(512, 1024, H100) == (32, 16)
    assert shapes.on_chip(1024, 1024, H100) is shapes.on_chip(64, 1025, H100) is None
    assert shapes.on_chip(512, 512, few) is shapes.on_chip(512, 512, A100) is None
    assert shapes.on_chip(512, 512, replace(H100, clusters=(66, 32, 15, 0))) == (64, 8)


@pytest.fixture
def library() -> ctypes.CDLL:
    found = emulated.library()
    found.public_column_of.argtypes = found.own_image_of.argtypes = [ctypes.c_int64] * 4
    found.to_fixed_point.argtypes = [ctypes.c_float] * 2
    found.value_of_fixed_point.restype = ctypes.c_float
    return found


@needs_compiler
class TestFunctionsOnTheHost:
    def pair(self, function, *arguments: float) -> tuple[float, float]:
        out = (ctypes.c_float * 2)()
        function(*map(ctypes.c_float, arguments), out)
        return out[0], out[1]

    def test_fixed_point(self, library):
        given = {0.0: 0, 0.4999: 15997, 2.0: 32767, -2.0: -32767, -1e30: -32768, 1.5 / 32000: 2, 2.5 / 32000: 2}
        assert {s: library.to_fixed_point(s, 32000.0) for s in given} == given

    def test_every_fixed_point_value_is_its_own(self, library):
        assert library.value_of_fixed_point(-32768) == pytest.approx(-1e30)
        for score in range(-32767, 32768):
            assert library.value_of_fixed_point(score) == score == library.to_fixed_point(float(score), 1.0)

    @pytest.mark.parametrize("x", [1.0, 0.75, 2.0**-126, 3.4e38, math.pi])
    def test_split_and_reciprocal(self, library, x):
        x = struct.unpack("f", struct.pack("f", x))[0]
        exponent, mantissa = self.pair(library.split_float, x)
        assert (mantissa, exponent) == math.frexp(x)
        exponent, mantissa = self.pair(library.reciprocal_of, -7.0, x)
        assert exponent == -7 - math.frexp(x)[1] and 1 < mantissa <= 2
        assert math.ldexp(mantissa, int(exponent)) * x * 2**7 == pytest.approx(1, rel=2e-7)

    def test_reciprocal_of_nothing(self, library):
        assert self.pair(library.reciprocal_of, 3.0, 0.0) == (0.0, math.inf)
        assert math.isnan(self.pair(library.reciprocal_of, 3.0, math.nan)[1])

    def test_index_algebra_is_that_of_the_layout(self, library):
        layout = Layout(B=5, V=3, L=2, T=2, D=1, W=3, rank=1)
        for t in range(layout.T):
            for r in range(layout.W):
                for i in range(layout.B):
                    column = layout.gathered_column(t, r, i)
                    public = library.public_column_of(column, layout.W, layout.T, layout.B)
                    assert public == layout.public_column(t, r, i)
                    image = library.own_image_of(column, layout.own_columns, layout.T, layout.B)
                    assert image == (i if r == layout.rank else -1)

    @pytest.mark.parametrize("distinct", [1, 3, 1000])  # how many values there are: ties, and none
    @pytest.mark.parametrize("k", [1, 7, 499])
    def test_threshold_is_that_of_a_stable_sort(self, library, distinct, k):
        n = 500
        x = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(k)).float() / distinct * 1e-3
        kept = torch.empty(n, dtype=torch.uint8)
        addresses = map(ctypes.c_void_p, (x.data_ptr(), kept.data_ptr()))
        counted = library.keep_largest(next(addresses), ctypes.c_int64(n), ctypes.c_int64(k), next(addresses))
        expected = torch.zeros(n, dtype=torch.uint8)
        expected[x.sort(descending=True, stable=True).indices[:k]] = 1
        assert torch.equal(kept, expected)
        assert counted <= 31 + 9  # the bits of a float, and of a column


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (0, "a thread ended while others of its block wait"),
        (1, "threads wait for ever: .* at a barrier of the block .* at a barrier of the cluster"),
        (2, "a block that may not have begun"),
        (3, "a write past the end of shared memory"),
        (4, "did not follow the kernels before"),
    ],
)
def test_the_emulator_reports_what_a_kernel_may_not_do(kind, fault):
    report = emulated.library().fault_of_broken_kernel
    report.restype = ctypes.c_char_p
    assert re.search(fault, report(kind).decode())


@needs_compiler
def test_threads_resume_where_the_compiler_checks_jumps(tmp_path):
    """Some systems' compilers turn on checks of longjmp, which abort at one to another stack, as fibers have."""
    made = {}
    for name in ("emulator", "device_functions"):
        source, made[name] = tmp_path / f"{name}.cpp", tmp_path / f"{name}.o"
        source.write_text(
            f'#undef _FORTIFY_SOURCE\n#define _FORTIFY_SOURCE 2\n#include "{emulated.EMULATOR / name}.cpp"\n'
        )
        emulated.compile_source(source, made[name])
    library = tmp_path / "checked.so"
    emulated.link(made, library)
    program = (
        f"import ctypes; report = ctypes.CDLL({str(library)!r}).fault_of_broken_kernel; "
        "report.restype = ctypes.c_char_p; print(report(3).decode())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "emulator: a write past the end of shared memory\n", ran.stderr
