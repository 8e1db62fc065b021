"""Forecast seconds of one step by engine, and choose the way to compute it. layout.py defines the dimension letters."""

import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..constant import constant_in_graphs
from ..layout import Layout
from ..tuned import Tuning, tuning
from ..ways import WAYS, Way
from .plan import FLASH_FEATURES, SlabPlan, plan_slabs
from .rows import sent_columns

FLOAT_BYTES, HALF_BYTES = 4, 2
FLASH_OUT = 256  # features of a gradient that a flash program holds; scores are computed again for every further 256
# A forecast is not a measurement: if the scores can be kept, flash is chosen only if forecast to be this much faster.
KEPT_MARGIN = 1.5
# Speed of float32 products as a share of 16-bit products, on GPUs with tensor cores, by torch's matmul precision.
FLOAT32_SHARE = {"highest": 1 / 15, "high": 1 / 2, "medium": 1 / 2}


@dataclass(frozen=True)
class Rates:
    """Speed of one rank's machine, per second.

    product_flops   flop of matrix products of the library, 16-bit if the machine has them
    flash_flops     flop of products inside the flash kernels, 16-bit if the machine has them
    memory_bytes    bytes read from and written to memory
    exponentials    exponentials of scores, by Triton's kernels
    link_bytes      bytes sent to another rank
    latency_s       seconds of an empty message
    cuda_exponentials   exponentials of scores, by the CUDA row kernels; None: as many as Triton's
    """

    product_flops: float
    flash_flops: float
    memory_bytes: float
    exponentials: float
    link_bytes: float
    latency_s: float
    cuda_exponentials: float | None = None

    def float32(self, flag: str) -> "Rates":
        """Rates with float32 products; flag: torch's matmul precision, highest, high or medium."""
        share = FLOAT32_SHARE[flag]
        return replace(self, product_flops=self.product_flops * share, flash_flops=self.flash_flops * share)

    def of_rows(self, way: str) -> float:
        """Exponentials per second of the row kernels of a way."""
        return self.cuda_exponentials or self.exponentials if way == "cuda" else self.exponentials


H200 = Rates(
    product_flops=690e12,
    flash_flops=110e12,
    memory_bytes=4.2e12,
    exponentials=0.72e12,
    link_bytes=350e9,
    latency_s=5e-6,
    cuda_exponentials=0.97e12,
)
"""Rates measured on H200s: a product of 8192^3, a copy, the column step and two passes of 2048 x 8192 int16 scores;
flash from a whole step of 2048 x 8192 x 256. Links are not measured: one 400 Gb/s adapter per GPU is assumed."""


def rates() -> Rates:
    """Rates measured by a tuning run on this machine's GPU, or the rates of H200; rates of links are H200's."""
    return _rates(tuning())


@lru_cache
def _rates(tuned: Tuning) -> Rates:
    # A file without a rate of the CUDA kernels does not mix this GPU's rates with those of an H200.
    return replace(replace(H200, cuda_exponentials=None), **tuned.rates) if tuned.rates else H200


@dataclass(frozen=True)
class Problem:
    """Problem of one rank, as far as cost depends on it.

    shared: the rows of the Sinkhorn problem are the student's. scatters: key gradients are scattered to the ranks.
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
        """Number of rows that give targets."""
        return self.layout.L * self.layout.B


def slab_seconds(x: Problem, slabs: SlabPlan, rates: Rates, way: str = "triton") -> dict[str, float]:
    """Seconds of the slab engine's step by purpose, each as if nothing overlapped. way: whose row kernels run."""
    layout = x.layout
    product = 2 * layout.N * layout.D / rates.product_flops  # seconds of the product of one row with all keys
    sweeps = 1 if slabs.cached else x.iterations + (0 if x.shared else 1)
    source_rows = layout.M if not x.shared or not slabs.cached else 0
    contracted: float = layout.M * (2 if x.scatters else 1) if x.needs_grad else 0
    if x.scatters and slabs.match_images == layout.B and (layout.W == 1 or not x.sixteen_bit):
        contracted -= layout.T * layout.B / layout.W  # one product with G + Gᵀ replaces two, for this rank's keys
    score_bytes = HALF_BYTES if x.sixteen_bit else FLOAT_BYTES
    reads = (x.iterations * x.rows + (0 if x.shared else x.targets) + layout.M) * layout.N
    writes = layout.M * layout.N * x.needs_grad
    exponentials = ((x.iterations + 1) * x.rows + layout.M) * layout.N
    return {
        "target products": sweeps * x.rows * product,
        "source products": source_rows * product,
        "passes": max((reads + writes) * score_bytes / rates.memory_bytes, exponentials / rates.of_rows(way)),
        "gradient products": contracted * product,
    } | _message_seconds(x, rates)


def flash_seconds(x: Problem, rates: Rates) -> dict[str, float]:
    """Seconds of the flash engine's step by purpose. A kernel takes the longer of its products and exponentials."""
    layout = x.layout
    terms = layout.B * sum(len(layout.target_terms(v)) for v in range(layout.V))
    slices = -(-layout.D // FLASH_OUT) if x.needs_grad else 1

    def seconds(score_rows: float, contracted_rows: float = 0.0) -> float:
        flops = 2 * layout.N * layout.D * (score_rows + contracted_rows)
        return max(flops / rates.flash_flops, score_rows * layout.N / rates.exponentials)

    sweeps = 2 * x.iterations - 1  # row sums must be finished before column sums start, so scores are made twice
    keys = slices * (layout.M + x.targets)
    return {
        "sinkhorn": seconds(sweeps * x.rows + x.targets),
        "match": seconds(layout.M + slices * (terms + layout.M), layout.M * x.needs_grad),
        "key gradients": seconds(keys, layout.M) if x.scatters else 0.0,
    } | _message_seconds(x, rates)


def _message_seconds(x: Problem, rates: Rates) -> dict[str, float]:
    layout = x.layout
    ring = layout.W - 1
    n = layout.T * layout.B
    key_bytes = sent_columns(layout.D, x.sixteen_bit) * x.key_bytes
    gathers = 1 + (x.regather and x.needs_grad)
    column_bytes = FLOAT_BYTES * (x.iterations + 1) * layout.N
    hops = 2 * (layout.W - 1).bit_length()
    return {
        "gather": gathers * ring * (n * key_bytes / rates.link_bytes + rates.latency_s),
        "column sums": 2 * ring / layout.W * column_bytes / rates.link_bytes + x.iterations * hops * rates.latency_s,
        "scatter": ring * (n * layout.D * FLOAT_BYTES / rates.link_bytes + rates.latency_s) if x.scatters else 0.0,
    }


def flash_supports(layout: Layout, top_k: int, regather: bool) -> bool:
    """Whether the flash engine supports a problem."""
    return layout.D <= FLASH_FEATURES and not top_k and not (regather and layout.W > 1)


def choose_way(
    x: Problem, ways: tuple[str, ...], top_k: int, budget: int | None, device: torch.device, rates: Rates
) -> str:
    """Choose the way that is forecast to take the least time. All ranks with equal rates choose the same way.

    budget: bytes for scores. None: on one rank a share of the free memory; on several ranks as much as is needed,
    because ranks may differ in free memory.
    """
    layout = x.layout
    slab_ways = tuple(way for way in ways if WAYS[way].engine == "slab")
    if not slab_ways or "flash" not in ways or not flash_supports(layout, top_k, x.regather):
        return fastest_rows_of(slab_ways or ways, rates)
    if budget is None and layout.W > 1:
        budget = sys.maxsize
    try:
        slabs = slabs_of("", x, budget, device)
    except ValueError:  # the scores of one image do not fit
        return "flash"
    return _fastest(x, slabs, rates, slab_ways)


@lru_cache
def _fastest(x: Problem, slabs: SlabPlan, rates: Rates, slab_ways: tuple[str, ...]) -> str:
    way = fastest_rows_of(slab_ways, rates)
    margin = KEPT_MARGIN if slabs.cached else 1.0
    flash, slab = (sum(s.values()) for s in (flash_seconds(x, rates), slab_seconds(x, slabs, rates, way)))
    return "flash" if margin * flash < slab else way


@constant_in_graphs
def fastest_rows(ways: tuple[str, ...]) -> Way:
    """The way whose row kernels are the fastest on this machine, for work that they alone do."""
    return WAYS[fastest_rows_of(ways, rates())]


def fastest_rows_of(ways: tuple[str, ...], rates: Rates) -> str:
    """The way with the fastest row kernels; the first of those that are equally fast."""
    return max(ways, key=rates.of_rows)


def slabs_of(name: str, x: Problem, budget: int | None, device: torch.device) -> SlabPlan:
    """Slab plan of a whole step. Raises: ValueError as `plan_slabs`."""
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
