"""The data set of a run: `make_images` makes what the options name."""

import torch

from ..config import Boxes, Data, UserError, missing
from ..distributed import World
from .images import Images, check_batch


def make_images(data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> Images:
    """The data set that the options name. Raises: UserError."""
    from . import on_device

    if data.source == "digits":
        return on_device.digits(data, device, seed, world)
    try:
        from .sources import make_source
        from .workers import Loaded
    except ImportError as error:
        raise UserError(missing(f"--data.source {data.source}", "torchvision", error)) from error
    source = make_source(data)
    check_batch(len(source.train), data, world, str(data.root))
    if not data.on_device:
        return Loaded(source, data, boxes, device, seed, world)
    try:
        return on_device.photographs(source, data, boxes, device, seed, world)
    except ImportError as error:
        raise UserError(missing("--data.on-device True", "kornia", error)) from error
