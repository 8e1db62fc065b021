"""The optimiser, its parameter groups, and the learning rate."""

import math
from typing import Any

import torch
from torch import nn

from .config import Optim


def make_optimizer(network: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimiser that the options name."""
    groups = parameter_groups(network, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms and biases, which have at most one dimension, do not."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
