"""The forecast of one step: memory against what a process takes, work against its formulas, bad input.

Its messages are compared with those of real processes in test_process_groups.py.
"""

import sys
from dataclasses import replace

import pytest
from memory import peak_bytes
from problems import needs_cpu_kernels

from bam_kernels import plan
from bam_kernels.engine.cost import H200, Rates

LIBRARIES = 10 << 20  # buffers of the product library, pages of threads

# One second for each unit of work, so that a forecast's seconds are its work.
UNIT = Rates(product_flops=1, flash_flops=1, memory_bytes=1, exponentials=1e30, link_bytes=1, latency_s=0)


@needs_cpu_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "B,D,R,W,options",
    [
        (2560, 64, 0, 1, {}),
        (2560, 64, 0, 1, {"memory_budget": 10 << 20}),
        (1024, 256, 2, 1, {}),
        (1024, 256, 2, 4, {}),
        (1024, 256, 0, 4, {"memory_budget": 8 << 20}),
    ],
)
def test_memory(B, D, R, W, options):
    forecast = plan(views=2, images=B, features=D, teacher_views=R, ranks=W, **options)
    budget = options.get("memory_budget", 4 << 30)
    most = 1.1 * forecast.total_bytes + LIBRARIES
    measured = peak_bytes(B, D, R, W=W, memory_budget=budget, at_most=most)
    assert 0.75 * forecast.total_bytes <= measured <= most, (measured, str(forecast))


def test_work():
    """M = 12 rows, N = 2*3*4 = 24 keys of 4 ranks, D = 5; a teacher of 2 views has 6 rows."""
    seconds = plan(views=4, images=3, features=5, ranks=4, teacher_views=2, rates=UNIT).seconds
    product = 2 * 24 * 5
    assert seconds["target products"] == 6 * product and seconds["source products"] == 12 * product
    assert seconds["gradient products"] == 12 * product and seconds["scatter"] == 0
    assert seconds["gather"] == 3 * (2 * 3 * 5 * 4)
    # Three passes of the target's rows, once more the six that are targets, the source's read and written.
    assert seconds["passes"] == 4 * 24 * (3 * 6 + 6 + 12 + 12)

    seconds = plan(views=4, images=3, features=5, ranks=4, rates=UNIT).seconds
    assert seconds["target products"] == 12 * product and seconds["source products"] == 0
    # G k and Gᵀ z of 12 rows. The 6 rows that are keys need one product, not two, with these, a quarter of the keys.
    assert seconds["gradient products"] == (2 * 12 - 6 / 4) * product and seconds["scatter"] == 3 * (2 * 3 * 5 * 4)
    one_rank = plan(views=4, images=3, features=5, rates=UNIT)
    assert one_rank.seconds["gradient products"] == (2 * 12 - 6) * 2 * 6 * 5 and one_rank.messages == ()


def test_slabs_are_made_again_in_every_sweep():
    shape = {"views": 4, "images": 3, "features": 5, "ranks": 4, "rates": UNIT}
    kept, again = plan(**shape), plan(**shape, memory_budget=4 * 4 * 24)
    assert again.slabs.cached is False and again.memory["scores"] == 4 * 4 * 24
    assert again.seconds["target products"] == 3 * kept.seconds["target products"]
    assert again.seconds["source products"] == kept.seconds["target products"]
    assert again.seconds["gradient products"] == 2 * kept.seconds["target products"]


def test_a_step_is_at_least_its_longest_part_and_at_most_their_sum():
    for W in (1, 8, 4096):
        for R in (0, 2):
            forecast = plan(views=8, images=256, features=4096, ranks=W, teacher_views=R)
            assert max(forecast.seconds.values()) <= forecast.step_s <= sum(forecast.seconds.values())
            assert "step" in str(forecast)


def test_smaller_types():
    shape = {"views": 2, "images": 8, "features": 16, "ranks": 4, "teacher_views": 2}
    full, half = plan(**shape), plan(**shape, sixteen_bit=True)
    assert half.memory["unit rows"] == full.memory["unit rows"] // 2
    # 64 keys, received where they stay. A key's bias takes 2 columns more, and rows are whole multiples of 16.
    assert half.memory["keys"] == 2 * 64 * 32
    assert half.messages[1].bytes == full.messages[1].bytes // 2 // 16 * 32
    alone = plan(**shape | {"ranks": 1}, sixteen_bit=True)
    assert alone.memory["keys"] == 0  # they are some of the rows
    assert [(m.exchange, m.count, m.bytes) for m in half.messages][-1] == ("centre", 1, 4 * 16)


def test_flash_work():
    """M = 12 rows, N = 24 keys, D = 5, 6 target rows: 2 products an iteration, the first column step one."""
    flash = plan(views=4, images=3, features=5, ranks=4, teacher_views=2, engine="flash", rates=UNIT)
    product = 2 * 24 * 5
    assert flash.seconds["sinkhorn"] == (5 * 6 + 6) * product
    # The source's sums, in the match its scores and those of its targets, views 0 and 1 of one less, and dz.
    assert (
        flash.seconds["match"] == (12 + 12 + 3 * (1 + 1 + 2 + 2) + 12) * product and flash.seconds["key gradients"] == 0
    )
    assert flash.slabs is None and "scores" not in flash.memory and "flash engine, scores none held" in str(flash)
    alone = plan(views=4, images=3, features=5, engine="flash", rates=UNIT)
    assert alone.seconds["key gradients"] == (12 + 6 + 12) * 2 * 6 * 5


def test_flash_memory_is_linear():
    shape = {"views": 2, "features": 256, "teacher_views": 2, "sixteen_bit": True, "engine": "flash"}
    small, large = (plan(images=1024, ranks=W, **shape) for W in (16, 256))
    inputs = 2 * 2 * 256 * (2048 * 2 + large.layout.N)
    assert large.layout.N == 524_288 and large.total_bytes - 2 * inputs <= 64 << 20
    assert large.total_bytes - small.total_bytes == (2 * 272 + 8 * 4) * (large.layout.N - small.layout.N)


def test_the_engine_follows_from_rates_and_budget():
    shape = {"views": 2, "images": 1024, "features": 64, "teacher_views": 2, "engine": "auto", "sixteen_bit": True}
    assert plan(**shape).engine == "slab"
    assert plan(**shape, memory_budget=1000).engine == "flash"  # not one image's scores
    fast = replace(H200, flash_flops=1e18, exponentials=1e18)
    assert plan(**shape, rates=fast).engine == "flash"
    assert plan(**shape | {"features": 513}, rates=fast).engine == "slab"
    assert plan(**shape, top_k=5, rates=fast).engine == "slab"
    assert plan(**shape, regather=True, ranks=2, rates=fast).engine == "slab"


@pytest.mark.parametrize(
    "options,words",
    [
        ({"ranks": 0}, "plan: ranks must be an integer of at least 1, got 0"),
        ({"images": 2.5}, "plan: images must be an integer of at least 1, got 2.5"),
        ({"engine": "fast"}, "plan: engine must be one of auto, slab, flash, got 'fast'"),
        ({"engine": "flash", "features": 600}, 'plan: engine="flash" cannot compute D=600'),
        ({"target_views": 3}, "plan: target_views=3 must be at most views=2"),
        ({"ranks": 2, "regather": True, "memory_budget": 10}, "plan: regather=True keeps all scores"),
        ({"memory_budget": 10}, "plan: memory_budget=10 bytes does not hold the scores of one image"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError) as raised:
        plan(**{"views": 2, "images": 4, "features": 8} | options)
    assert words in str(raised.value)
