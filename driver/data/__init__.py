"""The data set of a run, made from its options by `make_images`."""

import torch

from ..config import Boxes, Data, UserError, missing
from ..distributed import World
from .images import Images, check_batch
from .on_device import OnDevice
from .sources import make_source
from .workers import InWorkers


def make_images(data: Data, boxes: Boxes, device: torch.device, seed: int, world: World) -> Images:
    """Open the source that the options name, and make its training views on the device or in worker processes.

    Raises: UserError where a package is missing, the images cannot be found, or there are too few of them.
    """
    try:
        source = make_source(data)
        check_batch(len(source.train), data, world)
        if not (data.on_device or source.decoded):
            return InWorkers(source, data, boxes, device, seed, world)
    except ImportError as error:
        raise UserError(missing(f"--data.source {data.source}", "torchvision", error)) from error
    try:
        return OnDevice(source, data, boxes, device, seed, world)
    except ImportError as error:
        raise UserError(missing("--data.on-device True", "kornia", error)) from error
