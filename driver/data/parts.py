"""Training and held-out part of a source: by the names of folders or shards, or by a split of the labelled images."""

import torch
from torch import Generator, Tensor

PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Names, in any case, of the folders or shards of each part."""
TEST_NAMES = ("val", "test")
"""Parts that are held out; the first one that stands beside `train` counts, and another is left out."""
SPLIT_SEED = 0


def part_of(name: str) -> str | None:
    """Part that a folder or shard of this name is: `train`, `val` or `test`; None for any other name."""
    return next((part for part, names in PART_NAMES.items() if name.lower() in names), None)


def divide(labels: Tensor, training: int | None, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out images, of which the first `training` images are trained on; None: see `split`.

    labels (n,) int64 of all images. Where the training images are of one class, no image is held out: accuracies would
    mean nothing.
    """
    if training is None:
        return split(labels, held_out)
    train, test = torch.arange(len(labels)).tensor_split([training])
    return train, test if len(labels[train].unique()) > 1 else test[:0]


def split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out images: an equal share of every class, chosen alike in every run.

    With fewer than two classes there is nothing to test, and every image is a training image.
    """
    classes = labels.unique()
    share = held_out if len(classes) > 1 else 0.0
    generator = Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(share * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
