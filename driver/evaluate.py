"""k-NN accuracy of features on held-out images: as they are, and randomly shifted and rotated."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .augment import HELD_OUT_MOVE, random_affine
from .data import Images

Embed = Callable[[Tensor], Tensor]
PIXEL_SIDE = 32
VOTE_TEMPERATURE = 0.07
QUERY_CHUNK = 1024
MOVE_SEED = 20240


class Accuracy(NamedTuple):
    """Shares of held-out images that their neighbours classify correctly."""

    plain: float
    moved: float


def evaluate(embed: Embed, images: Images, neighbours: int) -> Accuracy:
    """k-NN of the held-out images among the training images, which stay as they are.

    The move has a seed of its own: the same for every network, epoch and device.
    """
    bank, bank_labels = [], []
    for batch, labels in images.bank():
        bank.append(embed(batch))
        bank_labels.append(labels)
    plain, moved, truth = [], [], []
    generator = Generator().manual_seed(MOVE_SEED)
    for batch, labels in images.held_out():
        plain.append(embed(batch))
        moved.append(embed(random_affine(batch, HELD_OUT_MOVE, generator)))
        truth.append(labels)
    keys, key_labels, labels = torch.cat(bank), torch.cat(bank_labels), torch.cat(truth)
    right = [knn(torch.cat(q), keys, key_labels, neighbours).eq(labels).float().mean() for q in (plain, moved)]
    return Accuracy(*torch.stack(right).tolist())


def knn(queries: Tensor, keys: Tensor, key_labels: Tensor, neighbours: int) -> Tensor:
    """Class (q,) of each query (q, D): a vote of its nearest keys (n, D) by cosine, weight exp(cosine / 0.07).

    key_labels (n,) int64. Fewer keys than `neighbours`: all of them vote.
    """
    keys = F.normalize(keys, dim=1)
    classes = int(key_labels.max()) + 1
    found = []
    for chunk in F.normalize(queries, dim=1).split(QUERY_CHUNK):
        cosine, index = (chunk @ keys.T).topk(min(neighbours, len(keys)), dim=1)
        weight = ((cosine - 1) / VOTE_TEMPERATURE).exp()
        votes = weight.new_zeros(len(chunk), classes).scatter_add_(1, key_labels[index], weight)
        found.append(votes.argmax(1))
    return torch.cat(found)


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features, at most 32 pixels a side."""
    if images.shape[-1] > PIXEL_SIDE:
        images = F.interpolate(images, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
    return images.flatten(1)


def features(backbone: nn.Module) -> Embed:
    """The backbone's features in evaluation mode; its mode is put back after each batch."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        training = backbone.training
        backbone.eval()
        out = backbone(images)
        backbone.train(training)
        return out

    return embed
