"""The benchmark of host time: null kernels count every launch and change nothing else, and counts are exact."""

import ctypes
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from bam_kernels import precision
from bam_kernels.backends import cuda, triton, unit_rows
from bam_kernels.engine import rows
from bam_kernels.operators import rounded_product

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import host  # noqa: E402
import null_kernels as null  # noqa: E402
from test_benchmarks import rows_of, run  # noqa: E402

BACKENDS = [name for name in ("cuda", "triton") if null.unavailable(name) is None]
CPU = torch.device("cpu")
needs_cuda_table = pytest.mark.skipif("cuda" not in BACKENDS, reason=str(null.unavailable("cuda")))
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=str(null.unavailable("triton")))
# The embeddings of a step: their centre, then rows of the student and, with a teacher, of the teacher.
EMBEDDING = {"normalize": 2, "mean_row": 1}
CUDA_STEPS = {
    False: {**EMBEDDING, "column_lse": 1, "symmetrize": 1, null.PRODUCT: 2},
    True: {**EMBEDDING, "normalize": 3, "column_lse": 2, null.PRODUCT: 3},
}
BOTH_CUDA_STEPS = dict.fromkeys(("product_step", "sinkhorn_on_chip", "match", "project", "loss_and_stats"), 1)


def difference(after, before) -> dict[str, int]:
    return dict(after - before)


def test_rows_are_complete(tmp_path: Path) -> None:
    """Every backend that can run, floor and formula, without and with a teacher; no time, so the fewest rounds."""
    file = tmp_path / "host.json"
    finished = run("host.py", "--shapes", "8x8x4", "--seconds", "0", "--json", file)
    found = {(row["backend"], row["teacher"], row["part"]): row for row in rows_of(finished, file)}
    kinds = [*BACKENDS, host.FLOOR, host.FORMULA]
    assert found.keys() == {(kind, R, part) for kind in kinds for R in (False, True) for part in host.PARTS}
    counts = ("calls", "allocations", "operators")
    for (kind, R, part), row in found.items():
        formula = found[host.FORMULA, R, part]
        for caches in host.CACHES:
            p20, median, p80 = (row[f"{caches}_{name}_us"] for name in ("p20", "median", "p80"))
            assert 0 < p20 <= median <= p80
            assert row[f"{caches}_x_formula"] == pytest.approx(median / formula[f"{caches}_median_us"])
        assert row["repetitions"] == 5 and row["threads"] == 1 and row["device_type"] == "cpu"
        assert all(row[key] for key in ("device", "python", "torch", "bam_kernels", "commit"))
        assert (row["triton"] is not None) == ("triton" in BACKENDS)
        assert (row["M"], row["N"], row["D"], row["R"]) == (8, 8, 4, 2 * R)
        if kind == host.FORMULA:
            assert row["launches"] is None and row["products"] is None
            continue
        assert (row["launches"] > 0) == (row["products"] > 0) == (part != "backward" and kind != host.FLOOR)
        assert all(row[key] > 0 for key in counts)
        if part == "total":
            for key in (*counts, "launches", "products"):
                assert row[key] == found[kind, R, "forward"][key] + found[kind, R, "backward"][key]


@needs_cuda_table
@pytest.mark.parametrize("teacher", [False, True])
def test_launches_of_a_cuda_step(teacher: bool) -> None:
    """Every kernel of a small step by name; `count` splits kernels from products."""
    with null.null_kernels(("cuda",)) as kernels:
        step = host.Step.make("cuda", 2, 4, 4, teacher=teacher)
        expected = CUDA_STEPS[teacher] | BOTH_CUDA_STEPS
        for _ in range(4):  # computed, recorded, repeated
            before = kernels.launches()
            step.run()
            assert difference(kernels.launches(), before) == expected
        step.count(kernels)
    assert step.counts["forward"]["products"] == expected.pop(null.PRODUCT)
    assert step.counts["forward"]["launches"] == sum(expected.values())
    assert step.counts["backward"]["launches"] == step.counts["backward"]["products"] == 0


@needs_triton
def test_launches_of_triton_kernels() -> None:
    with null.null_kernels(("triton",)) as kernels:
        x = torch.zeros(3, dtype=torch.float32)
        before = kernels.launches()
        for _ in range(2):
            triton.kernels().reciprocal_potential(x, x)
        assert difference(kernels.launches(), before) == {"reciprocal_potential_kernel": 2}
        step = host.Step.make("triton", 2, 4, 4, teacher=False)
        launched = []
        for _ in range(4):  # computed, recorded, repeated
            before = kernels.launches()
            step.run()
            launched.append(difference(kernels.launches(), before))
    assert all(one == launched[0] for one in launched)
    launched = launched[0]
    assert launched["match_kernel"] == launched["project_kernel"] == 1 and launched["unit_rows_kernel"] == 2
    assert launched[null.PRODUCT] == 2


@needs_cuda_table
def test_each_entry_of_the_table_counts_its_own_kernel() -> None:
    names = null.kernel_names()
    assert len(names) == len(set(names)) and {"column_lse", "loss_and_stats"} <= set(names)
    table = (ctypes.c_void_p * len(names)).from_address(null.compiled(names).table())
    counters = null.cuda_counters(names)
    for i, address in enumerate(table):
        before = list(counters)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)(None, None)
        assert [after - b for after, b in zip(counters, before, strict=True)] == [j == i for j in range(len(names))]


@needs_cuda_table
def test_a_table_that_lacks_a_kernel_does_not_compile() -> None:
    names = null.kernel_names()
    with pytest.raises(RuntimeError, match=f"missing initializer for member .*{names[-1]}"):
        null.compiled(names[:-1])
    with pytest.raises(RuntimeError, match="too many initializers"):
        null.compiled((*names, "another"))


def test_null_kernels_end_with_their_block() -> None:
    d, ones = torch.zeros(2, 2, dtype=torch.float32), torch.ones(2, dtype=torch.float32)
    before = {package: (package.kernels, package.unavailable) for package in (cuda, triton)}
    finite = rows.check_finite
    with null.null_kernels(BACKENDS):
        d.addr_(ones, ones)
        torch.mul(ones, ones, out=d[0])
        unit_rows.multiply(d + 1, d + 1, d)
        assert not d.any()
        assert all(null.PACKAGES[name].unavailable(CPU) is None for name in BACKENDS)
    d.addr_(ones, ones)
    torch.mul(ones, ones + 1, out=d[1])
    assert d.tolist() == [[1, 1], [2, 2]]
    assert all((package.kernels, package.unavailable) == kept for package, kept in before.items())
    assert unit_rows.multiply is precision.multiply and rows.check_finite is finite


def inner(x: int) -> int:
    return abs(x) + 1


def outer(generated: int) -> int:
    def numbers():
        yield from range(generated)

    return sum(map(inner, numbers()))


@pytest.mark.parametrize("generated", [0, 3])
def test_python_calls(generated: int) -> None:
    """outer, inner for each number, and the generator: once for each number and once for its end."""
    assert host.python_calls(partial(outer, generated)) == (1 + 2 * generated + 1, sum(range(1, generated + 1)))


def test_python_calls_are_no_longer_counted_after_an_error() -> None:
    with pytest.raises(TypeError):
        host.python_calls(partial(inner, None))
    assert sys.getprofile() is None


def allocate_four() -> torch.Tensor:
    """Two tensors, a sum that an operator allocates, and a copy in another type; views allocate nothing."""
    x = torch.empty(3, 4, dtype=torch.float32)
    y = torch.zeros(12, dtype=torch.float32).view(3, 4)[1:]
    return (x[1:] + y).to(torch.float64)


def test_allocations() -> None:
    count, result = host.allocations(allocate_four)
    assert count == 4 and result.shape == (2, 4)
    assert host.allocations(lambda: result.view(8))[0] == 0


def test_operators() -> None:
    """Operators called from Python count (empty, zeros, view, two slices, add, to), not those that they call inside."""
    assert host.operators(allocate_four)[0] == 7


def test_operators_of_this_library_count_and_what_they_call() -> None:
    x, two = torch.ones(3, dtype=torch.float32), torch.full((), 2.0, dtype=torch.float32)
    count, result = host.operators(lambda: rounded_product(two, x, torch.float16))
    assert count == 3 and result.tolist() == [2, 2, 2]  # and empty_like and mul
    with null.null_kernels(()):
        assert host.operators(lambda: unit_rows.multiply(x, x, x))[0] == 1


@dataclass(eq=False)
class Noted:
    """A step that notes when it ran, and takes as many ns as its name and runs say."""

    name: str
    runs: list["Noted"]
    times_ns: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"cold": [], "warm": []})

    def run(self) -> tuple[int, int]:
        self.runs.append(self)
        return len(self.runs), ord(self.name)


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcde"])
def test_each_step_runs_after_another_one_and_then_after_itself(names: str, monkeypatch) -> None:
    """Over 200 rounds, in which each step runs twice."""
    monkeypatch.setattr(host, "LEAST_ROUNDS", 200)
    runs: list[Noted] = []
    steps = [Noted(name, runs) for name in names]
    host.measure(steps, 0)
    assert runs[::2] == runs[1::2] and len(runs) == 2 * 200 * len(names)
    others = [before is not after for before, after in zip(runs[1::2], runs[2::2], strict=False)]
    assert all(others) or len(names) == 1
    rounds = [runs[i : i + 2 * len(names) : 2] for i in range(0, len(runs), 2 * len(names))]
    assert all(sorted(step.name for step in one) == sorted(names) for one in rounds)
    if len(names) > 2:  # of two steps there is one order
        assert {one[0] for one in rounds} == {one[-1] for one in rounds} == set(steps)
    for step in steps:
        moments = [i + 1 for i, other in enumerate(runs) if other is step]
        assert step.times_ns["cold"] == [(i, ord(step.name)) for i in moments[::2]]
        assert step.times_ns["warm"] == [(i, ord(step.name)) for i in moments[1::2]]


@pytest.mark.parametrize("teacher", [False, True])
def test_the_floor_has_a_gradient(teacher: bool) -> None:
    """The floor allocates loss and gradient, then their product in the student's type, by two Python calls."""
    step = host.Step.make(host.FLOOR, 2, 4, 3, teacher=teacher)
    step.criterion(step.student, step.teacher).backward()
    grad = step.student.grad
    assert grad.shape == step.student.shape and grad.dtype == torch.float16
    step.student.grad = None
    with null.null_kernels(()) as kernels:
        step.count(kernels)
    forward, backward, _ = (step.counts[part] for part in host.PARTS)
    assert (forward["allocations"], backward["operators"]) == (2, 4)  # ones, empty_like, the product, detach
    assert forward["calls"] <= 4 and forward["launches"] == forward["products"] == 0


def test_rows_from_known_times() -> None:
    """Quantiles of the sum of both passes are those of steps, and not the sum of quantiles."""
    cold = [(1000 * i, 10_000 * (6 - i)) for i in range(1, 6)]
    times = {"cold": cold, "warm": [(a // 2, b // 5) for a, b in cold]}
    of_formula = {"cold": [(2000, 15_000)], "warm": [(1000, 4_000)]}
    names = ("calls", "allocations", "operators", "launches", "products")
    counts = {part: dict(zip(names, range(7, 12), strict=True)) for part in host.PARTS}
    made = [
        host.Step("cuda", None, torch.empty(1), None, times, counts),
        host.Step(host.FORMULA, None, torch.empty(1), None, of_formula, counts),
    ]
    forward, backward, total, *formula = host.rows_of(made)
    cold, warm = ([f"{caches}_{name}" for name in ("p20_us", "median_us", "p80_us")] for caches in host.CACHES)
    assert [forward[key] for key in cold] == pytest.approx([1.8, 3, 4.2])
    assert [forward[key] for key in warm] == pytest.approx([0.9, 1.5, 2.1])
    assert [backward[key] for key in cold] == pytest.approx([18, 30, 42])
    assert [backward[key] for key in warm] == pytest.approx([3.6, 6, 8.4])
    assert [total[key] for key in cold] == pytest.approx([22.2, 33, 43.8])
    assert [total[key] for key in warm] == pytest.approx([5.7, 7.5, 9.3])
    assert [row["cold_x_formula"] for row in (forward, backward, total)] == pytest.approx([1.5, 2, 33 / 17])
    assert [row["warm_x_formula"] for row in (forward, backward, total)] == pytest.approx([1.5, 1.5, 1.5])
    assert all(row[f"{caches}_x_formula"] == 1 for row in formula for caches in host.CACHES)
    assert forward["repetitions"] == 5 and formula[0]["repetitions"] == 1
    lines = host.table([forward, *formula]).splitlines()
    assert lines[2].split() == "formula no forward 2.00 2.00 2.00 1.00 1.00 1.00 1.00 1.00 1 7 8 9 - -".split()
    assert lines[1].split() == "cuda no forward 3.00 1.80 4.20 1.50 1.50 0.900 2.10 1.50 5 7 8 9 10 11".split()


def test_shapes_are_of_one_rank() -> None:
    assert host.layout_of_shape("16x8x4", 4).B == 4  # keys are two of four views
    with pytest.raises(ValueError, match="N=16 must be the 8 keys of one rank"):
        host.layout_of_shape("8x16x4", 2)
