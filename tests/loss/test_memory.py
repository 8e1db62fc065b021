"""Peak memory: the budget is obeyed, and what is beyond it is small."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from memory import peak_bytes
from problems import needs_cpu_kernels

from bam_kernels import bam_loss
from bam_kernels.engine import memory as engine_memory
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
        def __init__(self):
            self.sizes = []

        def empty(self, rows):
            return torch.empty(rows, 1)

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


def flags_of_mapping(address: int) -> list[str]:
    """Flags of the mapping of memory that holds an address, e.g. hg for one with huge pages wherever possible."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_huge_pages_are_asked_for():
    x = torch.empty(engine_memory.LEAST_HUGE_BYTES, dtype=torch.uint8)
    middle = x.data_ptr() + len(x) // 2
    assert "hg" not in flags_of_mapping(middle)
    assert engine_memory.use_huge_pages(x) is x
    assert "hg" in flags_of_mapping(middle)


def test_large_scores_are_in_huge_pages(monkeypatch):
    """The engine's scores at the first two calls, and the workspace of the repeated call; small ones are not."""
    asked = []
    monkeypatch.setattr(engine_memory._C, "use_huge_pages", lambda address, size: asked.append(size))
    for B, sizes in ((1500, [4 * 3000**2, 4 * 3000**2]), (64, [])):
        asked.clear()
        for _ in range(3):
            bam_loss(torch.randn(2 * B, 4), views=2)
        assert asked[:2] == sizes
        assert len(asked) == 3 if sizes else not asked
