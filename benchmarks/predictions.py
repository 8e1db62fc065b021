"""Predicted times of kernels and steps on a GPU, from counts of instructions and bytes, compared with measured rows.

    python benchmarks/predictions.py --results rows.jsonl      # rows that benchmarks/gpu/times.py wrote
    python benchmarks/predictions.py --results after.jsonl --before before.jsonl      # from measure.py --against

The predictions of CUDA kernels and of graphs were written before these kernels had run on a GPU; an H200 had run
earlier forms of them. Those of Triton's kernels, of the host and of walls are older than that, but for the host's of
one rank, which were written when the host began to repeat recorded steps, before a GPU had run it.

- Problems: M = 2048 rows are 8 views of 256 images, and a teacher has as many. N = 8192 and 65,536 keys are one rank's
  share of 16 and 128 ranks; the other ranks are simulated. Problems with M = N have 2 views and one rank.
- Instructions are counted per score and thread, on the hot path of machine code for sm_90a (nvcc 13.0, Triton 3.6).
- A block of 512 threads has a multiprocessor to itself, and all its warps wait at each row's reduction. Expected are
  2.4 to 3 of the 4 instructions that a multiprocessor can start in a clock, and 2 to 3 us to start and end a kernel.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "gpu")]

from rows import Row, read  # noqa: E402
from steps import table  # noqa: E402

from bam_kernels import plan  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors of a GPU, their clock under load, and the rate of a large copy (read and write) in GB/s."""

    multiprocessors: int
    ghz: float
    memory_gbs: float


GPUS = {"H100": Gpu(132, 1.7, 3000), "H200": Gpu(132, 1.7, 4300)}


@dataclass(frozen=True)
class Counts:
    """Cost of one score in a kernel: a thread's instructions, bytes to and from memory, exponentials."""

    instructions: float
    bytes: float
    exponentials: float

    def floors_us(self, shape: str, gpu: Gpu) -> tuple[float, float, float]:
        """Least times in us by instructions (4 warps a clock), by memory, and by exponentials (16 a clock)."""
        M, N = (int(size) for size in shape.split("x")[:2])
        clocks = gpu.multiprocessors * gpu.ghz * 1e3  # clocks of all multiprocessors in one us
        issue, exponentials = self.instructions / (4 * 32 * clocks), self.exponentials / (16 * clocks)
        return M * N * issue, M * N * self.bytes / (gpu.memory_gbs * 1e3), M * N * exponentials


@dataclass(frozen=True)
class Prediction:
    """A predicted range, low to high, of measured rows on an H100.

    A row is compared if its kind, name, backend, shape and teacher are equal and its `how` matches the pattern `how`;
    a pattern can match a row of a warm cache and one of a cold cache. `memory` is the share of the time that shrinks
    with a faster memory. is_peak: the row's peak memory is predicted, not its value.
    """

    kind: str
    name: str
    backend: str
    shape: str
    how: str
    low: float
    high: float
    why: str = ""
    unit: str = "us"
    teacher: bool = False
    memory: float = 0.0
    counts: Counts | None = None
    is_peak: bool = False

    def for_gpu(self, gpu: Gpu) -> "Prediction":
        factor = 1 - self.memory + self.memory * GPUS["H100"].memory_gbs / gpu.memory_gbs
        return replace(self, low=self.low * factor, high=self.high * factor)

    def value(self, row: Row) -> float | None:
        """The predicted quantity in a measured row; None if the row measures something else."""
        fields = ("kind", "name", "backend", "shape", "teacher")
        if any(getattr(self, field) != getattr(row, field) for field in fields) or not fnmatch(row.how, self.how):
            return None
        return row.peak_mb if self.is_peak else row.value


def ceilings(gpu: str) -> Iterator[Prediction]:
    copy = (2750, 3100) if gpu == "H100" else (4000, 4500)
    yield Prediction("ceiling", "copy", "torch", "8192 MB", "*", *copy, unit="GB/s")
    power = "random numbers: power holds the clock down"
    yield Prediction("ceiling", "product fp16", "torch", "8192x8192x8192", "*", 640, 820, power, "TFLOP/s")


COLD, WARM, BOTH = "graph, cold", "graph, warm", "graph, *"
WIDE, SLAB, FEATURES = "2048x8192", "512x8192", "2048x8192x256"
CUDA_EPILOGUE, TRITON_EPILOGUE = Counts(17.1, 6, 1.25), Counts(29.4, 6, 1.13)
CUDA_LSE, TRITON_LSE = Counts(14.3, 2, 1.25), Counts(19, 2, 1.13)
CUDA_QUANTIZE = Counts(7.7, 6, 0)
CUDA_PASS, TRITON_PASS = Counts(10.9, 2, 1), Counts(17.7, 2, 1)
# Each image has 8 source rows, read and written, and 2 target rows, read.
CUDA_MATCH, TRITON_MATCH = Counts(22.5 + 19.5 / 4, 4.5, 1.25), Counts(27 + 45 / 4, 4.5, 1.25)


def kernel(
    name: str, backend: str, shape: str, how: str, low: float, high: float, why: str = "", **more: Any
) -> Prediction:
    return Prediction("kernel", name, backend, shape, how, low, high, why, **more)


def cuda_kernels() -> Iterator[Prediction]:
    twice = "a row holds two kernels: 12-15 the pass, 3-4 the sums of chunks, in one read's latency"
    yield kernel("sinkhorn_pass", "cuda", WIDE, COLD, 17, 21, twice, memory=0.3, counts=CUDA_PASS)
    yield kernel("sinkhorn_pass", "cuda", WIDE, WARM, 15, 19, "33 MB stay in 50 MB of L2", counts=CUDA_PASS)
    chunks = "with 2-3 for merging 12 chunks"
    yield kernel("column_lse", "cuda", WIDE, COLD, 14, 18, chunks, memory=0.3, counts=CUDA_LSE)
    yield kernel("column_lse", "cuda", WIDE, WARM, 13, 16, chunks, counts=CUDA_LSE)
    yield kernel("finish_scores", "cuda", WIDE, BOTH, 34, 40, "100 MB through memory", memory=0.8, counts=CUDA_EPILOGUE)
    merged = "25 MB in L2, 2-3 for merging"
    yield kernel("finish_scores", "cuda", SLAB, WARM, 8.5, 11, merged, counts=CUDA_EPILOGUE)
    yield kernel("quantize", "cuda", SLAB, WARM, 5, 6.5, "25 MB in L2", counts=CUDA_QUANTIZE)
    yield kernel("match", "cuda", WIDE, BOTH, 27, 34, "to 40 where guesses of exponents are poor", counts=CUDA_MATCH)
    yield kernel("half_rows", "cuda", FEATURES, BOTH, 3, 4.5, "one wave of short blocks: latencies")
    wide = "memory 11, instructions 7.7, one conversion to double a feature"
    yield kernel("half_rows", "cuda", "2048x4096", COLD, 11.5, 16, wide, memory=0.5)
    yield kernel("project", "cuda", FEATURES, BOTH, 6, 9, "with half_rows")
    yield kernel("mean_unit_row", "cuda", "512x256", WARM, 5, 7, "norms, then 16 blocks that read rows from L2")
    one_block = (
        "launch 1.5, a read's latency 0.7, reduction and root 0.5; as measured: 3.1 on an H200, with more instructions"
    )
    yield kernel("product_step", "cuda", FEATURES, WARM, 2.2, 3.2, one_block)
    yield kernel("column_sums", "cuda", WIDE, WARM, 2.2, 3.6, "two kernels of one read's latency each")
    cluster = "one cluster of 16 blocks: launch 2.3, three exchanges of sums 2.4, of potentials 1.4, passes 2.2"
    yield kernel("sinkhorn_on_chip", "cuda", "512x512", WARM, 9, 14, cluster)
    measured = "17.7 on an H200 with one barrier more, and half as many loads on their way"
    yield kernel("symmetrize", "cuda", "2048x2048", COLD, 13, 19, measured, memory=0.5)


def triton_kernels() -> Iterator[Prediction]:
    late = "no row is on its way while one is summed: 8 times a read's latency; 3.5-5 for the chunks, no early launch"
    yield kernel("sinkhorn_pass", "triton", WIDE, COLD, 23, 32, late, memory=0.3, counts=TRITON_PASS)
    yield kernel("sinkhorn_pass", "triton", WIDE, WARM, 20, 29, late, counts=TRITON_PASS)
    low = "206 registers: 8 warps a multiprocessor"
    yield kernel("column_lse", "triton", WIDE, COLD, 22, 36, low, memory=0.3, counts=TRITON_LSE)
    yield kernel("column_lse", "triton", WIDE, WARM, 20, 33, low, counts=TRITON_LSE)
    yield kernel("finish_scores", "triton", WIDE, BOTH, 38, 54, low, memory=0.5, counts=TRITON_EPILOGUE)
    yield kernel("finish_scores", "triton", SLAB, WARM, 11, 19, "two waves of programs", counts=TRITON_EPILOGUE)
    waits = "each source row is waited for, 12 barriers a row; to 64 where the first guesses of exponents are poor"
    yield kernel("match", "triton", WIDE, BOTH, 40, 57, waits, memory=0.2, counts=TRITON_MATCH)
    yield kernel("half_rows", "triton", FEATURES, BOTH, 4, 10)
    yield kernel("half_rows", "triton", "2048x4096", COLD, 13, 24, "as CUDA's", memory=0.5)
    yield kernel("project", "triton", FEATURES, BOTH, 8, 20, "with half_rows")
    yield kernel("symmetrize", "triton", "2048x2048", COLD, 8, 18, memory=0.5)


def library() -> Iterator[Prediction]:
    """Predictions of the library's fp16 products with fp16 results, which bound any step from below."""
    yield kernel("product", "torch", FEATURES, BOTH, 10, 22, "34 MB written, a short sum of products", memory=0.5)
    for shape, low, high in (
        ("2048x8192x4096", 530, 645),
        ("2048x8192x256", 34, 70),
        ("512x512x256", 8, 18),
        ("2048x2048x256", 14, 28),
        ("2048x65536x1024", 1100, 1400),
    ):
        for teacher in (True, False):
            why = "640 to 780 TFLOP/s" if "x256" not in shape else "launches and stores"
            yield Prediction("step", "products alone", "torch", shape, "graph", low, high, why, teacher=teacher)


# Device time in us of a step replayed as a graph: shape, teacher, (low, high) of cuda and of triton, reason.
GRAPHS = (
    ("512x512x256", True, (48, 70), (85, 120), "17 launches: products 10, Sinkhorn 13, match 6, small ones 28"),
    ("512x512x256", False, (45, 68), (80, 115), "17 launches"),
    ("2048x2048x256", True, (110, 165), (170, 230), "five launches of Sinkhorn, match 12, four slabs of products"),
    ("2048x2048x256", False, (95, 145), (140, 190), "no second scores, but G + transpose(G)"),
    ("2048x8192x256", True, (250, 340), (400, 540), "products 70, epilogues 65, passes 38, match 34, small ones 80"),
    ("2048x8192x256", False, (310, 430), (470, 620), "key gradients of 16 ranks: 16 x 8"),
    (
        "2048x8192x4096",
        True,
        (860, 1030),
        (1000, 1200),
        "products 560-650, and 45 for the copy of keys, 65 for the gradient's projection, scale and cast",
    ),
    ("2048x8192x4096", False, (1000, 1200), (1100, 1330), "key gradients of 16 ranks: 16 x 17"),
    ("2048x65536x1024", True, (2300, 3000), (2900, 3600), "1.6 GB of products and 0.5 GB of scores through memory"),
    ("2048x65536x1024", False, (3300, 4700), (3800, 5300), "key gradients of 128 ranks: 128 x 12"),
)
# Host time in us of a step: shape, teacher, (low, high) of cuda and of triton, reason.
HOSTS = (
    (
        "512x512x256",
        False,
        (230, 450),
        (330, 650),
        "170 and 220 with kernels that do nothing; 18 a product, 4 a launch",
    ),
    ("512x512x256", True, (230, 450), (330, 650), "a product more, a launch less"),
    ("2048x8192x256", True, (1400, 2400), (1900, 3300), "48 more calls for 16 ranks, eight slabs"),
    ("2048x8192x4096", True, (1400, 2400), (1900, 3300), "as with 256 features"),
    ("2048x65536x1024", True, (4000, 7500), (4500, 8500), "128 ranks at 25 to 40"),
)
# Wall time in us of a step and a synchronisation: the host time and the wait, unless the device takes longer.
WALLS = (
    ("512x512x256", False, (250, 500), (350, 700), "the host decides"),
    ("512x512x256", True, (250, 500), (350, 700), "the host decides"),
    ("2048x8192x256", True, (1450, 2550), (1950, 3450), "the host decides"),
    ("2048x8192x4096", True, (1600, 2700), (2000, 3500), "the host decides, then products"),
    ("2048x65536x1024", True, (5000, 9000), (5500, 10000), "host and device in turn"),
)


def steps() -> Iterator[Prediction]:
    for how, entries in (("graph", GRAPHS), ("host", HOSTS), ("wall", WALLS)):
        for shape, teacher, *ranges, why in entries:
            for backend, (low, high) in zip(("cuda", "triton"), ranges, strict=True):
                share = 0.35 if how == "graph" else 0.0
                fields = "step", "loss and gradient", backend, shape, how, low, high, why
                yield Prediction(*fields, teacher=teacher, memory=share)


def peaks() -> Iterator[Prediction]:
    """Peak memory of steps, from `bam_kernels.plan`.

    It may be 20% less, as the cache's size can ask for a smaller float32 slab, and 30% more, for what the allocator
    and the library keep.
    """
    for shape, teacher, *_ in GRAPHS:
        M, N, D = map(int, shape.split("x"))
        V = 2 if M == N else 8
        images = M // V
        sizes = {"images": images, "features": D, "ranks": N // (2 * images), "teacher_views": V if teacher else 0}
        mb = plan(views=V, **sizes, sixteen_bit=True).total_bytes / 1e6
        for backend in ("cuda", "triton"):
            named = "step", "loss and gradient", backend, shape, "wall", 0.8 * mb, 1.3 * mb
            yield Prediction(*named, f"plan() says {mb:.1f}", "MB", teacher=teacher, is_peak=True)


def predictions(gpu: str) -> list[Prediction]:
    """All predictions, adapted to the named GPU."""
    for_h100: Iterable[Prediction] = (*cuda_kernels(), *triton_kernels(), *library(), *steps(), *peaks())
    return [*ceilings(gpu), *(prediction.for_gpu(GPUS[gpu]) for prediction in for_h100)]


def gpu_of(rows: list[Row]) -> str:
    """The GPU named in the notes of the ceiling rows; H100 if they name no known GPU."""
    notes = " ".join(row.note for row in rows if row.kind == "ceiling")
    return next((name for name in GPUS if name in notes), "H100")


def outcomes(rows: list[Row], gpu: str | None = None) -> list[dict[str, Any]]:
    """One dictionary per prediction, with the measured value and whether it lies within the range (`held`).

    If rows of several `how` match, the last row of each counts and the value furthest from the middle of the range is
    taken, so that `held` is true only if all of them lie within. Without a matching row both are None.
    gpu: one of GPUS; None: the GPU that the rows name.
    """
    results, gpu = [], gpu or gpu_of(rows)
    for p in predictions(gpu):
        values = {row.how: value for row in rows if (value := p.value(row)) is not None}
        middle = (p.low + p.high) / 2
        measured = max(values.values(), key=lambda value, middle=middle: abs(value - middle), default=None)
        floors = p.counts.floors_us(p.shape, GPUS[gpu]) if p.counts is not None else None
        what = " ".join((p.name, p.backend, p.shape, *(["teacher"] if p.teacher else []), p.how.replace("*", "")))
        results.append(
            {
                "prediction": ("peak of " if p.is_peak else "") + what.strip(" ,"),
                "low": p.low,
                "high": p.high,
                "unit": p.unit,
                "floors_us": floors,
                "measured": measured,
                "held": None if measured is None else p.low <= measured <= p.high,
                "why": p.why,
            }
        )
    return results


def outcome_table(results: list[dict[str, Any]], before: list[dict[str, Any]] | None = None) -> str:
    """Table of outcomes; `before`: outcomes of an earlier commit's rows, for a column of what they measured."""
    earlier = {one["prediction"]: one["measured"] for one in before or ()}
    head = ["prediction", *(["before"] if before else []), "low", "high", "measured", "unit", "held"]
    words = {None: "-", True: "yes", False: "NO"}
    lines = []
    for one in results:
        values = [earlier.get(one["prediction"])] if before else []
        values += [one["low"], one["high"], one["measured"]]
        numbers = [f"{x:.4g}" if x is not None else "-" for x in values]
        floors = " / ".join(f"{x:.1f}" for x in one["floors_us"] or ())
        cells = [one["prediction"], *numbers, one["unit"], words[one["held"]], floors, "  " + one["why"]]
        lines.append(cells)
    return table([*head, "issue/memory/exp us", "  why"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="rows.jsonl of times.py (default: print the predictions alone)")
    parser.add_argument("--before", type=Path, help="rows of an earlier commit, for a column of their own")
    parser.add_argument("--gpu", choices=GPUS, help="GPU to predict for (default: the rows' own, else H100)")
    options = parser.parse_args()
    results = outcomes(read(options.results) if options.results is not None else [], options.gpu)
    before = outcomes(read(options.before), options.gpu) if options.before is not None else None
    print(outcome_table(results, before))
    held = [one["held"] for one in results if one["held"] is not None]
    print(f"{sum(held)} of {len(held)} held; {len(results) - len(held)} without a row")
    return 0


if __name__ == "__main__":
    sys.exit(main())
