"""Peak memory: the budget is obeyed, and what is beyond it is small."""

import sys
from types import SimpleNamespace

import pytest
import torch
from memory import peak_bytes
from problems import needs_cpu_kernels

from bam_kernels.engine import plan
from bam_kernels.engine.scores import SourceScores

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]


def test_budget_is_obeyed():
    B, D = 2560, 64
    M = N = 2 * B
    scores, embeddings = 4 * M * N, 4 * M * D
    for budget in (scores, scores // 8):
        # Unit rows, centred keys and gradients; the kernels' partial sums and the product library's own buffers.
        most = budget + 7 * embeddings + (10 << 20)
        peak = peak_bytes(B, D, memory_budget=budget, at_most=most)
        assert peak <= most, (peak, budget)


@pytest.mark.slow
def test_peak_beyond_the_slab_is_a_tenth_of_the_eager_reference():
    # M = 2048 rows against N = 8192 keys: 8 views of a teacher.
    shape = {"B": 1024, "D": 64, "R": 8, "key_views": 8, "target_views": 2, "target_rows": "student"}
    slab = 4 * 2048 * 8192
    eager = peak_bytes(**shape, by_reference=True)
    ours = peak_bytes(**shape, memory_budget=slab, at_most=slab + 0.1 * eager)
    assert ours - slab <= 0.1 * eager, (ours, eager)


@pytest.mark.parametrize(
    ("columns", "l2_bytes", "rows"),
    [(8192, 50 << 20, 1024), (16384, 50 << 20, 512), (8192, 40 << 20, 768), (65536, 50 << 20, 1024)],
)
def test_products_are_read_where_they_were_left_if_that_holds_enough_rows(monkeypatch, columns, l2_bytes, rows):
    device = SimpleNamespace(L2_cache_size=l2_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert plan.product_rows(columns, torch.device("cuda")) == rows
    assert plan.product_rows(columns, torch.device("cpu")) == plan.PRODUCT_ROWS


@pytest.mark.parametrize(
    ("rows", "l2_bytes", "slab"),
    [
        (2048, 25 << 20, 512),  # four slabs of the 512 rows that fit
        (2048, 30 << 20, 512),  # 640 rows would fit: four equal slabs, not three and one of 128 rows
        (2049, 25 << 20, 512),  # a row too many for four: products compute whole tiles of 128 rows
        (96, 50 << 20, 96),  # one slab
    ],
)
def test_slabs_of_products_are_even(monkeypatch, rows, l2_bytes, slab):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=l2_bytes))
    plan._plan_within.cache_clear()
    made = plan.plan_slabs(
        "test",
        rows=rows,
        images=rows,
        columns=8192,
        target_views=1,
        source_views=1,
        shared=False,
        sixteen_bit=True,
        ranks=16,
        regather=False,
        budget=1 << 40,
        device=torch.device("cuda"),
    )
    plan._plan_within.cache_clear()
    assert (made.product_rows, made.sweep_rows) == (slab, slab)


@pytest.mark.parametrize(
    ("rows", "slab", "portions"),
    [
        (2048, 512, [1024, 1536, 2048]),  # whole slabs, spread over three all-reduces
        (2048, 2048, [2048, 2048, 2048]),  # one slab, with the first
        (10, 0, [4, 8, 10]),  # float32: no slabs, so three portions
    ],
)
def test_source_scores_are_computed_in_whole_slabs(rows, slab, portions):
    class Recorded:
        layout, dtype, sizes = SimpleNamespace(N=1), torch.float32, []

        def make(self, unit, first, into):
            assert len(unit) == len(into)
            into.fill_(1)
            self.sizes.append(len(unit))

    recorded = Recorded()
    source = SourceScores(torch.empty(rows, 1), recorded, SimpleNamespace(product_rows=slab), 3)
    source.kept.zero_()
    done = []
    for _ in range(3):
        source.next_portion()
        done.append(int(source.kept.sum()))
    assert done == portions and set(recorded.sizes[:-1]) <= {slab or 4}
    assert source.finish().all()
