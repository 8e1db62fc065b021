"""What `compare.py` measures: problems in the order of what they tell, their rows, and the seconds each should take.

Problems of N > 2 * B keys are one rank's share of several. The numbers of seconds are guesses; they say what to leave
out where time is short. Kinds of rows are those of benchmarks/competitor.py.
"""

from dataclasses import dataclass

from steps import table

ROW_S = 1.5  # check, warm-up, repetitions, calls by the wall
COMPILED_S = 5.0  # more for the first row that is compiled: traced again, its kernels from the caches on disk
LARGEST_TRUTH = 65536  # keys up to which the truth is float64's; beyond it the library's exact mode's
SLAB = ("cuda-int16-graph", "triton-int16-graph", "cuda-int16", "triton-int16")
FLASH = ("triton-flash-int16-graph", "triton-flash-int16")
OTHERS = ("gemms-half", "compile-autocast-graph", "compile-autocast", "authors-autocast")
WIDE = (*SLAB, *OTHERS)
NARROW = (*SLAB, *FLASH, *OTHERS)  # few features, which flash takes
FROM_SCORES = ("cuda-int16", "triton-int16", "cuda", "triton", "compile", "authors")
FROM_EMBEDDINGS = ("cuda", "triton", "compile", "flash-sinkhorn", "flash-sinkhorn-tf32")
ON_CPU = ("cpu", "triton-int16", "gemms-half", "compile-autocast", "authors-autocast")  # Triton's if interpreted


@dataclass(frozen=True)
class Place:
    """One problem, M x N x D, and the kinds of its rows.

    part: whole, the loss and its gradient; or Sinkhorn alone: sinkhorn, from given scores; potentials, from embeddings.
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
        """Whether there are rows of torch.compile or of another slow compiler."""
        return any(kind.startswith(("compile", "flash-sinkhorn")) for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """The problem and its truth, then its rows."""
        _, N, D = map(int, self.shape.split("x"))
        made = 1.5 + 10 * N * D / (524288 * 4096) + 3 * N / LARGEST_TRUTH
        row = ROW_S * (1 + 0.1 * N / LARGEST_TRUTH)
        return made + len(self.kinds) * row + COMPILED_S * self.compiled


def places(toy: bool) -> list[Place]:
    """The most telling first."""
    if toy:
        return toy_places()
    return [
        Place("2048x8192x4096", 8, True, WIDE),
        Place("2048x8192x256", 8, True, NARROW),
        Place("512x512x256", 2, True, NARROW),
        Place("2048x65536x1024", 8, True, WIDE),
        Place("2048x8192x4096", 8, False, WIDE),
        Place("2048x8192x256", 8, False, NARROW),
        Place("512x512x256", 2, False, NARROW),
        Place("2048x8192x256", 8, False, FROM_SCORES, "sinkhorn"),
        Place("2048x8192x256", 8, False, FROM_EMBEDDINGS, "potentials"),
        Place("2048x8192x1024", 8, True, WIDE),
        Place("2048x65536x1024", 8, False, WIDE),
        Place("2048x524288x1024", 8, True, ("cuda-int16", "triton-int16", "gemms-half")),
        Place("2048x524288x4096", 8, True, ("cuda-int16", "triton-int16", "gemms-half")),
    ]


def toy_places() -> list[Place]:
    return [
        Place("32x64x16", 4, True, ON_CPU),
        Place("16x16x16", 2, False, tuple(kind for kind in ON_CPU if kind != "compile-autocast")),
        Place("16x32x16", 2, False, ("cpu", "eager"), "sinkhorn"),
        Place("16x32x16", 2, False, ("cpu", "eager"), "potentials"),
    ]


def predicted(listed: list[Place]) -> str:
    """The seconds that each problem should take, and the sum so far."""
    rows, total = [], 0.0
    for place in listed:
        total += place.seconds
        rows.append([place.name, str(len(place.kinds)), f"{place.seconds:.0f}", f"{total:.0f}", ""])
    return table(["problem", "rows", "seconds", "in all", ""], rows)
