"""Evaluation of frozen features during a run: k-NN and linear accuracy on held-out images, spread, effective rank.

Held-out images are classified twice: as they are, and randomly shifted and rotated. Each of W ranks embeds its share of
the images and keeps these features; queries are broadcast to every rank. All results equal the results of one rank.
n features of D numbers on this rank; q queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images
from ..data.views_of_digits import HELD_OUT_MOVE, affine
from ..distributed import World

Embed = Callable[[Tensor], Tensor]
"""Function from images (n, C, S, S) to features (n, D)."""
PIXEL_SIDE = 32
QUERY_CHUNK = 512
MOVE_SEED = 20240
DECAY = 1e-3
"""Weight decay of the linear probe."""
ITERATIONS = 100
"""L-BFGS iterations of the linear probe."""


class Bank(NamedTuple):
    """Features (n, D) of this rank's training images, and their labels (n,) int64."""

    features: Tensor
    labels: Tensor


class Vote(NamedTuple):
    """Rule of the k-NN vote: the `neighbours` nearest features vote, each with weight exp(cosine / temperature)."""

    neighbours: int
    temperature: float = 0.07


def evaluate(embed: Embed, images: Images, vote: Vote, world: World) -> dict[str, float]:
    """Results by name: the `spread` of the training images' features, and accuracies on the held-out images.

    knn, linear              share of the held-out images that is classified correctly
    knn_moved, linear_moved  the share after random shifts and rotations, equal for every network, epoch, device and
                             number of ranks
    With fewer held-out images than ranks there are no accuracies.
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
    """Features and labels of this rank's share of the training images, without augmentation."""
    features, labels = zip(*((embed(batch), labels) for batch, labels in images.bank()), strict=True)
    return Bank(torch.cat(features), torch.cat(labels))


def knn(queries: Tensor, bank: Bank, vote: Vote, world: World) -> Tensor:
    """Class (q,) of each of this rank's queries (q, D), by the vote of the nearest features by cosine on all ranks.

    Exact: each rank finds its nearest features to every query; the nearest of these are the nearest of all ranks.
    With fewer features than `neighbours`, all features vote.
    """
    bank = Bank(F.normalize(bank.features, dim=1), bank.labels)
    queries = F.normalize(queries, dim=1)
    classes: list[Tensor] = []
    for rank in range(world.size):
        for chunk in world.broadcast(queries, rank).split(QUERY_CHUNK):
            cosine, label = (world.join(part) for part in nearest(chunk, bank, vote.neighbours))
            if rank == world.rank:
                classes.append(elected(cosine, label, vote))
    return torch.cat(classes) if classes else bank.labels[:0]


def nearest(queries: Tensor, bank: Bank, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cosines (q, neighbours), highest first, and labels of the nearest features on this rank.

    Where the rank has fewer features than `neighbours`, the remaining cosines are -inf.
    """
    cosine, index = (queries @ bank.features.T).topk(min(neighbours, len(bank.labels)), dim=1)
    missing = neighbours - cosine.shape[1]
    return F.pad(cosine, (0, missing), value=-torch.inf), F.pad(bank.labels[index], (0, missing))


def elected(cosine: Tensor, label: Tensor, vote: Vote) -> Tensor:
    """Class of each row: the one with the largest sum of weights among the `neighbours` highest cosines."""
    cosine, order = cosine.topk(min(vote.neighbours, cosine.shape[1]), dim=1)
    label = label.gather(1, order)
    weight = ((cosine - cosine[:, :1]) / vote.temperature).exp()
    votes = torch.einsum("qj,qij->qi", weight, (label[:, :, None] == label[:, None, :]).to(weight))
    return label.gather(1, votes.argmax(1, keepdim=True))[:, 0]


def share_equal(predicted: Tensor, truth: Tensor, world: World) -> float:
    """Share of the predicted classes (q,), over all ranks, that equal `truth` (q,)."""
    right, count = world.sum(torch.tensor([int((predicted == truth).sum()), len(truth)], device=truth.device)).tolist()
    return right / count


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to the features of all ranks, from zero.

    min over W, b of mean_i CE(W x_i + b, label_i) + DECAY/2 |W|², by L-BFGS. No gradient reaches the network.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, world: World) -> None:
        """features (n, D), labels (n,) int64 below `classes`."""
        count, self.mean, variance = moments(features, world)
        self.scale = (variance + variance.mean() * 1e-6).clamp_min(torch.finfo(variance.dtype).tiny).rsqrt()
        x = self.standardize(features)
        D = features.shape[1]
        self.weights = torch.zeros(D + 1, classes, device=x.device, dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.logits(x), labels, reduction="sum") / count
            loss = loss + DECAY / 2 / world.size * self.weights[:-1].square().sum()
            loss.backward()
            world.sum(self.weights.grad)
            return world.sum(loss.detach())

        with torch.enable_grad():
            optimizer.step(closure)

    def standardize(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the standardised features `x`."""
        return x @ self.weights[:-1] + self.weights[-1]

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Class (q,) of each feature (q, D)."""
        return self.logits(self.standardize(features)).argmax(1)


def moments(features: Tensor, world: World) -> tuple[int, Tensor, Tensor]:
    """Count, mean (D,) and variance (D,) of the features of all ranks; the variance is of centred features."""
    count = int(world.sum(torch.tensor(len(features), device=features.device)))
    mean = world.sum(features.sum(0)) / count
    return count, mean, world.sum((features - mean).square().sum(0)) / count


def spread(features: Tensor, world: World) -> dict[str, float]:
    """Measures of how much the unit features of different images differ. Both measures fall when features collapse.

    feature_std     sqrt(D) times the mean standard deviation of the D numbers: 1 where unit features point in all
                    directions equally often, 0 where all features are equal
    effective_rank  exp(-Σ p log p), p = σ / Σ σ with the singular values σ of the centred unit features: 1 to D
                    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    unit = F.normalize(features.double(), dim=1)
    count, mean, variance = moments(unit, world)
    centred = unit - mean
    covariance = world.sum(centred.T @ centred) / count
    singular = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    singular = singular[singular > singular.amax() * 1e-6]
    p = singular / singular.sum()
    return {
        "feature_std": float(variance.sqrt().mean() * features.shape[1] ** 0.5),
        "effective_rank": float(torch.special.entr(p).sum().exp()) if len(p) else 1.0,
    }


def pixels(images: Tensor) -> Tensor:
    """Raw pixels of the images as features, reduced to at most 32 x 32 pixels."""
    if images.shape[-1] > PIXEL_SIDE:
        images = F.interpolate(images, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
    return images.flatten(1)


def features(backbone: nn.Module) -> Embed:
    """Function that embeds images by the backbone in evaluation mode; the mode is restored after each batch."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        training = backbone.training
        backbone.eval()
        out = backbone(images)
        backbone.train(training)
        return out

    return embed
