"""Draw the README's picture, docs/images/speed.png, from the benchmarks' result files alone.

python docs/images/speed.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
OURS, OTHERS = "#1f5fa8", "#b0b0b0"


@dataclass(frozen=True)
class Panel:
    """One problem of one result file, with the label of each kind of row that is drawn."""

    title: str
    file: str
    problem: dict[str, object]
    labels: dict[str, str]

    def milliseconds(self) -> dict[str, float]:
        """Median time by label, in the order of `labels`."""
        rows = json.loads((ROOT / "benchmarks/results" / self.file).read_text())
        times = {r["kind"]: r["median_ms"] for r in rows if all(r[key] == want for key, want in self.problem.items())}
        return {label: times[kind] for kind, label in self.labels.items()}


CPU = Panel(
    "Two CPU cores, float32: 2048 x 8192 x 256",
    "cpu_loss.json",
    {"part": "whole", "M": 2048, "N": 8192, "D": 256},
    {"cpu": "bam_kernels", "compile": "torch.compile", "authors": "authors' code", "eager": "PyTorch, eager"},
)
H200 = Panel(
    "One H200, fp16, teacher: 2048 x 65536 x 1024",
    "h200-2026-11-27/loss.json",
    {"part": "whole, teacher", "M": 2048, "N": 65536, "D": 1024},
    {
        "cuda-int16-graph": "bam_kernels, CUDA",
        "triton-int16-graph": "bam_kernels, Triton",
        "compile-autocast-graph": "torch.compile",
        "authors-autocast": "authors' code, eager",
    },
)


def draw(axis: Axes, panel: Panel) -> None:
    times = panel.milliseconds()
    colours = [OURS if label.startswith("bam_kernels") else OTHERS for label in times]
    bars = axis.barh(list(times), list(times.values()), color=colours)
    axis.bar_label(bars, [f"{time:.0f} ms" if time >= 100 else f"{time:.1f} ms" for time in times.values()], padding=4)
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlim(0, 1.2 * max(times.values()))
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def picture(path: Path) -> None:
    figure = Figure(figsize=(10.5, 2.3), layout="constrained")
    for axis, panel in zip(figure.subplots(1, 2), (CPU, H200), strict=True):
        draw(axis, panel)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    picture(Path(__file__).with_suffix(".png"))
