"""Column and row steps, potentials, preparation and the plan operator in CUDA C++ against float64.

Where there is no GPU the same sources run under the emulator.
"""

import math
from dataclasses import replace

import cuda_device
import emulated
import pytest
import torch
from cuda_device import DEVICE, device_of, empty, kernels, kernels_on, one, pytestmark  # noqa: F401
from embedding_tests import EmbeddingTests
from row_problems import MASKED, assert_close, log2, made_scores, masked, representable
from sinkhorn_tests import SinkhornTests, on_device, scores, sixteen_bit
from stats_checks import SPOILT, check_loss_and_stats

from bam_kernels.backends.cuda import launch_sinkhorn, shapes
from bam_kernels.backends.interface import LOG2_E, Positives, Potential
from bam_kernels.layout import Layout


@pytest.fixture
def whole() -> object:
    """Kernels where the form of rows makes no difference."""
    return kernels_on()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


class TestSinkhorn(SinkhornTests):
    # One entry; around an octet of columns; around a chunk of 4 rows; primes; rows of two octets a thread and a tail;
    # past the 512 columns of a block of one warp; three such blocks of a cluster of four.
    SHAPES = ((1, 1), (3, 7), (4, 8), (5, 9), (17, 97), (9, 263), (3, 520), (5, 1031))


class TestEmbeddings(EmbeddingTests):
    pass


# Warps with several turns of 4 rows, the last of which is cut, in several chunks and over two blocks of columns; one
# chunk; n = 300 cuts the last octet of aligned rows, and rows of n = 301 are not aligned.
@pytest.mark.parametrize("shape", [(501, 296), (501, 300), (501, 301), (30, 296)], ids=str)
def test_scores_that_are_masked_or_too_large_or_not_a_number_among_others(shape):
    made = kernels_on(multiprocessors=4)
    (m, n), step = shape, 1 / 32000
    layout = Layout(B=37, V=1, L=1, T=2, D=1, W=4, rank=2)  # some octets begin, and some end, within this rank's keys
    positives = Positives(layout, 5, 29)
    s, bias = made_scores(m, n) / 2, made_scores(1, n, 1)[0] / 2  # most threads find no score to look at
    s[3, 7] = s[m - 1, n - 1] = s[17, 40:56] = MASKED
    s[5, 100], s[6, 101], s[7, 102], s[8] = 2.0, -2.0, math.nan, 4.0
    image = (5 + torch.arange(m) % 29) % 37
    key = torch.arange(n) - layout.own_columns
    mask = (key >= 0) & (key < 74) & (key % 37 == image[:, None])
    assert 0 < mask.sum() < mask.numel()
    given = (s + bias) * (1 / torch.tensor(step))
    expected = given.clamp(-32767, 32767).nan_to_num(nan=-32767).round()
    expected = expected.masked_fill((s + bias <= MASKED) | mask, -32768).to(torch.int16)

    on_gpu, bias_on_gpu = s.to(DEVICE), bias.to(DEVICE)
    fixed = made.quantize(on_gpu, step, sixteen_bit(m, n, DEVICE), positives, bias_on_gpu)
    assert torch.equal(fixed.cpu(), expected)
    scale, out = LOG2_E / 0.05 * step, sixteen_bit(m, n, DEVICE)
    row = Potential(*(part.to(DEVICE) for part in (-torch.arange(m).float() % 9, 1 + torch.rand(m))))
    exact = masked(expected.double().masked_fill(expected == -32768, MASKED)) * scale + log2(row).cpu()[:, None]
    for accumulate in (False, True):
        if not accumulate:
            shift, sums = torch.empty(2, n, device=DEVICE)
        before = (shift.clone(), sums.clone())
        made.finish_scores(on_gpu, bias_on_gpu, step, out, positives, scale, row, shift, sums, accumulate=accumulate)
        assert torch.equal(out.cpu(), expected)
        found = shift.cpu().double() + sums.cpu().double().log2()
        assert_close(found, torch.logsumexp(exact / LOG2_E, 0) * LOG2_E + accumulate, 0, 2e-6)
        made.column_lse(fixed, scale, row, *before, accumulate=accumulate)
        assert torch.equal(before[0], shift) and torch.equal(before[1], sums)


def test_more_chunks_than_threads_have_on_their_way_at_once():
    made, (m, n) = kernels_on(multiprocessors=200), (1300, 20)
    s, row, col = made_scores(m, n), one(m), one(n)
    exact, on_gpu = s.double() * 20 / LOG2_E, s.to(DEVICE)
    shift, sums, c = torch.empty(3, n, device=DEVICE)
    made.column_lse(on_gpu, 20.0, row, shift, sums, accumulate=False)
    found = shift.cpu().double() + sums.cpu().double().log2()
    assert_close(found, torch.logsumexp(exact, 0) * LOG2_E, 0, 2e-6)
    made.sinkhorn_pass(on_gpu, 20.0, row, col, c, accumulate=False)
    assert_close(c.cpu(), torch.softmax(exact, 1).sum(0), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_a_chip_with_room_for_half_a_group(dtype, monkeypatch):
    """Bit for bit what whole groups give: in the same chunks, rows are added to the columns one after another."""
    monkeypatch.setattr(launch_sinkhorn, "pass_rows", lambda m, shape, device: 8)
    outcomes = []
    for made, rows in (
        (kernels_on(cluster=1, shared_bytes=10 << 10), 4 // dtype.itemsize),
        (kernels_on(cluster=1), None),
    ):
        shape = shapes.pass_shape(300, dtype.itemsize, device_of(made))
        assert shape[:2] == ((32, 1), rows or 8 // dtype.itemsize)
        s, step, exact = scores(made, DEVICE, 17, 300, dtype)
        row, c = one(17), empty(300)
        made.sinkhorn_pass(s, LOG2_E / 0.05 * step, row, one(300), c, accumulate=False)
        outcomes.append([*row, c])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert_close(outcomes[0][2].cpu(), torch.softmax(exact / 0.05, 1).sum(0), 5e-6)


# In an octet, in each of its places alone; in none; everywhere.
@pytest.mark.parametrize("hidden", [*range(8), None, slice(None)], ids=str)
def test_masked_scores_count_for_nothing_where_unmasked_ones_as_low_would(kernels, hidden):  # noqa: F811
    """int16 scores whose lowest is only 3 octaves below none."""
    s = torch.randint(-32767, 32768, (9, 40), dtype=torch.int16)
    if hidden is not None:
        s[4, 16:24][hidden] = -32768
    scale = 3 / 32768
    exact = (s.double() * scale / LOG2_E).masked_fill(s == -32768, -math.inf)
    row, c = one(9), empty(40)
    kernels.sinkhorn_pass(s.to(DEVICE), scale, row, one(40), c, accumulate=False)
    assert_close(row.natural_log().cpu(), -torch.logsumexp(exact, 1), 0, 2e-6)
    assert_close(c.cpu(), torch.softmax(exact, 1).sum(0), 5e-6)


# Blocks without rows; a block with fewer rows than others, and rows of 40 and 66 bytes; warps that have a second group
# of rows, of 4 (with clusters of 4) and of 2; the most columns; rows of whole octets that end in a lane's second one.
@pytest.mark.parametrize("shape", [(1, 1), (30, 20), (150, 33), (69, 600), (3, 1024), (20, 408)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("cluster", [4, 16])
def test_one_launch_does_all_iterations(shape, dtype, cluster):
    made = kernels_on(cluster=cluster)
    m, n = shape
    epsilon = representable(0.05)
    s, step, exact = scores(made, DEVICE, m, n, dtype)
    f, g, c = torch.zeros(m, 1).double(), torch.zeros(n).double(), None
    for iterations in (1, 2, 4):
        row = one(m)
        scale = on_device(LOG2_E / epsilon, DEVICE) if step == 1.0 else LOG2_E / epsilon * step
        found, sums = made.sinkhorn(s, scale, row, iterations)
        again = made.sinkhorn(s, scale, one(m), iterations)
        assert all(torch.equal(a, b) for a, b in zip(found, again[0], strict=True))
        f, g = torch.zeros(m, 1).double(), -torch.logsumexp(exact / epsilon, 0)
        for _ in range(iterations - 1):
            f = -torch.logsumexp(exact / epsilon + g, 1, keepdim=True)
            c = torch.exp(exact / epsilon + f + g).sum(0)
            g = g - c.log()
        assert_close(found.natural_log().cpu(), g, 0, 3e-6)
        assert_close(row.natural_log().cpu(), f[:, 0], 0, 3e-6)
        if iterations == 1:
            assert sums.isnan().all()
        else:
            assert_close(sums.cpu(), c, 2e-5)


def test_clusters_larger_than_a_device_has_are_skipped(monkeypatch):
    without = replace(emulated.HOPPER, clusters=(0, 0, 0, 0))
    monkeypatch.setattr(cuda_device, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(cuda_device.cuda, "query_device", lambda index: without)
    with pytest.raises(pytest.skip.Exception, match="no clusters of 4"):
        kernels_on(cluster=4)


def test_what_fits_on_chip():
    made = kernels_on(cluster=4, shared_bytes=72 << 10)
    assert made.fits_on_chip(80, 500, torch.int16, DEVICE)
    assert not made.fits_on_chip(100, 500, torch.int16, DEVICE)  # 28 rows a block beside 27 kB of sums
    assert not made.fits_on_chip(1, 1025, torch.int16, DEVICE)
    assert not kernels_on(cluster=1).fits_on_chip(4, 4, torch.int16, DEVICE)


# One of everything; more than a turn of the block.
@pytest.mark.parametrize("count", [1, 700])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_loss_and_stats(whole, count, spoilt):
    check_loss_and_stats(whole, DEVICE, count, spoilt)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulator runs threads in either order")
def test_no_result_depends_on_the_order_of_threads(kernels, monkeypatch):  # noqa: F811
    # One cut octet, and rows that are aligned all the same; in two chunks, so that every stage of rows is used again.
    n = 1028
    monkeypatch.setattr(launch_sinkhorn, "pass_rows", lambda m, shape, device: 16)
    s, col = made_scores(23, n), one(n)
    outcomes = []
    for backwards in (False, True):
        emulated.run_threads_backwards(backwards)
        try:
            row, shift, sums, c = one(23), empty(n), empty(n), empty(n)
            kernels.column_lse(s, 20.0, row, shift, sums, accumulate=False)
            kernels.sinkhorn_pass(s, 20.0, row, col, c, accumulate=False)
            square = s[:, :23].contiguous()
            outcomes.append([shift, sums, *row, c, kernels.symmetrize_(square), square, *kernels.normalize(s)[:2]])
            if kernels.fits_on_chip(23, 92, torch.float32, DEVICE):
                small = kernels.sinkhorn(s[:, :92].contiguous(), 20.0, one(23), 3)
                outcomes[-1] += [*small[0], small[1]]
            wide = kernels_on(cluster=4).sinkhorn(s[:, :692].contiguous(), 20.0, one(23), 3)
            outcomes[-1] += [*wide[0], wide[1]]
        finally:
            emulated.run_threads_backwards(False)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    expected = torch.softmax(s.double() * 20 / LOG2_E, 1).sum(0)
    assert_close(outcomes[0][4], expected, 5e-6)


def test_a_launch_that_fails_names_the_kernel_and_its_configuration(monkeypatch):
    made = kernels_on(shared_bytes=1 << 30)
    s = made_scores(4, 8192).to(DEVICE)
    with pytest.raises(
        RuntimeError, match=r"sinkhorn_pass_kernel<float32> with .* blocks of 1024 threads, .*: invalid"
    ):
        monkeypatch.setattr("bam_kernels.backends.cuda.shapes.OWNED", 8)
        monkeypatch.setattr("bam_kernels.backends.cuda.shapes.MOST_THREADS", 1024)
        made.sinkhorn_pass(s, 1.0, one(4), one(8192), empty(8192), accumulate=False)
