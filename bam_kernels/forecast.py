"""Forecast of memory, messages and time of one step on W ranks, from formulas alone.

layout.py defines the dimension letters.
"""

import sys
from dataclasses import dataclass

import torch

from .backends.triton.tiles import flash_tile, split
from .engine.cost import (
    FLOAT_BYTES,
    H200,
    Problem,
    Rates,
    choose_way,
    flash_seconds,
    flash_supports,
    slab_seconds,
    slabs_of,
)
from .engine.plan import SlabPlan
from .engine.rows import sent_columns
from .header import HEADER_BYTES
from .layout import Layout
from .options import Options
from .precision import LEAST_EPSILON_OF_ONE_SUM
from .ways import WAYS, of_backend


@dataclass(frozen=True)
class Message:
    """One kind of exchange: how often each rank passes a tensor to it, and the bytes of these tensors in all."""

    exchange: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """Forecast of one step for one rank.

    memory: bytes by purpose, without the rank's input. seconds: by purpose, each as if nothing overlapped.
    slabs: how the slab engine holds the scores; None for the flash engine, which holds none.
    """

    layout: Layout
    engine: str
    slabs: SlabPlan | None
    memory: dict[str, int]
    messages: tuple[Message, ...]
    seconds: dict[str, float]

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of the step, with the overlaps of the slab engine.

        - The gather of keys overlaps with score products.
        - The all-reduce of column sums overlaps with source products, if there is a teacher.
        - The scatter of key gradients overlaps with the products that make them.
        """
        s = self.seconds
        if self.slabs is None:
            return sum(s.values())
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
        storage = "none held" if self.slabs is None else "kept" if self.slabs.cached else "made again"
        lines = [f"M={x.M} N={x.N} D={x.D} W={x.W}, {self.engine} engine, scores {storage}"]
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
    top_k: int = 0,
    regather: bool = False,
    memory_budget: int | None = None,
    needs_grad: bool = True,
    sixteen_bit: bool = False,
    engine: str = "slab",
    rates: Rates = H200,
) -> Forecast:
    """Forecast memory, messages and time of one step of `bam_loss` on each of `ranks` ranks. Nothing is run.

    views           V, student views of each image
    images          B, images per rank
    features        D, features of an embedding
    ranks           W
    teacher_views   R; 0: no teacher
    target_views, key_views, target_rows, iterations, epsilon, top_k, regather: as in `bam_loss`
    memory_budget   bytes for scores; None: as many as are needed to keep them
    needs_grad      with the gradient
    sixteen_bit     True: fp16 rows and keys, 16-bit fixed-point scores, as on GPUs for 16-bit input; False: all in
                    float32, as on the CPU
    engine          slab | flash | auto: the engine that takes less time at these rates, as backend="triton" chooses
    rates           speed of the machine and its links

    Messages are exact. Memory is exact up to the allocator's rounding and buffers inside libraries. Time is work
    divided by rates, without launch times.
    Raises: ValueError, TypeError as `bam_loss`.
    """
    options = Options(
        views,
        target_views,
        key_views,
        epsilon=epsilon,
        iterations=iterations,
        top_k=top_k,
        target_rows=target_rows,
        memory_budget=memory_budget,
        regather=regather,
        engine=engine,
    ).checked("plan")
    for name, value, least in (
        ("images", images, 1),
        ("features", features, 1),
        ("ranks", ranks, 1),
        ("teacher_views", teacher_views, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"plan: {name} must be an integer of at least {least}, got {value!r}")
    L, T = options.view_counts("plan", views, teacher_views)
    layout = Layout(B=images, V=views, L=L, T=T, D=features, R=teacher_views, W=ranks)
    shared = not teacher_views or target_rows == "student"
    x = Problem(layout, shared, iterations, needs_grad, needs_grad and not teacher_views, sixteen_bit, regather)
    budget, cpu = sys.maxsize if memory_budget is None else memory_budget, torch.device("cpu")
    if engine == "auto":
        engine = WAYS[choose_way(x, of_backend("triton", "auto"), top_k, budget, cpu, rates)].engine
    messages = _messages(x, epsilon, engine)
    if engine == "flash":
        if not flash_supports(layout, top_k, regather):
            raise ValueError(f'plan: engine="flash" cannot compute D={features}, {top_k=}, {regather=}')
        return Forecast(layout, engine, None, _flash_memory(x), messages, flash_seconds(x, rates))
    slabs = slabs_of("plan", x, budget, cpu)
    return Forecast(layout, engine, slabs, _slab_memory(x, slabs), messages, slab_seconds(x, slabs, rates))


def _common_memory(x: Problem) -> dict[str, int]:
    layout = x.layout
    n = layout.T * layout.B
    if x.sixteen_bit:  # received where they stay; one rank's keys are a view of the rows
        keys = layout.N * sent_columns(layout.D, True) if layout.W > 1 else 0
    else:
        arriving = 2 * n if layout.W > 1 else 0  # one block in use and one arriving
        keys = ((n if x.regather and layout.W > 1 else layout.N) + arriving) * layout.D
    return {
        "unit rows": (layout.M + layout.R * layout.B) * layout.D * x.key_bytes,
        "keys": keys * x.key_bytes,
        "potentials": 8 * (layout.N + layout.M + layout.R * layout.B) * FLOAT_BYTES,
    }


def _slab_memory(x: Problem, slabs: SlabPlan) -> dict[str, int]:
    layout = x.layout
    whole = slabs.cached and not slabs.slab_rows
    gradient_rows = layout.M * x.needs_grad
    if x.scatters:
        gradient_rows += (0 if whole else layout.N) + (2 * layout.T * layout.B if layout.W > 1 else 0)
    gradient = gradient_rows * layout.D * FLOAT_BYTES
    return _common_memory(x) | {"scores": slabs.score_bytes, "gradient": gradient}


def _flash_memory(x: Problem) -> dict[str, int]:
    layout = x.layout
    rows = layout.M * _partials(layout.B, layout.N, layout.V, x) if x.needs_grad else 0
    centred_rows = 0
    if x.scatters:
        rows += layout.N * _partials(layout.N, layout.B, 1, x)
        centred_rows = 0 if x.sixteen_bit else layout.M
    return _common_memory(x) | {"gradient": (rows + centred_rows) * FLOAT_BYTES * layout.D}


def _partials(own: int, others: int, times: int, x: Problem) -> int:
    """Buffers for a gradient's sum: one per chunk of the rows summed over, and one for the total if chunks > 1."""
    tile = flash_tile(own, others, x.layout.D, wide=True, sixteen_bit=x.sixteen_bit)
    tiles = -(-own // tile.block_m) * -(-x.layout.D // tile.block_out) * times
    chunks, _ = split(tiles, others, tile.block_n)
    return chunks + (chunks > 1)


def _messages(x: Problem, epsilon: float, engine: str) -> tuple[Message, ...]:
    layout = x.layout
    if layout.W == 1:
        return ()
    n, steps = layout.T * layout.B, layout.W - 1
    key_block = n * sent_columns(layout.D, x.sixteen_bit) * x.key_bytes
    maximum = int(epsilon < LEAST_EPSILON_OF_ONE_SUM)
    gathers = 1 + (x.regather and x.needs_grad)
    # The first all-reduce of column sums is in float64.
    column_sums = 2 * FLOAT_BYTES * layout.N + (x.iterations - 1 + maximum) * FLOAT_BYTES * layout.N
    messages = [
        Message("header", 1, HEADER_BYTES),
        Message("key blocks", gathers * steps, gathers * steps * key_block),
        Message("column sums", x.iterations + maximum, column_sums),
    ]
    if x.sixteen_bit:
        messages.append(Message("centre", 1, FLOAT_BYTES * layout.D))
    if x.scatters:
        sums = n * (x.sixteen_bit and engine == "slab")  # of the score gradient's columns
        messages.append(Message("key gradient blocks", steps, steps * (n * layout.D + sums) * FLOAT_BYTES))
    return tuple(messages)
