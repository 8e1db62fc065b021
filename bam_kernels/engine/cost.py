"""Seconds of one step on paper, by engine, and the choice between engines. Letters are those of layout.py."""

import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..layout import Layout
from ..tuned import tuning
from .plan import FLASH_FEATURES, SlabPlan, plan_slabs

FLOAT_BYTES, HALF_BYTES = 4, 2
FLASH_OUT = 256  # features of a gradient that a flash program holds; for more it makes the scores again
# A forecast is no measurement: where the scores can be kept, the flash engine must promise to be this much faster.
KEPT_MARGIN = 1.5
# What products of float32 reach of those of 16 bit on GPUs with tensor cores, by torch's precision.
FLOAT32_SHARE = {"highest": 1 / 15, "high": 1 / 2, "medium": 1 / 2}


@dataclass(frozen=True)
class Rates:
    """What one rank's machine does in a second: flops of the library's matrix products, of products inside the flash
    kernels, bytes to and from memory, exponentials, bytes sent to another rank; and the seconds that a message takes
    however short it is. Products are of 16 bit where the machine has them."""

    product_flops: float
    flash_flops: float
    memory_bytes: float
    exponentials: float
    link_bytes: float
    latency_s: float

    def float32(self, flag: str) -> "Rates":
        """With products of float32, by torch's precision of them: highest, high or medium."""
        share = FLOAT32_SHARE[flag]
        return replace(self, product_flops=self.product_flops * share, flash_flops=self.flash_flops * share)


H200 = Rates(
    product_flops=790e12,
    flash_flops=400e12,
    memory_bytes=4.3e12,
    exponentials=4.18e12,
    link_bytes=350e9,
    latency_s=5e-6,
)
"""Stated, not measured here: one 400 Gb/s adapter per GPU; half the library's rate inside the flash kernels."""


def rates() -> Rates:
    """Those that were measured on this machine's GPU, or H200's; links as stated."""
    return replace(H200, **tuning().rates)


@dataclass(frozen=True)
class Problem:
    """What one rank computes.

    shared: the Sinkhorn problem's rows are the student's; scatters: there are key gradients.
    """

    layout: Layout
    shared: bool
    iterations: int
    needs_grad: bool
    scatters: bool
    sixteen_bit: bool
    regather: bool

    @property
    def rows(self) -> int:
        return self.layout.M if self.shared else self.layout.R * self.layout.B

    @property
    def key_bytes(self) -> int:
        return HALF_BYTES if self.sixteen_bit else FLOAT_BYTES

    @property
    def targets(self) -> int:
        """Rows that give targets."""
        return self.layout.L * self.layout.B


def slab_seconds(x: Problem, slabs: SlabPlan, rates: Rates) -> dict[str, float]:
    """By purpose, none beside another."""
    layout = x.layout
    product = 2 * layout.N * layout.D / rates.product_flops  # of one row
    sweeps = 1 if slabs.cached else x.iterations + (0 if x.shared else 1)
    source_rows = layout.M if not x.shared or not slabs.cached else 0
    contracted = layout.M * (2 if x.scatters else 1) if x.needs_grad else 0
    if x.scatters and layout.W == 1:
        contracted = layout.M  # G + Gᵀ makes one product of two
    score_bytes = HALF_BYTES if x.sixteen_bit else FLOAT_BYTES
    reads = (x.iterations * x.rows + (0 if x.shared else x.targets) + layout.M) * layout.N
    writes = layout.M * layout.N * x.needs_grad
    exponentials = ((x.iterations + 1) * x.rows + layout.M) * layout.N
    return {
        "target products": sweeps * x.rows * product,
        "source products": source_rows * product,
        "passes": max((reads + writes) * score_bytes / rates.memory_bytes, exponentials / rates.exponentials),
        "gradient products": contracted * product,
    } | _message_seconds(x, rates)


def flash_seconds(x: Problem, rates: Rates) -> dict[str, float]:
    """By purpose. A kernel takes as long as the slower of its products and its exponentials."""
    layout = x.layout
    terms = layout.B * sum(len(layout.target_terms(v)) for v in range(layout.V))
    slices = -(-layout.D // FLASH_OUT) if x.needs_grad else 1

    def seconds(score_rows: float, contracted_rows: float = 0.0) -> float:
        flops = 2 * layout.N * layout.D * (score_rows + contracted_rows)
        return max(flops / rates.flash_flops, score_rows * layout.N / rates.exponentials)

    sweeps = 2 * x.iterations - 1  # a row sum must be finished before columns can be added
    keys = slices * (layout.M + x.targets)
    return {
        "sinkhorn": seconds(sweeps * x.rows + x.targets),
        "match": seconds(layout.M + slices * (terms + layout.M), layout.M * x.needs_grad),
        "key gradients": seconds(keys, layout.M) if x.scatters else 0.0,
    } | _message_seconds(x, rates)


def _message_seconds(x: Problem, rates: Rates) -> dict[str, float]:
    layout = x.layout
    ring = layout.W - 1
    block = layout.T * layout.B * layout.D
    gathers = 1 + (x.regather and x.needs_grad)
    column_bytes = FLOAT_BYTES * (x.iterations + 1) * layout.N
    hops = 2 * (layout.W - 1).bit_length()
    return {
        "gather": gathers * ring * (block * x.key_bytes / rates.link_bytes + rates.latency_s),
        "column sums": 2 * ring / layout.W * column_bytes / rates.link_bytes + x.iterations * hops * rates.latency_s,
        "scatter": ring * (block * FLOAT_BYTES / rates.link_bytes + rates.latency_s) if x.scatters else 0.0,
    }


def flash_supports(layout: Layout, top_k: int, regather: bool) -> bool:
    """Whether the flash engine computes such a problem."""
    return layout.D <= FLASH_FEATURES and not top_k and not (regather and layout.W > 1)


def choose_engine(x: Problem, top_k: int, budget: int | None, device: torch.device, rates: Rates) -> str:
    """The engine that takes less time at these rates: "slab" or "flash"; every rank's the same.

    budget: bytes for scores; None: on one rank a share of what is free, on several as much as is needed, because ranks
    may have different memory free.
    """
    layout = x.layout
    if not flash_supports(layout, top_k, x.regather):
        return "slab"
    if budget is None and layout.W > 1:
        budget = sys.maxsize
    try:
        slabs = slabs_of("", x, budget, device)
    except ValueError:  # the scores of one image do not fit
        return "flash"
    return _faster_engine(x, slabs, rates)


@lru_cache
def _faster_engine(x: Problem, slabs: SlabPlan, rates: Rates) -> str:
    margin = KEPT_MARGIN if slabs.cached else 1.0
    flash, slab = (sum(s.values()) for s in (flash_seconds(x, rates), slab_seconds(x, slabs, rates)))
    return "flash" if margin * flash < slab else "slab"


def slabs_of(name: str, x: Problem, budget: int | None, device: torch.device) -> SlabPlan:
    """The slab engine's plan of a whole step. Raises: ValueError as `plan_slabs`."""
    layout = x.layout
    return plan_slabs(
        name,
        rows=x.rows,
        images=layout.B,
        columns=layout.N,
        target_views=layout.L,
        source_views=layout.V,
        shared=x.shared,
        sixteen_bit=x.sixteen_bit,
        ranks=layout.W,
        regather=x.regather,
        budget=budget,
        device=device,
    )
