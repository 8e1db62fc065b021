"""Recipes: named sets of values for all options. An option on the command line replaces the recipe's value."""

import difflib
from dataclasses import replace

from .config import Boxes, Config, Data, Loss, Model, Optim, Run, UserError

_DIGITS = Config()

_IMAGES = Config(
    recipe="images",
    data=Data(source="folder", size=96, batch_size=256, augmentation="simclr", held_out=0.1),
    model=Model(name="resnet18"),
    loss=Loss(epsilon=0.05),
    optim=Optim(epochs=100, lr=1e-3, warmup_epochs=10),
    run=Run(name="images"),
)

_CIFAR10 = Config(
    recipe="cifar10-resnet18",
    data=Data(source="cifar10", size=32, batch_size=512, augmentation="simclr", blur=0.0, on_device=True),
    model=Model(name="resnet18", stem="small", head_width=2048, head_dim=256),
    loss=Loss(epsilon=0.05),
    optim=Optim(epochs=200, lr=1e-3, warmup_epochs=10),
    run=Run(name="cifar10"),
)

# The published run: 16 ranks of 256 images. The final learning rate, 1e-3, is meant for 4096 images per step.
_IMAGENET_VIT_S = Config(
    recipe="imagenet-vit-s",
    data=Data(
        source="folder",
        size=224,
        batch_size=256,
        virtual_batch=4096,
        local_views=6,
        global_scale=(0.25, 1.0),
        augmentation="dino",
        held_out=0.01,
        workers=10,
    ),
    boxes=Boxes(every=40, after=40),
    model=Model(
        name="vit_small_patch16_224",
        norm="none",
        heads=12,
        positions="sincos",
        frozen_patches=True,
        head_layers=3,
        head_width=4096,
        head_dim=4096,
        activation="gelu",
        teacher_momentum=0.995,
        teacher_views="all",
    ),
    loss=Loss(epsilon=0.05, top_k=128),
    optim=Optim(
        epochs=400,
        lr=3e-4,
        lr_end=1e-3,
        lr_images=256,
        warmup_epochs=40,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_norm=0.3,
    ),
    run=Run(name="imagenet", log_every=50, eval_every=20, save_every=1, keep_every=20, neighbours=20),
)

_IMAGENET_VIT_B = replace(
    _IMAGENET_VIT_S,
    recipe="imagenet-vit-b",
    model=replace(_IMAGENET_VIT_S.model, name="vit_base_patch16_224", checkpointing=True),
)

_IMAGENET_CAFORMER = replace(
    _IMAGENET_VIT_S,
    recipe="imagenet-caformer-m36",
    model=replace(
        _IMAGENET_VIT_S.model, name="caformer_m36", heads=0, positions="own", frozen_patches=False, checkpointing=True
    ),
)

# The ViT-S recipe for one GPU: fewer and smaller images, one micro-batch per step, and a final learning rate to match.
_IMAGENETTE = replace(
    _IMAGENET_VIT_S,
    recipe="imagenette-vit-s",
    data=replace(_IMAGENET_VIT_S.data, size=160, local_size=64, virtual_batch=0, workers=8),
    optim=replace(_IMAGENET_VIT_S.optim, lr=5e-4, lr_end=1e-6),
    run=replace(_IMAGENET_VIT_S.run, name="imagenette", log_every=20, save_every=10, keep_every=100),
)

RECIPES = {
    config.recipe: config
    for config in (
        _DIGITS,
        _IMAGES,
        _CIFAR10,
        _IMAGENETTE,
        _IMAGENET_VIT_S,
        _IMAGENET_VIT_B,
        _IMAGENET_CAFORMER,
    )
}


def recipe(name: str) -> Config:
    """Options of the recipe `name`. Raises: UserError for an unknown name, with similar names."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: no such recipe; {nearest(name, list(RECIPES))}")
    return RECIPES[name]


def nearest(name: str, known: list[str]) -> str:
    """Suggestion for a message: known names similar to `name`, or all known names."""
    letters = name.replace("-", "").replace("_", "")
    near = [other for other in known if letters and letters in other.replace("-", "").replace("_", "")]
    near = near or difflib.get_close_matches(name, known, cutoff=0.6)
    return f"perhaps {' or '.join(near)}" if near else f"there are {', '.join(known)}"
