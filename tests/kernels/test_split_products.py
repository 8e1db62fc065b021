"""Products of two bf16 parts of each number, on processors with tile units (AMX), and when a loss uses them."""

import math

import pytest
import torch
from problems import features, loss_and_grad
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends import cpu
from bam_kernels.layout import Layout
from bam_kernels.simulated import SimulatedRanks

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)
if not cpu.kernels().can_split_products:
    pytest.skip("the processor has no tile units (AMX) that this process may use", allow_module_level=True)
KERNELS = cpu.kernels().with_split_products()

# One number; around a tile of 16 rows and 32 numbers, and around pairs of tiles; more rows than a thread packs; sums in
# memory of depths beyond 512; columns that are packed in two turns, with a depth of 2048 and more.
SHAPES = [(1, 1, 1), (15, 17, 31), (16, 16, 32), (33, 31, 33), (32, 64, 64), (300, 70, 513), (70, 1100, 1030)]
LARGE = [(33, 2100, 2100), (40, 16500, 300)]


@pytest.fixture(autouse=True)
def every_size(monkeypatch) -> None:
    """Small products are split too."""
    monkeypatch.setattr(cpu, "LEAST_SPLIT", 1)


def matrix(rows: int, columns: int, *, transposed: bool) -> Tensor:
    """Numbers of many sizes, a part of a wider matrix."""
    shape = (columns, rows) if transposed else (rows, columns)
    whole = torch.randn(shape[0], shape[1] + 3) * torch.exp2(torch.randint(-8, 1, (shape[0], 1)))
    part = whole[:, : shape[1]]
    return part.T if transposed else part


def assert_split_product(result: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    exact = a.double() @ b.double()
    size = torch.outer(a.double().norm(dim=1), b.double().norm(dim=0))
    start = before.double() if before is not None else torch.zeros_like(exact)
    of_float32 = (2 + math.sqrt(a.shape[1])) * 2**-23 * (size + start.abs())
    exact += start
    bound = 2**-15 * size + of_float32
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_products(shape, a_transposed, b_transposed):
    m, n, depth = shape
    a, b = matrix(m, depth, transposed=a_transposed), matrix(depth, n, transposed=b_transposed)
    room = torch.full((m, n + 6), 7.0)
    out = room[:, 3 : 3 + n]
    KERNELS.multiply(a, b, out)
    assert_split_product(out, a, b)
    before = torch.randn(m, n)
    added = KERNELS.multiply(a, b, before.clone(), add=True)
    assert_split_product(added, a, b, before)
    assert (room[:, :3] == 7).all() and (room[:, 3 + n :] == 7).all()


def test_the_largest_error():
    """A number whose low part, and the rest beyond both parts, are as large as can be."""
    x = 1 + 2**-8 - 1.5 * 2**-16
    for depth in (1, 64):
        a, b = torch.full((4, depth), x), torch.full((depth, 4), x)
        result = KERNELS.multiply(a, b, torch.empty(4, 4))
        assert_split_product(result, a, b)
        error = (result.double() / (depth * x**2) - 1).abs()
        assert (error > 1.9 * 2**-16).all()


def test_numbers_of_eight_bits_are_exact():
    """Products of bf16 numbers are rounded in float32 sums alone, and those of small whole numbers not at all."""
    a, b = torch.randint(-128, 129, (50, 90)).float(), torch.randint(-128, 129, (90, 40)).float()
    assert torch.equal(KERNELS.multiply(a, b, torch.empty(50, 40)), (a.double() @ b.double()).float())


@pytest.mark.parametrize("shape", [(300, 70, 513), (513, 2100, 40)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, threads):
    m, n, depth = shape
    a, b = torch.randn(m, depth), torch.randn(depth, n)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(KERNELS.multiply(a, b, torch.empty(m, n)))
    assert all(torch.equal(x, results[0]) for x in results)


def test_an_aligned_result_is_written_like_any_other():
    """Whole squares of an aligned result go to memory past the caches."""
    a, b = torch.randn(64, 100), torch.randn(100, 96)
    aligned, unaligned = torch.empty(64, 96), torch.empty(64, 97)[:, 1:]
    assert aligned.data_ptr() % 64 == 0
    assert torch.equal(KERNELS.multiply(a, b, aligned), KERNELS.multiply(a, b, unaligned))


def gradient_and_targets(loss, targets, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return loss_and_grad(loss, x, y)[1].double(), targets(x, y).double()


def relative_errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    return [((x - right).norm() / right.norm()).item() for x, right in zip(results, expected, strict=True)]


@pytest.mark.parametrize("flag", ["high", "medium"])
@pytest.mark.parametrize("with_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize(("cosine", "of_gradient"), [(0.0, 5e-5), (0.9, 5e-5), (0.99, 3e-4), (0.999, 3e-3)])
@pytest.mark.parametrize("least", [1, 1 << 20, 1 << 40], ids=["all split", "some split", "none split"])
def test_the_loss_where_products_may_be_rounded(
    flag, with_teacher, cosine, of_gradient, least, monkeypatch, matmul_precision
):
    """Errors of P stay small up to collapse, and errors of dz grow with 1 / (1 - cosine), as in float32.

    Products too small for tile units are float32, also where torch's flag would round them to 8 bits.
    """
    monkeypatch.setattr(cpu, "LEAST_SPLIT", least)
    x = features(3, 64, 64, cosine=cosine)
    y = features(3, 64, 64, cosine=cosine, seed=1) if with_teacher else None
    expected = gradient_and_targets(
        reference.bam_loss, reference.bam_targets, x.double(), y.double() if y is not None else None
    )
    torch.set_float32_matmul_precision(flag)
    for _ in range(3):  # by the engine, recorded, repeated
        gradient, targets = relative_errors(gradient_and_targets(bam_loss, bam_targets, x, y), expected)
        assert gradient <= of_gradient and targets <= 5e-5
    assert torch.get_float32_matmul_precision() == flag


def products_used(monkeypatch, x: Tensor, **options) -> set[bool]:
    """Whether products of a step are split."""
    used = set()
    original = cpu.CpuKernels.multiply

    def noted(self, *args, **kwargs) -> Tensor:
        used.add(self.splits_products)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(cpu.CpuKernels, "multiply", noted)
        bam_loss(x.requires_grad_(), views=2, **options).backward()
    return used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_input_of_16_bit_has_split_products(dtype, monkeypatch):
    x = torch.randn(32, 24).to(dtype)
    assert products_used(monkeypatch, x) == {True}
    assert products_used(monkeypatch, x, precision="exact") == {False}
    assert products_used(monkeypatch, x, epsilon=0.002) == {False}


def test_float32_has_split_products_only_where_the_flag_lets_them_be_rounded(monkeypatch, matmul_precision):
    x = torch.randn(32, 24)
    assert products_used(monkeypatch, x) == {False}
    torch.set_float32_matmul_precision("high")
    assert products_used(monkeypatch, x) == {True}
    assert products_used(monkeypatch, x, precision="exact") == {False}


@pytest.mark.parametrize("W", [1, 3])
@pytest.mark.parametrize("budget", [None, 20000])
def test_a_step_is_recorded_with_its_split_products(W, budget, nothing_recorded):
    """Calls of a kind give one result: the first by the engine, the second recorded, the third and fourth repeated."""
    layout = Layout(B=16, V=3, L=2, T=2, D=24, W=W)
    keys = torch.nn.functional.normalize(torch.randn(layout.N, layout.D), dim=1)
    options = {"group": SimulatedRanks(W, 1, keys)} if W > 1 else {}
    x = torch.randn(3, 16, 24).bfloat16()
    results = []
    for _ in range(4):
        z = x.clone().requires_grad_()
        bam_loss(z, key_views=2, memory_budget=budget, **options).backward()
        results.append(z.grad)
    assert all(torch.equal(g, results[0]) for g in results)
