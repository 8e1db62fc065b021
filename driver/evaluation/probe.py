"""What frozen features tell by themselves: a linear classifier, their spread and their effective rank.

n features of D numbers on this rank; every function sees those of all ranks and gives the same on each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import World

DECAY = 1e-3
ITERATIONS = 100


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to all ranks' features from zero.

    min over W, b of mean_i CE(W x_i + b, label_i) + DECAY/2 |W|², by L-BFGS. Nothing of it reaches the network.
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
        """Of standardised features."""
        return x @ self.weights[:-1] + self.weights[-1]

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Class (q,) of each of (q, D)."""
        return self.logits(self.standardize(features)).argmax(1)


def moments(features: Tensor, world: World) -> tuple[int, Tensor, Tensor]:
    """Count, mean (D,) and variance (D,) of all ranks' features; the variance from centred numbers."""
    count = int(world.sum(torch.tensor(len(features), device=features.device)))
    mean = world.sum(features.sum(0)) / count
    return count, mean, world.sum((features - mean).square().sum(0)) / count


def spread(features: Tensor, world: World) -> dict[str, float]:
    """How unlike the unit features of different images are; both fall when features collapse.

    feature_std     sqrt(D) times the mean over the D numbers of their standard deviation: 1 where unit features point
                    everywhere alike, 0 where all are equal
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
