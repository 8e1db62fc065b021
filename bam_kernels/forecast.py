"""Memory, messages and time of one step of the slab engine on W ranks, on paper. Letters are those of layout.py."""

import math
import sys
from dataclasses import dataclass

import torch

from .engine.plan import SlabPlan, plan_slabs
from .engine.slab import LEAST_EPSILON_OF_ONE_SUM
from .header import HEADER_BYTES
from .layout import Layout
from .options import Options

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Rates:
    """What one rank's machine does: a second's flops of matrix products, bytes to and from memory, exponentials, bytes
    sent to another rank; and the seconds that a message takes however short it is."""

    product_flops: float
    memory_bytes: float
    exponentials: float
    link_bytes: float
    latency_s: float


H200 = Rates(product_flops=790e12, memory_bytes=4.3e12, exponentials=4.18e12, link_bytes=350e9, latency_s=5e-6)
"""Stated, not measured here: 16-bit products; links of one 400 Gb/s adapter per GPU."""


@dataclass(frozen=True)
class Message:
    """What each rank gives to one kind of exchange: how many times, and bytes in all."""

    exchange: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """One rank's share. memory: bytes by purpose, beyond its own input; seconds: by purpose, none beside another."""

    layout: Layout
    slabs: SlabPlan
    memory: dict[str, int]
    messages: tuple[Message, ...]
    seconds: dict[str, float]
    teacher: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """With what overlaps: keys arrive behind score products, column sums behind a teacher's source products, key
        gradients leave behind the products that make them."""
        s = self.seconds
        scores, hidden = s["target products"], s["source products"] if self.slabs.source_cached else 0.0
        exposed = s["source products"] - hidden
        return (
            max(scores, s["gather"])
            + exposed
            + max(hidden, s["column sums"])
            + s["passes"]
            + max(s["gradient products"], s["scatter"])
        )

    def __str__(self) -> str:
        x = self.layout
        lines = [f"M={x.M} N={x.N} D={x.D} W={x.W}, scores {'kept' if self.slabs.cached else 'made again'}"]
        lines += [f"  {name:<20}{bytes_ / 1e6:>12.1f} MB" for name, bytes_ in self.memory.items()]
        lines += [f"  {'together':<20}{self.total_bytes / 1e6:>12.1f} MB"]
        lines += [f"  {m.exchange:<20}{m.count:>6} x {m.bytes / max(m.count, 1) / 1e6:.3f} MB" for m in self.messages]
        lines += [f"  {name:<20}{1e3 * seconds:>12.3f} ms" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"  {'step':<20}{1e3 * self.step_s:>12.3f} ms"])


def plan(
    *,
    views: int,
    images: int,
    features: int,
    ranks: int = 1,
    teacher_views: int = 0,
    target_views: int | None = None,
    key_views: int | None = None,
    target_rows: str = "teacher",
    iterations: int = 3,
    epsilon: float = 0.05,
    regather: bool = False,
    memory_budget: int | None = None,
    needs_grad: bool = True,
    int16_scores: bool = False,
    key_bytes: int = FLOAT_BYTES,
    rates: Rates = H200,
) -> Forecast:
    """What one step of `bam_loss` takes on each of `ranks` ranks: memory, messages, and time at the rates given.

    views           V student views of each of `images` images per rank, `features` features
    teacher_views   R, 0: no teacher
    memory_budget   bytes for scores; None: as much as is needed to keep them
    int16_scores    scores kept as 16-bit fixed point, as kernels for GPUs may; the CPU's are float32
    key_bytes       bytes of a key's element between ranks and in memory: 4, or 2 where products are of 16 bit
    rates           of the machine and its links

    Messages follow exactly from the arguments; memory to the allocator's rounding and libraries' own buffers; time is
    a sum of quotients of work and rates, without launch times.
    Raises: ValueError, TypeError as `bam_loss`, and where key_bytes is not 2 or 4.
    """
    options = Options(
        views,
        target_views,
        key_views,
        epsilon=epsilon,
        iterations=iterations,
        target_rows=target_rows,
        memory_budget=memory_budget,
        regather=regather,
    )
    options.check("plan")
    for name, value, least in (
        ("images", images, 1),
        ("features", features, 1),
        ("ranks", ranks, 1),
        ("teacher_views", teacher_views, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"plan: {name} must be an integer of at least {least}, got {value!r}")
    if key_bytes not in (2, 4):
        raise ValueError(f"plan: key_bytes must be 2 or 4, got {key_bytes!r}")
    L, T = options.view_counts("plan", views, teacher_views)
    layout = Layout(B=images, V=views, L=L, T=T, D=features, R=teacher_views, W=ranks)
    shared = not teacher_views or target_rows == "student"
    slabs = plan_slabs(
        "plan",
        rows=layout.M if shared else teacher_views * images,
        images=images,
        columns=layout.N,
        target_views=L,
        source_views=views,
        shared=shared,
        sixteen_bit=int16_scores,
        ranks=ranks,
        regather=regather,
        budget=sys.maxsize if memory_budget is None else memory_budget,
        device=torch.device("cpu"),
    )
    scatters = needs_grad and not teacher_views
    return Forecast(
        layout,
        slabs,
        _memory(layout, slabs, regather, needs_grad, scatters, key_bytes),
        _messages(layout, iterations, epsilon, regather and needs_grad, scatters, key_bytes),
        _seconds(layout, slabs, shared, iterations, regather, needs_grad, scatters, int16_scores, key_bytes, rates),
        bool(teacher_views),
    )


def _memory(
    x: Layout, slabs: SlabPlan, regather: bool, needs_grad: bool, scatters: bool, key_bytes: int
) -> dict[str, int]:
    n = x.T * x.B
    blocks = 3 if x.W > 1 else 0  # one that is used, one that arrives, one that is centred
    whole = slabs.cached and not slabs.slab_rows
    gradient_rows = x.M * needs_grad
    if scatters:
        gradient_rows += (0 if whole else x.N) + (2 * n if x.W > 1 else 0)
    return {
        "unit rows": (x.M + x.R * x.B) * x.D * FLOAT_BYTES,
        "keys": (blocks * n if regather and x.W > 1 else x.N + (blocks - 1) * n if x.W > 1 else x.N) * x.D * key_bytes,
        "scores": slabs.score_bytes,
        "gradient": gradient_rows * x.D * FLOAT_BYTES,
        "potentials": 8 * (x.N + x.M + x.R * x.B) * FLOAT_BYTES,
    }


def _messages(
    x: Layout, iterations: int, epsilon: float, twice: bool, scatters: bool, key_bytes: int
) -> tuple[Message, ...]:
    if x.W == 1:
        return ()
    block, steps = x.T * x.B * x.D, x.W - 1
    maximum = int(epsilon < LEAST_EPSILON_OF_ONE_SUM)
    sums = 2 * FLOAT_BYTES * x.N + (iterations - 1 + maximum) * FLOAT_BYTES * x.N  # the first in float64
    gathers = 2 if twice else 1
    messages = [
        Message("header", 1, HEADER_BYTES),
        Message("key blocks", gathers * steps, gathers * steps * block * key_bytes),
        Message("column sums", iterations + maximum, sums),
    ]
    if scatters:
        messages.append(Message("key gradient blocks", steps, steps * block * FLOAT_BYTES))
    return tuple(messages)


def _seconds(
    x: Layout,
    slabs: SlabPlan,
    shared: bool,
    iterations: int,
    regather: bool,
    needs_grad: bool,
    scatters: bool,
    int16_scores: bool,
    key_bytes: int,
    rates: Rates,
) -> dict[str, float]:
    rows = x.M if shared else x.R * x.B
    product = 2 * x.N * x.D / rates.product_flops  # of one row
    sweeps = 1 if slabs.cached else iterations + (0 if shared else 1)
    source_rows = x.M if not shared or not slabs.cached else 0
    contracted = x.M * (2 if scatters else 1) if needs_grad else 0
    if scatters and x.W == 1:
        contracted = x.M  # G + Gᵀ makes one product of two
    score_bytes = 2 if int16_scores else FLOAT_BYTES
    reads = (iterations * rows + (0 if shared else x.L * x.B) + x.M) * x.N
    writes = x.M * x.N * needs_grad
    exponentials = ((iterations + 1) * rows + x.M) * x.N
    ring = x.W - 1
    block = x.T * x.B * x.D
    passes = max((reads * score_bytes + writes * FLOAT_BYTES) / rates.memory_bytes, exponentials / rates.exponentials)
    column_bytes = FLOAT_BYTES * (iterations + 1) * x.N
    return {
        "target products": sweeps * rows * product,
        "source products": source_rows * product,
        "passes": passes,
        "gradient products": contracted * product,
        "gather": (1 + (regather and needs_grad)) * ring * (block * key_bytes / rates.link_bytes + rates.latency_s),
        "column sums": 2 * ring / x.W * column_bytes / rates.link_bytes
        + iterations * 2 * math.ceil(math.log2(x.W)) * rates.latency_s,
        "scatter": ring * (block * FLOAT_BYTES / rates.link_bytes + rates.latency_s) if scatters else 0.0,
    }
