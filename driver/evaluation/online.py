"""What frozen features are worth: k-NN and linear accuracy on held-out images, spread and effective rank.

Held-out images are classified as they are, and randomly shifted and rotated. Features stay on the rank that made them:
of W ranks each embeds its share of the images; queries visit every rank. The numbers are those of one rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images
from ..data.views_of_digits import HELD_OUT_MOVE, affine
from ..distributed import World
from .probe import LinearProbe, spread

Embed = Callable[[Tensor], Tensor]
PIXEL_SIDE = 32
QUERY_CHUNK = 512
MOVE_SEED = 20240


class Bank(NamedTuple):
    """This rank's features (n, D) of training images, and their labels (n,) int64."""

    features: Tensor
    labels: Tensor


class Vote(NamedTuple):
    """`neighbours` nearest features vote, each with weight exp(cosine / temperature)."""

    neighbours: int
    temperature: float = 0.07


def evaluate(embed: Embed, images: Images, vote: Vote, world: World) -> dict[str, float]:
    """knn, linear, knn_moved and linear_moved, shares of the held-out images that are classified correctly (where there
    is one for every rank), and the `spread` of the training images' features.

    The move has a seed of its own: the same for every network, epoch, device and number of ranks.
    """
    bank = embed_bank(embed, images)
    result = spread(bank.features, world)
    if images.tested < world.size:
        return result
    move = torch.rand(5, images.tested, generator=torch.Generator().manual_seed(MOVE_SEED))
    move = move[:, world.rank :: world.size]
    plain, moved, labels, done = [], [], [], 0
    for batch, batch_labels in images.held_out():
        plain.append(embed(batch))
        moved.append(embed(affine(batch, HELD_OUT_MOVE, move[:, done : done + len(batch)])))
        labels.append(batch_labels)
        done += len(batch)
    probe = LinearProbe(*bank, images.classes, world)
    truth = torch.cat(labels)
    for name, queries in (("", torch.cat(plain)), ("_moved", torch.cat(moved))):
        result["knn" + name] = share_equal(knn(queries, bank, vote, world), truth, world)
        result["linear" + name] = share_equal(probe.classify(queries), truth, world)
    return result


def embed_bank(embed: Embed, images: Images) -> Bank:
    """This rank's share of the training images, as they are."""
    features, labels = zip(*((embed(batch), labels) for batch, labels in images.bank()), strict=True)
    return Bank(torch.cat(features), torch.cat(labels))


def knn(queries: Tensor, bank: Bank, vote: Vote, world: World) -> Tensor:
    """Class (q,) of each of this rank's queries (q, D), by the vote of its nearest features, by cosine, on all ranks.

    Exact: every query meets every rank's features, and the nearest of each rank's nearest are the nearest of all.
    Fewer features than `neighbours`: all of them vote.
    """
    bank = Bank(F.normalize(bank.features, dim=1), bank.labels)
    queries = F.normalize(queries, dim=1)
    found: list[Tensor] = []
    for rank in range(world.size):
        for chunk in world.broadcast(queries, rank).split(QUERY_CHUNK):
            cosine, label = (world.join(part) for part in nearest(chunk, bank, vote.neighbours))
            if rank == world.rank:
                found.append(elected(cosine, label, vote))
    return torch.cat(found) if found else bank.labels[:0]


def nearest(queries: Tensor, bank: Bank, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cosines (q, neighbours), highest first, and labels of the nearest on this rank; -inf where it has fewer."""
    cosine, index = (queries @ bank.features.T).topk(min(neighbours, len(bank.labels)), dim=1)
    missing = neighbours - cosine.shape[1]
    return F.pad(cosine, (0, missing), value=-torch.inf), F.pad(bank.labels[index], (0, missing))


def elected(cosine: Tensor, label: Tensor, vote: Vote) -> Tensor:
    """The class with the largest sum of weights among the `neighbours` highest cosines of each row."""
    cosine, order = cosine.topk(min(vote.neighbours, cosine.shape[1]), dim=1)
    label = label.gather(1, order)
    weight = ((cosine - cosine[:, :1]) / vote.temperature).exp()
    votes = torch.einsum("qj,qij->qi", weight, (label[:, :, None] == label[:, None, :]).to(weight))
    return label.gather(1, votes.argmax(1, keepdim=True))[:, 0]


def share_equal(found: Tensor, truth: Tensor, world: World) -> float:
    """Over all ranks."""
    right, count = world.sum(torch.tensor([int((found == truth).sum()), len(truth)], device=truth.device)).tolist()
    return right / count


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
