"""The curves of a run as a PNG."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LOSS, TARGET, SOURCE, LIMIT = "#1f5fa8", "#c8553d", "#3c8d5a", "#8a8a8a"


def curves(history: dict[str, list[dict[str, float]]], steps: int, path: Path) -> None:
    """Loss between its floor and its ceiling, entropies, and k-NN accuracy, over epochs of `steps` steps each."""
    log, knn = history["log"], history["knn"]
    figure = Figure(figsize=(12, 4.4) if knn else (8, 4.4), layout="constrained", dpi=130)
    axes = figure.subplots(1, 3 if knn else 2)
    epochs = [entry["step"] / steps for entry in log]

    def column(name: str) -> list[float]:
        return [entry[name] for entry in log]

    axes[0].plot(epochs, column("uniform_loss"), color=LIMIT, ls="--", label="ceiling: collapse, log(N - T)")
    axes[0].plot(epochs, column("loss"), color=LOSS, lw=2, label="loss")
    axes[0].plot(epochs, column("target_entropy"), color=TARGET, ls="--", label="floor: entropy of the target")
    axes[0].set(title="BAM loss", ylabel="nats")

    axes[1].plot(epochs, column("uniform_loss"), color=LIMIT, ls="--", label="uniform attention")
    axes[1].plot(epochs, column("source_entropy"), color=SOURCE, lw=2, label="source (self-attention)")
    axes[1].plot(epochs, column("target_entropy"), color=TARGET, lw=2, label="target (balanced)")
    axes[1].set(title="Entropy of the attention", ylabel="nats")

    if knn:
        pixels = history["pixels"][0]
        at = [entry["epoch"] for entry in knn]
        for key, name, color in (("plain", "as they are", LOSS), ("moved", "shifted and rotated", TARGET)):
            axes[2].plot(at, [100 * entry[key] for entry in knn], "o-", ms=3.5, color=color, label=name, clip_on=False)
            axes[2].axhline(100 * pixels[key], color=color, ls=":", label=f"{name}: raw pixels")
        axes[2].set(title="k-NN on held-out images", ylabel="accuracy, %", ylim=(None, 101))

    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=9, frameon=False)
    figure.savefig(path)
