"""The comparisons that `compare.py` measures: problems, most informative first, and the kinds of their rows.

A problem of N > 2 * B keys is one rank's share of several. The seconds of each problem are estimates, which decide what
is left out when time is short. Kinds of rows are defined in benchmarks/competitor.py.
"""

from dataclasses import dataclass

from steps import table

# Seconds as an H200 took them, with the kernels in the compilers' caches.
FIRST_S = 7.0  # the first problem, with which libraries start
ROW_S = 0.75  # one row: check, warm-up, repetitions, calls timed by the wall clock
COMPILED_S = 2.5  # more for a problem's compiled rows, which are traced again
TILES_S = 29.0  # more for a row of flash-sinkhorn, which times 44 tiles of two launches
LARGEST_TRUTH = 65536  # most keys with a float64 truth; above it the truth is precision="exact"
SLAB = ("cuda-int16-graph", "triton-int16-graph", "cuda-int16", "triton-int16")
FLASH = ("triton-flash-int16-graph", "triton-flash-int16")
OTHERS = ("gemms-half", "compile-autocast-graph", "compile-autocast", "authors-autocast")
WIDE = (*SLAB, *OTHERS)
NARROW = (*SLAB, *FLASH, *OTHERS)  # 256 features, few enough for the flash engine
LARGEST = ("cuda-int16", "authors-autocast", "cuda-int16-again", "gemms-half", "triton-int16")
FROM_SCORES = (
    *("cuda-int16-graph", "triton-int16-graph", "compile-graph", "cuda-graph", "triton-graph"),
    *("cuda-int16", "triton-int16", "compile", "authors"),
)
FLASH_SINKHORN = ("flash-sinkhorn", "flash-sinkhorn-tf32", "flash-sinkhorn-graph", "flash-sinkhorn-tf32-graph")
FROM_EMBEDDINGS = ("cuda-graph", "triton-graph", "compile-graph", *FLASH_SINKHORN, "cuda", "triton")
# The Triton row runs only under its interpreter.
ON_CPU = ("cpu", "triton-int16", "gemms-half", "compile-autocast", "authors-autocast")


@dataclass(frozen=True)
class Comparison:
    """One problem of shape MxNxD and the kinds of rows that are measured on it.

    part is "whole" for the loss and its gradient, "sinkhorn" for Sinkhorn from given scores, "potentials" for Sinkhorn
    from embeddings.
    """

    shape: str
    views: int
    teacher: bool
    kinds: tuple[str, ...]
    part: str = "whole"

    @property
    def name(self) -> str:
        end = "-teacher" if self.teacher else ""
        return f"{self.shape}{end}" if self.part == "whole" else f"{self.part}-{self.shape}"

    @property
    def compiled(self) -> bool:
        """Whether a row needs torch.compile or another slow compiler."""
        return any(kind.startswith(("compile", "flash-sinkhorn")) for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """Estimated seconds for the problem, its truth and its rows; FIRST_S is not included."""
        _, N, D = map(int, self.shape.split("x"))
        problem_s = 0.5 + 6 * N * D / (524288 * 4096)
        row = ROW_S * (1 + 0.15 * N / LARGEST_TRUTH)
        tiles = TILES_S * sum(kind in ("flash-sinkhorn", "flash-sinkhorn-tf32") for kind in self.kinds)
        return problem_s + len(self.kinds) * row + COMPILED_S * self.compiled + tiles


def comparisons(toy: bool) -> list[Comparison]:
    """All comparisons, the most informative first."""
    if toy:
        return toy_comparisons()
    return [
        Comparison("2048x8192x4096", 8, True, WIDE),
        Comparison("2048x8192x256", 8, True, NARROW),
        Comparison("512x512x256", 2, True, NARROW),
        Comparison("2048x65536x1024", 8, True, WIDE),
        Comparison("2048x8192x256", 8, False, FROM_SCORES, "sinkhorn"),
        Comparison("2048x524288x4096", 8, True, LARGEST),
        Comparison("2048x8192x1024", 8, True, WIDE),
        Comparison("2048x65536x1024", 8, False, WIDE),
        Comparison("2048x8192x4096", 8, False, WIDE),
        Comparison("2048x8192x256", 8, False, NARROW),
        Comparison("512x512x256", 2, False, NARROW),
        Comparison("2048x8192x256", 8, False, FROM_EMBEDDINGS, "potentials"),
    ]


def toy_comparisons() -> list[Comparison]:
    return [
        Comparison("32x64x16", 4, True, ON_CPU),
        Comparison("16x16x16", 2, False, tuple(kind for kind in ON_CPU if kind != "compile-autocast")),
        Comparison("16x32x16", 2, False, ("cpu", "eager"), "sinkhorn"),
        Comparison("16x32x16", 2, False, ("cpu", "eager"), "potentials"),
    ]


def slow_kinds(comparison: Comparison) -> list[str]:
    """The kinds of rows that compile something: torch.compile, Triton, flash-sinkhorn; a graph replays another row."""
    kinds = dict.fromkeys(kind.removesuffix("-graph") for kind in comparison.kinds)
    return [kind for kind in kinds if kind.startswith(("compile", "triton", "flash-sinkhorn"))]


def seconds_table(listed: list[Comparison]) -> str:
    """Table of the estimated seconds of each problem and their running sum."""
    rows, total = [], FIRST_S
    for comparison in listed:
        total += comparison.seconds
        rows.append([comparison.name, str(len(comparison.kinds)), f"{comparison.seconds:.0f}", f"{total:.0f}", ""])
    return table(["problem", "rows", "seconds", "in all", ""], rows)
