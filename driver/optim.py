"""Optimiser with its parameter groups, arithmetic of a step, and schedules, which are functions of the step."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config, Optim, UserError, missing


def make_optimizer(network: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Optimiser that --optim.name names. Raises: UserError where it needs timm, which is not installed."""
    groups = parameter_groups(network, optim.weight_decay)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    try:
        from timm.optim import Lamb, Lars
    except ImportError as error:
        raise UserError(missing(f"--optim.name {optim.name}", "timm", error)) from error
    if optim.name == "lars":
        return Lars(groups, lr=optim.lr, momentum=optim.momentum)
    return Lamb(groups, lr=optim.lr, max_grad_norm=None)  # --optim.clip-norm clips; Lamb's own clipping is off


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay; norms and biases, which are vectors, without."""
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Arithmetic:
    """Dtype of the weights, and autocast and gradient scaling where --run.dtype asks for them."""

    weights: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    scaler: torch.amp.GradScaler | None

    @classmethod
    def of(cls, dtype: str, device: torch.device) -> "Arithmetic":
        """Arithmetic for --run.dtype `dtype` on this device. `auto`: bfloat16 on a GPU that has it, else float32."""
        if dtype == "auto":
            has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if has_it else "float32"
        if dtype in ("float32", "float64"):
            return cls(getattr(torch, dtype), device, None, None)
        scaler = torch.amp.GradScaler(device.type) if dtype == "float16" else None
        return cls(torch.float32, device, getattr(torch, dtype), scaler)

    def context(self) -> AbstractContextManager[Any]:
        """Context in which networks and loss run: autocast, or nothing."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def step(self, optimizer: torch.optim.Optimizer, network: nn.Module, clip_norm: float) -> None:
        """Clip the gradient and take an optimiser step. With a scaler, skip the step if the gradient has overflowed."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if clip_norm > 0:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


class Schedules:
    """Learning rate, weight decay, teacher momentum and epsilon as functions of the step.

    An epoch has `steps` steps; a step has G images.
    """

    def __init__(self, options: Config, steps: int, G: int) -> None:
        self.options, optim = options, options.optim
        self.total, self.warmup = optim.epochs * steps, optim.warmup_epochs * steps
        self.peak = optim.lr * (G / optim.lr_images if optim.lr_images else 1)

    def lr(self, step: int) -> float:
        return learning_rate(step, self.total, self.warmup, self.peak, self.options.optim.lr_end)

    def weight_decay(self, step: int) -> float:
        optim = self.options.optim
        return self._to(step, optim.weight_decay, optim.weight_decay_end)

    def teacher_momentum(self, step: int) -> float:
        return cosine(step / self.total, self.options.model.teacher_momentum, self.options.model.teacher_momentum_end)

    def epsilon(self, step: int) -> float:
        return self._to(step, self.options.loss.epsilon, self.options.loss.epsilon_end)

    def _to(self, step: int, start: float, end: float | None) -> float:
        return start if end is None else cosine(step / self.total, start, end)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the optimiser's learning rate and weight decay for this step; return the learning rate."""
        lr = self.lr(step)
        decayed, others = optimizer.param_groups
        decayed["lr"] = others["lr"] = lr
        decayed["weight_decay"] = self.weight_decay(step)
        return lr


def learning_rate(step: int, total: int, warmup: float, peak: float, end: float = 0.0) -> float:
    """Learning rate of a step: a linear warm-up to `peak`, then half a cosine to `end` at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return cosine((step - warmup) / max(1.0, total - warmup), peak, end)


def cosine(done: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, as `done` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
