"""A frozen backbone for the evaluation scripts: from a run, from a file of weights, or a model of timm as it is made.

n images (n, C, S, S) in [0, 1]; D features; ViTs have h x w patches and a class token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import backbones, cli
from ..config import FILE, Config, Data, Model, UserError
from ..distributed import World
from ..model import Standardize
from ..weights import load_backbone


@dataclass(frozen=True)
class Backbone:
    """Whose features."""

    run: Path | None = None
    """Directory of a run, or one of its checkpoints. The model and the data are those of the run."""
    name: str | None = None
    """Instead of a run: a model of timm. Without `weights` they are random."""
    weights: Path | None = None
    """Weights for `name`: a file of driver/export.py, or a checkpoint of the driver or of the authors."""
    whose: Literal["student", "teacher"] | None = None
    """Weights of a checkpoint. None: the teacher's where there is one."""
    heads: int = 0
    """Attention heads of `name`, a ViT. 0: the model's own number."""
    size: int | None = None
    """Side of the images, pixels. None: the run's, or 224."""
    device: str = "auto"
    """Torch device. auto: the GPU where there is one; under torchrun, one for each rank."""
    seed: int = 0
    """Of random weights."""

    def options(self) -> Config:
        """The run's options; for a model of timm, options with that model. Raises: UserError."""
        if (self.run is None) == (self.name is None):
            raise UserError("give one of --backbone.run and --backbone.name")
        if self.run is not None:
            for option in ("weights", "heads"):
                if value := getattr(self, option):
                    raise UserError(f"--backbone.{option} {value}: --backbone.run has its own; give --backbone.name")
            directory = self.run.parent if self.run.suffix == ".pt" else self.run
            if not (directory / FILE).is_file():
                raise UserError(f"--backbone.run {self.run}: not the directory of a run, no {FILE} there")
            return cli.parse([f"--config={directory / FILE}"])
        return Config(data=Data(source="folder", size=224), model=Model(name=self.name, heads=self.heads))

    def load(self, world: World | None = None) -> "Frozen":
        """Raises: UserError."""
        options, device = self.options(), (world or World()).choose_device(self.device)
        channels = 1 if options.data.source == "digits" else 3
        size = self.size or options.data.size
        torch.manual_seed(self.seed)
        backbone = backbones.make(options.model, channels, options.data.size, several_sizes=True)
        if self.run or self.weights:
            load_backbone(backbone, self.run or self.weights, self.whose)
        return Frozen(Standardize(channels).to(device), backbone.to(device).eval().requires_grad_(False), size, device)


@dataclass(frozen=True)
class Frozen:
    """Features of a backbone in evaluation mode, without gradient."""

    standardize: nn.Module
    model: nn.Module
    size: int
    device: torch.device

    @property
    def is_vit(self) -> bool:
        return getattr(self.model, "num_prefix_tokens", 0) > 0

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, D), as the head of the pretraining gets them."""
        return self.model(self.standardize(images))

    @torch.no_grad()
    def for_linear(self, images: Tensor, blocks: int, average: bool) -> Tensor:
        """Of ViTs the class tokens of the last blocks, and with `average` the last one's mean patch, side by side; of
        other models `features`. Raises: UserError."""
        if not self.is_vit:
            return self.features(images)
        of_blocks: Any = self.model.feature_info
        if blocks > len(of_blocks):
            raise UserError(f"--blocks {blocks}: the backbone has {len(of_blocks)}")
        layers = self._layers(images, blocks, return_prefix_tokens=True)
        parts = [prefix[:, 0] for _, prefix in layers]
        if average:
            parts.append(layers[-1][0].mean((2, 3)))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """(n, D, h, w), the last feature map. Raises: UserError."""
        return self._layers(images, 1)[0]

    def _layers(self, images: Tensor, count: int, **more: Any) -> list[Any]:
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"{type(self.model).__name__} gives no feature maps; a model of timm does")
        return self.model.forward_intermediates(
            self.standardize(images), indices=count, norm=True, intermediates_only=True, output_fmt="NCHW", **more
        )
