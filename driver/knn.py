"""k-NN accuracy of a frozen backbone, exact: every test image meets every training image.

python driver/knn.py --backbone.run RUN_DIR
python driver/knn.py --backbone.name vit_small_patch16_224 --backbone.weights FILE --data.root IMAGENET
torchrun --nproc-per-node 8 driver/knn.py ...      features stay on the rank that made them; the same numbers
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from tqdm import tqdm

from driver.config import UserError
from driver.data.labelled import Batches, Labels
from driver.distributed import World
from driver.evaluation.frozen import Backbone, run_script
from driver.evaluation.online import Bank, Vote, knn, share_equal


@dataclass(frozen=True)
class Options:
    """Print the k-NN accuracy of frozen features, by cosine, for several k."""

    backbone: Backbone = field(default_factory=Backbone)
    data: Labels = field(default_factory=Labels)
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote."""
    temperature: float = 0.07
    """Each with weight exp(cosine / temperature)."""


def main(options: Options, world: World) -> dict[int, float]:
    """Accuracy by k. Raises: UserError."""
    if not options.k or min(options.k) < 1 or not options.temperature > 0:
        raise UserError("--k must be at least 1 and --temperature positive")
    frozen = options.backbone.load(world)
    world.start(frozen.device)
    labelled = options.data.load(options.backbone.options(), frozen.size, frozen.device, world)

    def embed(batches: Batches, images: int) -> tuple[Tensor, Tensor]:
        total = -(-images // world.size // options.data.batch_size)
        progress = tqdm(batches, total=total, unit="batch", disable=not world.first)
        features, labels = zip(*((frozen.features(batch), labels) for batch, labels in progress), strict=True)
        return torch.cat(features), torch.cat(labels)

    bank = Bank(*embed(labelled.plain("train"), labelled.training))
    queries, truth = embed(labelled.plain("test"), labelled.tested)
    found = {}
    print(f"{labelled.tested} test images among {labelled.training} training images of {labelled.classes} classes")
    for k in options.k:
        found[k] = share_equal(knn(queries, bank, Vote(k, options.temperature), world), truth, world)
        print(f"{k:5d}-NN {100 * found[k]:6.2f}%")
    return found


if __name__ == "__main__":
    sys.exit(run_script(Options, main))
