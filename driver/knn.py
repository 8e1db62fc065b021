"""k-NN accuracy of a frozen backbone, exact: every test image is compared with every training image.

python driver/knn.py --backbone.run RUN_DIR
python driver/knn.py --backbone.name vit_small_patch16_224 --backbone.weights FILE --data.root IMAGENET
torchrun --nproc-per-node 8 driver/knn.py ...      each rank embeds its share; the numbers are those of one rank
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import driver  # noqa: F401 - it sets a variable that torch reads when it is imported

import torch
from torch import Tensor
from tqdm import tqdm

from driver.bounds import TEMPERATURE, at_least, each
from driver.cli import run_script
from driver.config import helpful
from driver.data.images import Batches
from driver.data.labelled import Labels
from driver.distributed import World
from driver.evaluation.frozen import Backbone
from driver.evaluation.online import Bank, Vote, knn, share_equal


@helpful
@dataclass(frozen=True)
class Options:
    """Print the k-NN accuracy of frozen features, by cosine, for several k."""

    backbone: Backbone = field(default_factory=Backbone)
    data: Labels = field(default_factory=Labels)
    k: Annotated[tuple[int, ...], each(at_least(1))] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; one accuracy is printed for each."""
    temperature: Annotated[float, TEMPERATURE] = 0.07
    """Temperature of the votes: a neighbour's vote has the weight exp(cosine / temperature)."""


def main(options: Options, world: World) -> dict[int, float]:
    """Print and return the accuracy for each k. Raises: UserError where the options do not fit."""
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
    accuracy = {}
    print(f"{labelled.tested} test images among {labelled.training} training images of {labelled.classes} classes")
    for k in options.k:
        accuracy[k] = share_equal(knn(queries, bank, Vote(k, options.temperature), world), truth, world)
        all_vote = f"  all {labelled.training} training images vote" if k > labelled.training else ""
        print(f"{k:5d}-NN {100 * accuracy[k]:6.2f}%{all_vote}")
    return accuracy


if __name__ == "__main__":
    sys.exit(run_script(Options, main))
