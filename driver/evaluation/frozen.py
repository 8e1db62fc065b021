"""Frozen backbone for the evaluation scripts: from a run, from a file of weights, or a model of timm without training.

n images (n, C, S, S) in [0, 1]; D features; ViTs have h x w patches and a class token.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from .. import backbones, checkpoint, cli
from ..bounds import PIXELS, SEED, at_least
from ..config import FILE, Config, Data, Model, UserError, helpful
from ..distributed import World
from ..messages.text import first_line
from ..model import Standardize, feature_width
from ..weights import load_backbone, load_pretrained


@helpful
@dataclass(frozen=True)
class Backbone:
    """Backbone whose features are evaluated: of a run, or a model of timm."""

    run: Path | None = None
    """Directory of a run, or one of its checkpoints. Model and data are taken from the run."""
    name: str | None = None
    """Name of a model of timm, instead of a run. Without `weights` or `pretrained`, its weights are random."""
    weights: Path | None = None
    """File of weights for the model `name`: an export of driver/export.py, a checkpoint of the driver, or a checkpoint
    of other training code, whose heads are left out."""
    pretrained: bool = False
    """Take timm's own weights of the model `name`, which may have a tag, as `vit_small_patch16_224.dino`."""
    whose: Literal["student", "teacher"] | None = None
    """Network of the checkpoint whose weights are used. None: the teacher where there is one, else the student."""
    heads: Annotated[int, at_least(0, 2**16)] = 0
    """Attention heads of the model `name`, if it is a ViT. 0: the model's own number."""
    size: Annotated[int | None, PIXELS] = None
    """Side of the images, pixels. None: as in the run; 224 for a model of timm."""
    device: str = "auto"
    """Torch device. auto: the GPU where there is one; under torchrun, one GPU per rank."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random weights."""

    def options(self) -> Config:
        """Options of the run, or options with the model of timm. Raises: UserError if --backbone options conflict."""
        if (self.run is None) == (self.name is None):
            raise UserError("give one of --backbone.run and --backbone.name")
        if self.run is not None:
            for option in ("weights", "pretrained", "heads"):
                if value := getattr(self, option):
                    raise UserError(f"--backbone.{option} {value}: --backbone.run has its own; give --backbone.name")
            file = checkpoint.file_of(self.run).with_name(FILE)
            if not file.is_file():
                raise UserError(f"--backbone.run {self.run}: not the directory of a run, no {FILE} there")
            return cli.parse([f"--config={file}"])
        for option in ("weights", "heads"):
            if self.pretrained and (value := getattr(self, option)):
                raise UserError(f"--backbone.{option} {value}: excludes --backbone.pretrained; give one of them")
        model = Model(name=self.name, heads=self.heads, weights=self.weights, pretrained=self.pretrained)
        return Config(data=Data(source="folder", size=224), model=model)

    def load(self, world: World | None = None) -> "Frozen":
        """Backbone with its weights, frozen, on its device. Raises: UserError where options or weights do not fit."""
        options, device = self.options(), (world or World()).choose_device(self.device)
        model, channels, size = options.model, options.data.channels, self.size or options.data.size
        torch.manual_seed(self.seed)
        made_for = options.data.size if model.name == "convnet" else size  # by which a convnet has its depth
        backbone = backbones.make(model, channels, made_for, several_sizes=True)
        standardize = Standardize.of(model, channels)
        feature_width(nn.Sequential(standardize, backbone), model, channels, size, "--backbone.size")
        if self.pretrained:
            load_pretrained(backbone, model.name)
        elif path := self.run or self.weights:
            load_backbone(backbone, path, self.whose, model)
        backbone = backbone.to(device).eval().requires_grad_(False)
        return Frozen(standardize.to(device), backbone, size, device)


@dataclass(frozen=True)
class Frozen:
    """Backbone in evaluation mode, which gives features without gradient."""

    standardize: nn.Module
    model: nn.Module
    size: int
    device: torch.device

    @property
    def is_vit(self) -> bool:
        """Whether each block gives a class token; XCiT and CaiT of timm have one, but only at the end."""
        blocks: Any = getattr(self.model, "forward_intermediates", None)
        tokens = blocks is not None and "return_prefix_tokens" in inspect.signature(blocks).parameters
        return tokens and getattr(self.model, "num_prefix_tokens", 0) > 0

    @property
    def stride(self) -> int:
        """Pixels of an image per row and column of the last feature map, as timm says; 1 where it does not."""
        blocks: Any = getattr(self.model, "feature_info", None)
        return blocks[-1]["reduction"] if blocks else 1

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (n, D), as the projection head gets them in pretraining."""
        return self.model(self.standardize(images))

    @torch.no_grad()
    def for_linear(self, images: Tensor, blocks: int, average: bool) -> Tensor:
        """Features of the images for a linear layer.

        ViTs: the class tokens of the last `blocks` blocks and, with `average`, the mean patch of the last block, side
        by side. Other models: `features`.
        Raises: UserError where the ViT has fewer blocks.
        """
        if not self.is_vit:
            return self.features(images)
        feature_info: Any = self.model.feature_info  # an entry per block
        if blocks > len(feature_info):
            raise UserError(f"--blocks {blocks}: the backbone has {len(feature_info)}")
        layers = self._layers(images, blocks, return_prefix_tokens=True)
        parts = [prefix[:, 0] for _, prefix in layers]
        if average:
            parts.append(layers[-1][0].mean((2, 3)))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """Last feature map (n, D, h, w). Raises: UserError where the model gives none."""
        return self._layers(images, 1)[0]

    def _layers(self, images: Tensor, count: int, **more: Any) -> list[Any]:
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"{type(self.model).__name__} gives no feature maps; a model of timm does")
        try:
            return self.model.forward_intermediates(
                self.standardize(images), indices=count, norm=True, intermediates_only=True, output_fmt="NCHW", **more
            )
        except (AssertionError, RuntimeError) as error:  # as of a model with positions of a fixed grid
            height, width = images.shape[2:]
            name = type(self.model).__name__
            raise UserError(f"{name}: cannot take images of {height} x {width} pixels ({first_line(error)})") from error
