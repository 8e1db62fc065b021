"""Training and held-out part of a source: by the names of folders or shards, or by a split of the labelled images."""

import torch
from torch import Generator, Tensor

TEST_NAMES = ("val", "test")
"""Names of held-out folders or shards that stand beside `train`; the first name that is there counts."""
SPLIT_SEED = 0


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
